"""`fedge llm`: from a model's folder to answers through the commands, as processes where it matters, and refusals."""

import json
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fedge.llm
from fedge.edge.llm.engine import engine as engines
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.shards import planner
from tests import llm_fixture, llm_reference

with warnings.catch_warnings():  # typer still imports what click has deprecated
    warnings.filterwarnings("ignore", ".*Click 9", DeprecationWarning)
    from fedge import cli

FEDGE = [sys.executable, "-m", "fedge", "llm"]
DEVICE = {
    "name": "pi",
    "weights_per_s": {"int8": 1e9, "float32": 2e8},
    "memory_bytes": 1 << 30,
    "disk_bytes_per_s": 1e8,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llm_fixture.folder(tmp_path_factory.mktemp("llm-cli"), layers=3, vocab=320)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llm-devices") / "devices.json"
    path.write_text(json.dumps([DEVICE, DEVICE | {"name": "laptop", "weights_per_s": {"int8": 3e9}}]))
    return path


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["llm", *map(str, words)])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


@contextmanager
def running(ready: str, *words: str | Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A command as a process, once a line of its errors matches `ready`; yields the match's first group."""
    process = subprocess.Popen([*FEDGE, *map(str, words)], stderr=subprocess.PIPE, text=True)
    pipe = process.stderr
    assert pipe is not None
    try:
        lines = []
        for line in pipe:
            lines.append(line)
            if found := re.search(ready, line):
                yield process, found[1]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        pipe.close()


def test_the_plan_shares_by_speed_and_says_how_many_devices_are_best(
    model: Path, devices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = told(capsys, "plan", model, "--devices", devices, "--rtt", "0", "--bandwidth", "1000000")
    assert len(near["options"]) == 2
    assert near["choice"] == 1
    assert [rank["device"]["name"] for rank in near["options"][1]["ranks"]] == ["pi", "laptop"]
    far = told(capsys, "plan", model, "--devices", devices, "--rtt", "5")
    assert far["choice"] == 0
    code, out, _ = call(capsys, "plan", model, "--devices", devices, "--rtt", "5")
    assert code == 0
    assert "1 of 2 devices are best: use fewer." in out
    assert "ms/token" in out
    drawn = told(capsys, "plan", model, "--devices", devices, "--figure", tmp_path / "plan.png")["figure"]
    assert Path(drawn).read_bytes().startswith(b"\x89PNG")


def test_the_plan_keeps_what_serve_keeps(
    tmp_path: Path, devices: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = llm_fixture.folder(tmp_path, layers=1, context=4 * fedge.llm.MOST_CONTEXT)
    kept, made = [], {}

    def plan(*given: Any, kv_tokens: int) -> Any:
        kept.append(kv_tokens)
        return found(*given, kv_tokens=kv_tokens)

    def engine(*_: Any, **settings: Any) -> Any:
        made.update(settings)
        raise fedge.llm.ExperimentError("enough")

    found = planner.plan
    monkeypatch.setattr(planner, "plan", plan)
    monkeypatch.setattr(fedge.llm, "Engine", engine)
    told(capsys, "plan", long, "--devices", devices)
    told(capsys, "plan", long, "--devices", devices, "--context", "8192", "--slots", "1")
    assert call(capsys, "serve", long, "--data-port", "7451")[0] == 2
    assert made["data_port"] == 7451
    assert kept == [made["slots"] * fedge.llm.MOST_CONTEXT, 8192]
    assert made["context"] is None
    for command in ("plan", "serve"):
        assert str(fedge.llm.MOST_CONTEXT) in call(capsys, command, "--help")[1]


def test_what_bench_prints_is_a_device_for_the_plan(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = ["--store", tmp_path, "--prompt", "9", "--tokens", "5", "--kind", "float32"]
    plain, run = (told(capsys, "bench", *some, *speeds) for some in ([], [model]))
    assert run["run"]["tokens_per_s"] > 0
    one, several = tmp_path / "a.json", tmp_path / "devices.json"
    one.write_text(json.dumps(run))
    several.write_text(json.dumps([plain, run]))
    assert len(told(capsys, "plan", model, "--devices", one)["options"]) == 1
    assert len(told(capsys, "plan", model, "--devices", several)["options"]) == 2


def test_bench_passes_once_for_each_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Engine(engines.Engine):
        def submit(self, request: Any, on_piece: Any = None) -> Any:
            asked.append((request, handle := super().submit(request, on_piece), self))
            return handle

        def close(self) -> None:
            stats.append(self.stats())
            super().close()

    stats: list[dict[str, float]] = []
    monkeypatch.setattr(engines, "Engine", Engine)
    words = ["bench", model, "--store", tmp_path, "--prompt", "9", "--tokens", "40", "--kind", "float32"]
    told(capsys, *words)
    assert [handle.usage.completion_tokens for _, handle, _ in asked] == [40, 40]
    assert [(request.stop_tokens, request.sampling.temperature) for request, *_ in asked] == [((), 0.0)] * 2
    assert stats[0]["drafted_tokens"] == 0
    code, _, err = call(capsys, "bench", model, "--store", tmp_path, "--tokens", "100000")
    assert (code, "do not fit the model's context" in err) == (2, True)

    def broken(*_: Any) -> Any:
        raise fedge.llm.ExperimentError("The disk is gone; mend it.")

    monkeypatch.setattr(Model, "run", broken)
    code, out, err = call(capsys, *words)
    assert (code, out) == (4, "")
    assert "The disk is gone" in err


@pytest.mark.parametrize("content", [b'[{"name": "\xff"}]', b"[" * 100_000])
def test_a_list_of_devices_that_is_none_is_told(
    content: bytes, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    code, _, err = call(capsys, "plan", model, "--devices", tmp_path / "a.json")
    assert (code, "is no list of devices" in err) == (2, True)


@pytest.mark.parametrize("megabytes", ["nan", "inf", "-1", "0", "1e30"])
@pytest.mark.parametrize("words", [["plan", "MODEL"], ["serve", "MODEL"], ["bench", "MODEL"], ["join", "127.0.0.1:1"]])
def test_memory_that_no_machine_has_is_told(
    words: list[str], megabytes: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, *(model if word == "MODEL" else word for word in words), "--memory", megabytes)
    assert (code, "is no memory that a machine can give" in err) == (2, True)


def test_an_address_that_is_taken_is_told_before_a_model_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = call(capsys, "serve", "nowhere", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (code, "cannot be listened on" in err) == (6, True)


def test_a_context_that_the_model_has_not_is_refused_before_anything_is_loaded(
    model: Path, devices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    for name in ("Tokenizer", "local", "Group"):
        monkeypatch.setattr(fedge.llm, name, loaded)
    for words in (
        ["plan", model, "--devices", devices],
        ["serve", model, "--store", tmp_path, "--listen", "127.0.0.1:0"],
    ):
        assert call(capsys, *words, "--context", "257")[::2] == (
            2,
            "error: 257 tokens do not fit the model's context of 256; ask for 1 to 256.\n",
        )
        assert call(capsys, *words, "--context", "0")[0] == 2
    assert not any(tmp_path.iterdir())
    for context in (0, -1):
        with pytest.raises(fedge.llm.ExperimentError, match="ask for 1 to 256"):
            fedge.llm.Engine(model, context=context)
    assert len(told(capsys, "plan", model, "--devices", devices, "--context", "256")["options"]) == 2


def test_export_writes_a_file_for_every_rank(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = told(capsys, "export", model, tmp_path / "out", "--kind", "int4", "--speeds", "1,2")["shards"]
    assert [one["file"] for one in shards] == [f"rank-{n}-of-2.int4.safetensors" for n in range(2)]
    assert all((tmp_path / "out" / one["file"]).exists() for one in shards)
    assert [one["ffn"] for one in shards] == ["0-31", "32-95"]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["plan", "MODEL", "--kind", "int5"], 2, "choose one of float32, int8, int4"),
        (["plan", "nowhere"], 4, "nowhere"),
        (["plan", "MODEL", "--devices", "nowhere.json"], 2, "is no list of devices"),
        (["plan", "MODEL", "--devices", "EMPTY"], 2, "lists no device"),
        (["plan", "MODEL", "--devices", "DEVICES", "--kind", "int4"], 2, "has no speed for int4"),
        (["plan", "MODEL", "--devices", "DEVICES", "--bandwidth", "0"], 2, "bandwidth above 0"),
        (["plan", "MODEL", "--devices", "DEVICES", "--memory", "0.001"], 4, "allow more"),
        (["plan", "MODEL", "--devices", "DEVICES", "--figure", "no/such/folder.png"], 3, "cannot be written"),
        (["export", "MODEL", "OUT", "--speeds", "1,-1"], 2, "write positive numbers"),
        (["serve", "MODEL", "--listen", "0.0.0.0:0"], 6, "API key"),
        (["serve", "MODEL", "--ranks", "2", "--devices", "1"], 2, "cannot be mixed"),
        (["serve", "MODEL", "--exchange", "gossip"], 2, "no collective 'gossip'"),
        (["serve", "MODEL", "--ranks", "100"], 2, "ask for 1 to 64"),
        (["serve", "MODEL", "--exchange", "int8", "--invariant"], 2, "leave out int8"),
        (["join", "127.0.0.1:1", "--name", "a/b"], 2, "cannot be a device's name"),
        (["join", "10.0.0.1:7450"], 2, "give the ticket"),
        (["join", "127.0.0.1:1", "--ticket", "EMPTY"], 2, "is no ticket"),
        (["chat", "http://127.0.0.1:1", "--ask", "hi"], 6, "does not answer"),
        (["chat", "--json"], 2, "give a question"),
        (["train-exits", "MODEL", "OUT", "--layers", "2,1"], 2, "layers"),
        (["train-exits", "MODEL", "OUT", "--layers", "x"], 2, "are no layers"),
        (["cloud", "nowhere"], 4, "nowhere"),
        (["device", "nowhere", "--mode", "dream"], 2, "There is no mode"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    words: list[str],
    code: int,
    sentence: str,
    model: Path,
    devices: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDGE_API_KEY", raising=False)
    (tmp_path / "empty.json").write_text("[]")
    names = {"MODEL": model, "DEVICES": devices, "EMPTY": tmp_path / "empty.json", "OUT": tmp_path / "out"}
    ended, out, err = call(capsys, *(names.get(word, word) for word in words))
    assert (ended, "Traceback" in out + err) == (code, False), err
    lines = [line for line in (out + err).splitlines() if line.startswith(("error:", "{"))]
    assert len(lines) == 1
    assert sentence in lines[0]


@pytest.mark.slow
def test_a_model_is_served_by_two_ranks_and_asked_in_the_terminal(model: Path, tmp_path: Path) -> None:
    words = [
        "--ranks",
        "2",
        "--all",
        "--kind",
        "float32",
        "--listen",
        "127.0.0.1:0",
        "--store",
        tmp_path,
        "--name",
        "toy",
    ]
    with running(r"serving toy on (http://\S+)/v1", "serve", model, *words) as (_, url):
        asked = ["chat", url, "--ask", "Hello", "--temperature", "0", "--max-tokens", "5", "--json"]
        answer = json.loads(subprocess.run([*FEDGE, *asked], capture_output=True, check=True, text=True).stdout)
        assert answer["model"] == "toy"
        assert 1 <= answer["completion_tokens"] <= 5
        typed = subprocess.run(
            [*FEDGE, "chat", url, "--max-tokens", "3", "--figures"],
            input="Hi\n/quit\n",
            capture_output=True,
            text=True,
            check=True,
        )
        assert "tokens/s" in typed.stdout
        once = subprocess.run([*FEDGE, *asked[:-1], "--figures"], capture_output=True, check=True, text=True)
        assert answer["answer"] in once.stdout
        assert "s to the first token" in once.stdout


@pytest.mark.slow
def test_a_device_joins_a_head_that_waits_for_it(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        port, control = free.getsockname()[1], f"127.0.0.1:{other.getsockname()[1]}"
    head = [
        "serve",
        model,
        "--devices",
        "1",
        "--all",
        "--control",
        control,
        "--kind",
        "float32",
        "--listen",
        "127.0.0.1:0",
        "--store",
        tmp_path / "head",
    ]
    words = ["join", control, "--name", "pi", "--memory", "200", "--data-port", port, "--store", tmp_path / "pi"]
    worker = subprocess.Popen([*FEDGE, *map(str, words)], stderr=subprocess.DEVNULL)
    try:
        with running(r"ranks: (.*);? context", *head) as (_, ranks):
            assert ranks.startswith("head, pi")
            with socket.create_connection(("127.0.0.1", port), 10):  # which others would dial
                pass
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0


@pytest.mark.slow
def test_exits_are_trained_and_a_device_asks_the_cloud(model: Path, tmp_path: Path) -> None:
    words = ["train-exits", model, tmp_path, "--layers", "1,2", "--generate", "24", "--minutes", "0.05", "--json"]
    kinds = ["--kind", "float32", "--cloud-kind", "float32"]
    made = subprocess.run([*FEDGE, *map(str, words), *kinds], capture_output=True, check=True, text=True)
    assert [one["layer"] for one in json.loads(made.stdout)["exits"]] == [1, 2]
    with running(r"continuing on (\S+)", "cloud", tmp_path, "--listen", "127.0.0.1:0") as (_, address):
        asked = ["--ask", "ab", "--max-tokens", "6", "--json", "--coding", "f32", "--threshold", "1"]
        words = ["device", tmp_path, "--cloud", address, *asked]
        done = subprocess.run([*FEDGE, *map(str, words)], capture_output=True, check=True, text=True)
    tokens = json.loads(done.stdout)["tokens"]
    assert {one["label"] for one in tokens} == {"cloud"}
    with fedge.llm.open_folder(model) as folder:
        prompt = fedge.llm.Tokenizer(model).encode("ab")
        assert [one["id"] for one in tokens] == llm_reference.greedy(folder, prompt, len(tokens))


def test_the_engine_answers_as_the_model_does(model: Path, tmp_path: Path) -> None:
    with fedge.llm.Engine(model, kind="float32", slots=2, store=tmp_path, kernel="numpy-float32") as engine:
        prompt = engine.tokenizer.encode("Hello")
        pieces = list(engine.generate("Hello", max_tokens=8))
        tokens = [piece.token for piece in pieces]
        assert tokens == llm_reference.greedy(engine.folder, prompt, len(tokens))
        assert list(engine.chat([{"role": "user", "content": "hi"}], max_tokens=3))[-1].finish in ("stop", "length")
        figures = engine.stats()
        assert figures["finished_length"] + figures["finished_stop"] == 2
        assert figures['memory_private_bytes{rank="0"}'] > 0
    assert any(tmp_path.iterdir())
