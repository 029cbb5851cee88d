"""Answers that hold -inf, NaN or inf, and bounds on memory that nothing is known to keep."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto

from fedge import cli, edge_cli, edge_plan
from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.edge.assess import offer, same_class
from fedge.edge.bundle import load
from fedge.edge.cloud.engine import Engine
from fedge.edge.cloud.session import Session
from fedge.edge.coding.codings import encode
from fedge.edge.exits.rules import naming, sound
from fedge.edge.plan import profile as profiles
from fedge.edge.plan.link import Link
from fedge.edge.plan.planner import Bounds, check_memory
from fedge.edge.runtime.measure import profile_bundle
from fedge.edge.split.export import export
from tests import edge_fixture as tiny
from tests import onnx_models

INF, NAN = np.inf, np.nan


# ---- what can be an answer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "can"),
    [
        ([[1.0, -INF, 2.0]], True),
        ([[-INF, -INF, 2.0]], True),
        ([[1.0, 2.0], [-INF, -INF]], False),
        ([[1.0, NAN]], False),
        ([[-INF, NAN]], False),
        ([[INF, 1.0]], False),
        ([[-INF]], True),
        ([[NAN]], False),
        ([[[-INF, 1.0], [-INF, -INF]]], True),
        ([[[-INF, 1.0], [NAN, 0.0]]], False),
        ([[[INF]]], False),
        (-INF, True),
        (NAN, False),
    ],
)
def test_only_classes_may_be_ruled_out_and_not_all(values: Any, can: bool) -> None:
    assert sound(np.array(values, np.float32)) is can


def test_whole_numbers_and_nothing_at_all_can_be_answers() -> None:
    assert sound(np.array([[1, 2]]))
    assert sound(np.zeros((0, 3), np.float32))


def test_logits_that_are_nan_name_no_class_on_held_out_data_either() -> None:
    logits = np.array([[NAN, 1.0], [-INF, -INF], [1.0, -INF], [INF, 0.0]], np.float32)
    assert naming(logits).tolist() == [False, False, True, False]
    assert same_class(logits, np.zeros(4, np.int64)).tolist() == [False, False, True, False]


# ---- through both ends ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ruling_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its last class ruled out; the cut holds -inf where x is 0, and NaN where x is less."""
    net = onnx_models.Net()
    cut = net.op("Log", "x", name="cut")
    hidden = net.op("MatMul", net.op("Exp", cut), net.const(np.ones((16, 4))))
    net.op("Add", hidden, net.const([1.0, 2.0, 3.0, -INF]), name="logits")
    model = net.model({"x": (TensorProto.FLOAT, ["n", 16])}, {"logits": (TensorProto.FLOAT, ["n", 4])})
    folder = tmp_path_factory.mktemp("edge")
    export(onnx_models.save(model, folder / "model.onnx"), folder / "bundle", cuts=["cut"])
    offer(folder / "bundle")
    return folder / "bundle"


def claims(folder: Path) -> profiles.Profile:
    """A profile that has room for the piece up to the cut and for no other."""
    known = profile_bundle(folder, load(folder))
    sizes = {key: 0 if key == "input..cut" else 100 for key in known.pieces}
    return msgspec.structs.replace(known, memory_bytes=sizes)


def holed() -> Array:
    x = np.arange(16, dtype=np.float32)[None] % 5
    assert (x == 0).any()
    return x


@pytest.mark.parametrize("keep_input", [False, True], ids=["from the input", "from the cut"])
def test_a_model_that_rules_classes_out_is_answered_by_the_cloud(ruling_out: Path, keep_input: bool) -> None:
    """With -inf in the tensor that crosses, too: what `raw` carries the tail takes."""
    known, bounds = claims(ruling_out), Bounds(memory_bytes=10, keep_input=keep_input)
    with (
        tiny.serving(ruling_out, profile=known) as address,
        Session(ruling_out, address, profile=known, bounds=bounds, deadline_s=30) as session,
        Session(ruling_out, profile=known, deadline_s=30) as alone,
    ):
        assert session.wait_for_cloud(30)
        tiny.until(lambda: session.option.boundary == ("cut" if keep_input else "input"))
        answer, own = session.infer(holed()), alone.infer(holed())
    assert (answer.label, answer.reason, own.label, own.reason) == ("cloud", "", "device", "")
    assert answer.outputs["logits"][0, 3] == -INF
    np.testing.assert_allclose(answer.outputs["logits"], own.outputs["logits"], rtol=1e-5)


