"""What a new user met: sentences that named another remedy, files left unnamed, a profile of another bundle served."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedge import cli, edge_inputs
from fedge.core.errors import CannotCut, DataError, ExperimentError, RefusedTensor
from fedge.edge.cloud.serving import serve_tail
from fedge.edge.cloud.session import Session
from fedge.edge.plan.link import Link
from fedge.edge.plan.options import Option
from fedge.edge.plan.planner import Bounds, plan
from fedge.edge.split.export import export
from tests import edge_fixture as tiny
from tests import onnx_models


def ran(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["edge", *map(str, words)])
    return int(ended.value.code or 0)


def test_an_exit_at_no_tensor_is_told_that_there_is_none(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.resnet(), tmp_path / "model.onnx")
    with pytest.raises(CannotCut, match="makes no tensor 'nope'; mend the name"):
        export(path, tmp_path / "bundle", exits=[("early", "nope")])


def test_a_tail_refuses_the_profile_of_another_bundle(tmp_path: Path) -> None:
    tiny.make(tmp_path / "b")
    other = tiny.profile(tiny.make(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="of another bundle"):
        asyncio.run(asyncio.wait_for(serve_tail(tmp_path / "b", listen="127.0.0.1:0", profile=other), 20))


def test_who_sets_the_bounds_that_were_named_has_a_plan() -> None:
    option = Option((("input", "output"),), (), None, None, 0.0010849, 0.0010849, memory_bytes=62_947_328, accuracy=0.8)
    link = Link(1e6, 0.01)
    with pytest.raises(ExperimentError, match=r"deadline_s = 0\.00109 to allow"):
        plan([option], link, Bounds(deadline_s=0.001))
    assert plan([option], link, Bounds(deadline_s=0.00109)).choice is option
    with pytest.raises(ExperimentError, match=r"memory_bytes = 62947328 \(63 MB\) to allow"):
        plan([option], link, Bounds(memory_bytes=1))
    assert plan([option], link, Bounds(memory_bytes=edge_inputs.whole_bytes(63.0))).choice is option


def test_an_input_that_does_not_fit_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny.make(tmp_path / "b")
    np.save(tmp_path / "right.npy", tiny.sample())
    np.save(tmp_path / "wrong.npy", tiny.sample()[:, :9])
    with pytest.raises(RefusedTensor, match=r"wrong\.npy': 'x' must be"):
        list(edge_inputs.read(tmp_path / "wrong.npy", bundle))
    assert ran("infer", tmp_path / "b", tmp_path / "right.npy", tmp_path / "wrong.npy") == 11
    told = capsys.readouterr()
    assert "right.npy" not in told.out
    assert "wrong.npy" in told.err


@pytest.mark.parametrize("words", [("plan", "b"), ("infer", "b", "x.npy")], ids=["plan", "infer"])
def test_an_accuracy_in_percent_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(*words, "--accuracy", "84") == 2
    assert "--accuracy 84.0: give a share from 0 to 1." in capsys.readouterr().err


def test_a_bundle_without_a_place_to_cut_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = onnx_models.save(onnx_models.resnet(exits=True), tmp_path / "model.onnx")
    ran("export", path, tmp_path / "named", "--exit", "one=exit1", "--exit", "two=exit2")
    assert "no place to cut" not in capsys.readouterr().err
    net = onnx_models.Net()
    net.op("MatMul", "x", net.weight(4, 64), name="y")
    model = net.model({"x": (onnx_models.FLOAT, ["n", 4])}, {"y": (onnx_models.FLOAT, ["n", 64])})
    ran("export", onnx_models.save(model, tmp_path / "wide.onnx"), tmp_path / "wide")
    assert "no place to cut was found" in capsys.readouterr().err


def test_the_cloud_of_another_bundle_is_told_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.make(tmp_path / "b")
    tiny.make(tmp_path / "other", seed=1)
    np.save(tmp_path / "x.npy", tiny.sample())
    with tiny.serving(tmp_path / "other") as address:
        ran("infer", tmp_path / "b", tmp_path / "x.npy", "--cloud", address, "--deadline", "0.2")
        assert "is not asked (OTHER_BUNDLE)" in (said := capsys.readouterr().err)
        assert "give both ends one bundle." in said
        with Session(tmp_path / "b", address) as session:
            tiny.until(lambda: session.trouble == "OTHER_BUNDLE")
            assert "give both ends one bundle" in session.trouble_detail
    with Session(tmp_path / "b") as session:
        assert not session.trouble_detail


def test_onnxruntime_keeps_no_record_of_its_use(tmp_path: Path) -> None:
    """Told before its import, or else it writes a device ID into the cache and events for its makers."""
    script = "import fedge.edge.runtime.sessions as s; s.onnxruntime.InferenceSession"
    places = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    kept = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", script], env=kept | places, check=True)
    assert list(tmp_path.rglob("*onnxruntime*")) == []
