"""`fedge edge`: from a model to answers through the commands, as processes where it matters, and every refusal."""

import json
import signal
import socket
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from fedge.edge.bundle import Boundary, Bundle, Tensor, load
from fedge.edge.cloud.session import Answer
from tests.onnx_models import resnet, save

with warnings.catch_warnings():  # typer still imports what click has deprecated
    warnings.filterwarnings("ignore", ".*Click 9", DeprecationWarning)
    from fedge import cli, edge_cli, edge_inputs

FEDGE = [sys.executable, "-m", "fedge", "edge"]
EXITS = ("--exit", "one=exit1", "--exit", "two=exit2")
FACTORY = """
import torch
from torch import nn
from fedge.edge.exits.train import attach

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5))

def leaving():
    return attach(plain(), torch.zeros(2, 3, 16, 16), after=["1"], classes=5)

def broken():
    raise ValueError("out of order")

def nothing():
    return 3
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, held-out samples, inputs, a bundle, and a profile of this machine."""
    folder = tmp_path_factory.mktemp("edge-cli")
    save(resnet(exits=True), folder / "model.onnx")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 32, 32, 3), np.uint8)
    np.savez(folder / "held.npz", x=x, y=rng.integers(0, 10, 60))
    np.save(folder / "rows.npy", x[:3])
    Image.fromarray(x[3]).resize((50, 40)).save(folder / "picture.png")
    words = ["export", "model.onnx", "bundle", *EXITS, "--image", "32x32", "--data", "held.npz", "--lose", "0.5"]
    for command in (words, ["bench", "bundle", "--sample", "picture.png", "--out", "profile.json"]):
        subprocess.run([*FEDGE, *command], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli._outcome(["edge", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    """The one JSON object of a command that succeeds."""
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, (out, err)
    return json.loads(out)


@contextmanager
def serving(bundle: Path, *words: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [*FEDGE, "serve", str(bundle), "--listen", "127.0.0.1:0", "--json", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, json.loads(process.stdout.readline())["listening"]
        finally:
            process.kill()


def infer(folder: Path, *words: str) -> list[dict[str, Any]]:
    done = subprocess.run([*FEDGE, "infer", *words, "--json"], cwd=folder, capture_output=True, text=True, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout)["answers"]
    return answers


# ---- export, bench, plan -----------------------------------------------------------------------


def test_export_with_data_calibrates_exits_and_codings(made: Path) -> None:
    bundle = load(made / "bundle")
    assert [leave.name for leave in bundle.exits] == ["one", "two"]
    assert all(leave.temperature != 1.0 for leave in bundle.exits)
    assert {"raw", "png", "jpeg90"} <= set(bundle.codings["input"])
    assert all(sent.accuracy is not None for named in bundle.codings.values() for sent in named.values())


def test_export_tells_as_json_what_it_wrote(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "b"
    found = told(capsys, "export", "model.onnx", folder, *EXITS, "--cut", "stage2")
    assert found["folder"] == str(folder)
    assert found["version"] == load(folder).version
    assert found["checked"].startswith("on one random input")
    assert [one["name"] for one in found["boundaries"]] == ["input", "stage1", "stage2", "output"]
    assert found["codings"]["stage2"] == {coding: {"accuracy": None, "bytes": None} for coding in ("raw", "raw+zstd")}


@pytest.mark.parametrize(("count", "told"), [(60, "60 samples; share and right are of the same"),
                                              (220, "110 samples; share and right are of 110 others")])  # fmt: skip
def test_export_says_what_was_checked_and_which_samples_told(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, told: str
) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count)
    np.savez(tmp_path / "held.npz", x=x, y=y)
    data = ("--data", tmp_path / "held.npz", "--rule", "entropy")
    code, out, err = call(capsys, "export", "model.onnx", tmp_path / "b", *EXITS, "--image", "32x32", *data)
    assert (code, err) == (0, "")
    assert f"(rule entropy, chosen on {told})" in out
    bundle = load(tmp_path / "b")
    assert bundle.rule == "entropy"
    count = len(bundle.pieces)
    assert f"{count} of {count} pieces give what the whole model gives, bit for bit" in out


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "exits"), [("plain", []), ("leaving", ["exit_1"])])
def test_export_makes_a_torch_module_of_a_dotted_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factory: str, exits: list[str]
) -> None:
    (tmp_path / "own_nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    found = told(capsys, "export", f"own_nets:{factory}", tmp_path / "b", "--input", "1x3x16x16")
    assert [leave["name"] for leave in found["exits"]] == exits
    assert found["boundaries"][-1]["tensors"][0]["shape"] == [-1, 5]


@pytest.mark.slow
def test_bench_writes_a_profile_of_every_piece(made: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, found = load(made / "bundle"), json.loads((made / "profile.json").read_text())
    assert found["version"] == bundle.version
    assert set(found["pieces"]) == {f"{piece.start}..{piece.end}" for piece in bundle.pieces}
    named = {f"{name} {coding}" for name, offered in bundle.codings.items() for coding in offered}
    assert set(found["codings"]) == named
    code, out, _ = call(capsys, "bench", "bundle")
    assert code == 0
    assert "input..output" in out
    assert "(not kept" in out
    code, _, err = call(capsys, "bench", "bundle", "--out", "no/such/folder/file")
    assert (code, "cannot be written" in err) == (3, True)


def test_plan_shows_every_option_and_the_choice_keeps_the_bounds(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--device", "profile.json", "--cloud", "profile.json")
    free = told(capsys, "plan", "bundle", *at, "--bandwidth", "1000", "--rtt", "0", "--slower", "1000")
    kept = told(capsys, "plan", "bundle", *at, "--slower", "1000", "--keep-input", "--figure", tmp_path / "plan.png")
    assert free["choice"].startswith("input as ")
    assert not kept["choice"].startswith("input as ")
    assert {"local", "input as raw", kept["choice"]} <= {row["name"] for row in kept["options"]}
    assert all(("keep_input" in row["breaks"]) == (row["option"]["boundary"] == "input") for row in kept["options"])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = call(capsys, "plan", "bundle", *at)
    assert code == 0
    assert out.count("\n* ") == 1


@pytest.mark.slow
def test_plan_takes_a_model_that_is_not_cut_yet(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "plan", "model.onnx", "--bandwidth", "0.001")
    assert found["choice"] == "local"
    assert len(found["options"]) > 5
    code, _, err = call(capsys, "plan", "model.onnx", "--accuracy", "0.5")
    assert (code, "No accuracy" in err) == (2, True)


# ---- serve and infer ---------------------------------------------------------------------------


def test_a_device_without_a_cloud_answers_for_pictures_and_rows(made: Path) -> None:
    answers = infer(made, "bundle", "picture.png", "rows.npy", "--deadline", "20")
    assert [answer["input"] for answer in answers] == ["picture.png", *(f"rows.npy[{row}]" for row in range(3))]
    assert {"label", "option", "version", "latency_s", "late", "reason", "class", "shape"} <= answers[0].keys()
    assert all(answer["label"].startswith(("device", "exit:")) for answer in answers)
    assert all(answer["shape"] == [1, 10] and 0 <= answer["class"] < 10 for answer in answers)


@pytest.mark.slow
def test_answers_are_those_of_the_whole_model_or_of_an_exit_and_go_on_when_the_cloud_is_killed(made: Path) -> None:
    """With no room on the device the cloud is asked; then it is killed with signal 9, then it is gone."""
    with serving(made / "bundle", "--profile", str(made / "profile.json")) as (process, address):
        words = ["bundle", "rows.npy", "--cloud", address, "--profile", "profile.json", "--memory", "0"]
        asked = infer(made, *words, "--deadline", "20")
        process.send_signal(signal.SIGKILL)
        process.wait()
        alone = infer(made, *words, "--deadline", "3")
    assert [answer["label"] for answer in asked] == ["cloud"] * 3
    assert all(answer["option"].startswith("input as ") for answer in asked)
    assert all(answer["label"].startswith(("device", "exit:")) and not answer["late"] for answer in alone)
    unhurried = infer(made, "bundle", "rows.npy", "--deadline", "60")
    by_device = {answer["input"]: answer["class"] for answer in unhurried if answer["label"] == "device"}
    lossless = {answer["input"]: answer["class"] for answer in asked if answer["option"].endswith(("raw", "png"))}
    assert all(lossless[name] == by_device[name] for name in lossless.keys() & by_device.keys())


@pytest.mark.slow
def test_a_person_is_told_who_answered_and_that_the_cloud_is_not_there(made: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = [*FEDGE, "infer", "bundle", "rows.npy", "--cloud", address, "--deadline", "0.3"]
        done = subprocess.run(words, cwd=made, capture_output=True, text=True, check=True)
    assert f"no answer from {address} yet (ADDRESS)" in done.stderr
    assert done.stdout.count(" by ") == 4
    assert done.stdout.splitlines()[-1].startswith("3 answers by ")


def test_sigterm_ends_the_service_and_a_port_in_use_is_refused(made: Path) -> None:
    with serving(made / "bundle") as (process, address):
        words = [*FEDGE, "serve", str(made / "bundle"), "--listen", address, "--json"]
        second = subprocess.run(words, capture_output=True, text=True, check=False)
        assert second.returncode == 6
        assert json.loads(second.stdout)["error"]["reason"] == "ADDRESS"
        process.terminate()
        assert process.wait(60) == 0
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


# ---- refusals ----------------------------------------------------------------------------------


def _arrays(**arrays: Any) -> Any:
    return lambda path: np.savez(path, **arrays)


def _bomb(path: Path) -> None:
    """A header that claims 25 TB."""
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (8000000000, 1, 28, 28), }".ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(1000)
    if path.suffix == ".npy":
        path.write_bytes(data)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)


def _passwords(path: Path) -> None:
    """Weights that lie where they must not."""
    weight = TensorProto(name="w", dims=[4, 4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../../etc/passwd"), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    path.write_bytes(helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]).SerializeToString())


SAMPLES = np.zeros((4, 32, 32, 3), np.uint8)
FILES = {
    "bomb.npz": _bomb,
    "bomb.npy": _bomb,
    "passwd.onnx": _passwords,
    "junk.onnx": lambda path: path.write_bytes(b"junk"),
    "junk.npy": lambda path: path.write_bytes(b"junk"),
    "junk.png": lambda path: path.write_bytes(b"junk"),
    "junk.json": lambda path: path.write_bytes(b"{"),
    "empty.npz": _arrays(x=SAMPLES[:0]),
    "short.npz": _arrays(x=SAMPLES, y=np.zeros(3, np.int64)),
    "floats.npz": _arrays(x=SAMPLES, y=np.zeros(4)),
    "labels.npz": _arrays(x=SAMPLES, y=np.full(4, 99)),
    "shape.npz": _arrays(x=SAMPLES[0], y=np.zeros(32, np.int64)),
    "other.npz": _arrays(z=SAMPLES),
    "shape.npy": lambda path: np.save(path, SAMPLES[:1, :8]),
    "type.npy": lambda path: np.save(path, SAMPLES[:1].astype(np.float32)),
    "empty.npy": lambda path: np.save(path, SAMPLES[:0]),
}
CUT = "export model.onnx {new} --exit one=exit1 --image 32x32"
REFUSED = [
    ("export nosuch.onnx {new}", 4, "no model 'nosuch.onnx'"),
    ("export nosuch {new}", 4, "no model 'nosuch'"),
    ("export {bad}/junk.onnx {new}", 4, "not an ONNX model"),
    ("export {bad}/passwd.onnx {new}", 4, "outside the model's folder"),
    ("export model.onnx bundle", 4, "not an empty folder"),
    ("export model.onnx {new} --exit one", 2, "NAME=TENSOR"),
    ("export model.onnx {new} --exit one=nowhere", 4, "nowhere"),
    ("export model.onnx {new} --cut nowhere", 4, "nowhere"),
    ("export model.onnx {new} --image 32", 2, "HEIGHTxWIDTH"),
    ("export model.onnx {new} --image 16x16", 4, "model's size"),
    ("export model.onnx {new} --image 100000000000000000000x4", 2, "HEIGHTxWIDTH"),
    (f"export model.onnx {{new}} --image {'9' * 5000}x4", 2, "HEIGHTxWIDTH"),
    ("export model.onnx {new} --image 99999x99999", 2, "at most"),
    (f"export own_nets:plain {{new}} --input 1x{'9' * 5000}", 2, "--input"),
    ("export model.onnx {new} --image 32x32 --mean 1", 2, "3 numbers"),
    ("export model.onnx {new} --mean 0,0,0", 2, "give their size as --image HxW"),
    ("export model.onnx {new} --std 1,1,1", 2, "give their size as --image HxW"),
    ("export model.onnx {new} --input 1x3x32x32", 2, "leave it out"),
    (CUT + " --rule luck", 2, "use one of confidence, entropy, patience"),
    (CUT + " --rule patience", 2, "give them as --data"),
    ("export model.onnx {new} --image 32x32 --std 0,1,1", 4, "positive"),
    ("export no.such:factory {new} --input 1x3x8x8", 2, "cannot import"),
    ("export os:getcwd {new} --input 1x3x8x8", 4, "must return a torch.nn.Module"),
    ("export own_nets:plain {new}", 2, "--input"),
    ("export own_nets:plain {new} --input 1x3x8", 4, "takes no [1, 3, 8]"),
    ("export own_nets:plain {new} --input 1x3x99999x99999", 2, "at most"),
    ("export own_nets:broken {new} --input 1x3x8x8", 4, "out of order"),
    ("export own_nets:nothing {new} --input 1x3x8x8", 4, "returned int"),
    (CUT + " --lose 1.5", 2, "from 0 to 1"),
    (CUT + " --lose nan", 2, "from 0 to 1"),
    (CUT + " --data nosuch.npz", 3, "no such file"),
    *((CUT + f" --data {{bad}}/{name}.npz", code, said) for name, code, said in (
        ("bomb", 3, "not as long as its header"), ("empty", 3, "no held-out sample"), ("short", 3, "3 answers"),
        ("floats", 3, "whole number"), ("labels", 3, "99"), ("shape", 11, "must be uint8"), ("other", 3, "no array x"),
    )),
    ("bench nosuch", 4, "bundle.json"),
    ("bench {changed}", 4, "missing or changed"),
    ("bench bundle --sample {bad}/shape.npy", 11, "must be uint8"),
    ("plan bundle --bandwidth 0", 2, "bandwidth above 0"),
    ("plan bundle --rtt nan", 2, "round trip"),
    ("plan bundle --slower nan", 2, "--slower"),
    ("plan bundle --slower 1e308", 2, "--slower"),
    ("plan bundle --memory nan", 2, "--memory"),
    ("plan bundle --energy 1", 2, "2 numbers"),
    ("plan bundle --energy=-1,0", 2, "energy_j"),
    ("plan bundle --device profile.json --cloud profile.json --accuracy 1", 2, "set accuracy"),
    ("plan bundle --deadline nan", 2, "deadline_s"),
    ("plan bundle --device {bad}/junk.json", 3, "no profile"),
    ("infer bundle rows.npy --deadline 0", 2, "deadline"),
    ("infer bundle rows.npy --deadline nan", 2, "deadline"),
    ("infer bundle rows.npy --deadline 1e9", 2, "deadline"),
    ("infer bundle rows.npy --cloud nonsense", 6, "host:port"),
    ("infer bundle rows.npy --cloud 127.0.0.1:99999", 6, "host:port"),
    ("infer bundle rows.npy --accuracy nan", 2, "accuracy"),
    ("infer bundle rows.npy --profile {bad}/junk.json", 3, "no profile"),
    ("infer bundle nosuch.png", 3, "no file"),
    ("infer bundle nosuch.npy", 3, "no file"),
    ("infer bundle {bad}/junk.png", 3, "no picture"),
    ("infer bundle {bad}/junk.npy", 3, "cannot be read"),
    ("infer bundle {bad}/bomb.npy", 3, "cannot be read"),
    ("infer bundle {bad}/empty.npy", 3, "empty"),
    ("infer bundle {bad}/type.npy", 11, "must be uint8"),
    ("infer {changed} rows.npy", 4, "missing or changed"),
    ("serve {changed}", 4, "missing or changed"),
    ("serve bundle --listen nonsense", 6, "host:port"),
    ("serve bundle --listen 0.0.0.0:0", 6, "--insecure-remote"),
    ("serve bundle --profile {bad}/junk.json", 3, "no profile"),
    ("serve bundle --workers 0", 2, "workers"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are no use, and a bundle in which a piece has changed."""
    folder = tmp_path_factory.mktemp("bad")
    for name, make in FILES.items():
        make(folder / name)
    (folder / "own_nets.py").write_text(FACTORY)
    changed = folder / "changed"
    (changed / "pieces").mkdir(parents=True)
    for path in (made / "bundle").rglob("*.*"):
        (changed / path.relative_to(made / "bundle")).write_bytes(path.read_bytes())
    piece = next((changed / "pieces").iterdir())
    piece.write_bytes(piece.read_bytes() + b"x")
    return folder


@pytest.mark.parametrize(("words", "code", "said"), REFUSED, ids=[words[:99] for words, _, _ in REFUSED])
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing_behind(
    here: Path,
    bad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.syspath_prepend(bad)
    new = tmp_path / "new"
    line = words.format(bad=bad, new=new, changed=bad / "changed").split(" ")
    found, out, err = call(capsys, *line, "--json")
    error = json.loads(out)["error"]
    assert (found, error["exit_code"]) == (code, code)
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert err == ""
    assert not new.exists()
    anchor = error["help"].partition("#")[2].upper()
    assert f"### {anchor}\n" in (Path(cli.__file__).parents[1] / "docs" / "errors.md").read_text()


@pytest.mark.parametrize("error", [ValueError("surprise"), KeyboardInterrupt()])
def test_export_leaves_no_folder_behind_whatever_happens(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        assert (tmp_path / "b" / "bundle.json").exists()
        raise error

    monkeypatch.setattr("fedge.edge.assess.offer", fail)
    with pytest.raises(type(error)):
        edge_cli.export("model.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_class_is_told_only_where_the_answer_is_one_of_the_models(made: Path) -> None:
    """Not for a prefilter, whose first logit says that there is nothing."""
    bundle = load(made / "bundle")
    for label, columns, named in (("exit:empty", 2, False), ("exit:one", 10, True), ("device", 10, True)):
        answer = Answer({"t": np.ones((1, columns), np.float32)}, label, "local", "v", 0.1, late=False)
        assert ("class" in edge_cli._told("x", answer, bundle)) == named
    number = Answer({"t": np.ones((1, 1), np.float32)}, "device", "local", "v", 0.1, late=False)
    assert edge_cli._told("x", number, bundle)["shape"] == [1, 1]
    assert "class" not in edge_cli._told("x", number, bundle)


def test_the_rows_of_a_file_are_samples_only_where_the_first_extent_is_the_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    for first, count in ((-1, 3), (-2, 1), (3, 1)):
        ends = tuple(Boundary(name, (Tensor(name, "float32", (first, 2)),), 0) for name in ("input", "output"))
        found = list(edge_inputs.read(tmp_path / "x.npy", Bundle(1, "", "m", ends, (), {})))
        assert [array.shape for _, array in found] == [(3 // count, 2)] * count


def test_an_answer_that_can_only_come_late_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = told(capsys, "infer", "bundle", "picture.png", "--deadline", "1e-7")["answers"]
    assert (answer["label"], answer["late"], answer["reason"]) == ("none", True, "TOO_LATE")
    assert "class" not in answer


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, json, fedge.cli; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"onnxruntime", "onnx", "torch", "grpc", "numpy", "msgspec"} & set(json.loads(done.stdout))