def test_a_model_that_gives_nan_says_so_and_names_no_class(ruling_out: Path) -> None:
    with Session(ruling_out, profile=claims(ruling_out), deadline_s=30) as session:
        answer = session.infer(-1 - holed())
    assert (answer.label, answer.reason) == ("device", "BAD_TENSOR")
    assert "The model's own 'logits' has values that are NaN" in answer.detail
    assert np.isnan(answer.outputs["logits"]).any()
    assert "class" not in edge_cli._told("x", answer, load(ruling_out))


def test_logits_without_any_class_are_no_answer_of_the_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny.make(tmp_path / "b")
    known = tiny.profile(bundle, memory=100)
    empty = np.full((1, 4), -INF, np.float32)
    with (
        tiny.serving(tmp_path / "b", profile=known) as address,
        Session(tmp_path / "b", address, profile=known, bounds=Bounds(memory_bytes=10), deadline_s=30) as session,
    ):
        assert session.wait_for_cloud(30)
        tiny.until(lambda: session.option.boundary is not None)
        monkeypatch.setattr(Engine, "compute", lambda _, batch: [(encode("logits", empty, "raw"),)] * len(batch))
        answer = session.infer(tiny.sample())
    assert (answer.label, answer.reason) == ("device", "BAD_TENSOR")


def test_an_exit_whose_logits_are_nan_does_not_answer_in_need_either(tmp_path: Path) -> None:
    bundle = tiny.make(tmp_path / "b")
    with Session(tmp_path / "b", profile=tiny.profile(bundle, output=1000.0), deadline_s=10) as session:
        assert session.infer(tiny.sample()).label == "exit:early"
        answer = session.infer(np.full_like(tiny.sample(), NAN))
    assert (answer.label, answer.reason, answer.output) == ("none", "TOO_LATE", None)


# ---- a bound on memory ---------------------------------------------------------------------------


def test_a_bound_on_memory_needs_figures_unless_it_is_none_or_leaves_no_room_at_all(tmp_path: Path) -> None:
    known = tiny.profile(tiny.make(tmp_path / "b"), memory=100)
    silent = msgspec.structs.replace(known, memory_bytes={})
    for device in (silent, None):
        with pytest.raises(ExperimentError, match="leave out the bound"):
            check_memory(device, Bounds(memory_bytes=1, keep_input=True))
        check_memory(device, Bounds(memory_bytes=0))
        check_memory(device, Bounds())
    check_memory(known, Bounds(memory_bytes=1))


def test_a_plan_or_a_session_never_falls_back_to_the_input_for_want_of_figures(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    silent = msgspec.structs.replace(tiny.profile(tiny.make(folder)), memory_bytes={})
    profiles.save(tmp_path / "silent.json", silent)
    bounds = Bounds(memory_bytes=10**9)
    with pytest.raises(ExperimentError, match="fedge edge bench"):
        edge_plan.of(folder, tmp_path / "silent.json", tmp_path / "silent.json", 1.0, Link(1e9, 0.0), bounds)
    for known in (silent, None):
        with pytest.raises(ExperimentError, match="fedge edge bench"):
            Session(folder, "127.0.0.1:1", profile=known, bounds=bounds)
    with Session(folder, profile=silent, bounds=bounds, deadline_s=10) as session:
        assert session.infer(tiny.sample()).label == "device"  # without a cloud the bound is let go


def test_a_device_with_no_room_that_keeps_its_input_never_sends_it(tmp_path: Path) -> None:
    bundle = tiny.make(tmp_path / "b")
    known = tiny.profile(bundle)
    unknown = msgspec.structs.replace(known, memory_bytes={"input..a": 100})  # of all others nothing is known
    bounds = Bounds(memory_bytes=10, keep_input=True)
    with (
        tiny.serving(tmp_path / "b", profile=known) as address,
        Session(tmp_path / "b", address, profile=unknown, bounds=bounds, deadline_s=10) as session,
    ):
        tiny.until(lambda: session.trouble == "BAD_EXPERIMENT")
        assert session.option.boundary is None
        answer = session.infer(tiny.sample())
    assert (answer.label, answer.reason) == ("device", "BAD_EXPERIMENT")


def test_the_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.make(tmp_path / "b")
    np.save(tmp_path / "x.npy", tiny.sample())
    words = ["edge", "infer", str(tmp_path / "b"), str(tmp_path / "x.npy"), "--cloud", "127.0.0.1:1", "--memory", "30"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--json"])
    assert ended.value.code == 2
    told = json.loads(capsys.readouterr().out)["error"]
    assert told["reason"] == "BAD_EXPERIMENT"
    assert "`fedge edge bench --out FILE`" in told["message"]
