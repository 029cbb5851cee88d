"""The command line and the public functions: real runs on real data, and every refusal in one line."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedge
from fedge import experiment as experiments
from fedge import serving
from fedge.core.errors import ExperimentError
from tests.coordinator_fixture import plan, room

with warnings.catch_warnings():  # typer still imports what click has deprecated
    warnings.filterwarnings("ignore", ".*Click 9", DeprecationWarning)
    from fedge import cli

SMALL = """
[experiment]
name = "small"
evaluate_updates = 2
stop = { updates = 4 }
[data]
partition = { kind = "iid", clients = 2 }
[server]
scheduler = { kind = "fedavg", steps = 3 }
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli._outcome([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


# ---- runs --------------------------------------------------------------------------------------


def test_run_writes_a_folder_and_says_where(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", small, "--out", "here")
    assert code == 0
    assert out.splitlines()[-1] == "here/report.html"
    assert "4 updates" in out
    assert err.count("accuracy") == 3  # at the start and after each round, as lines where there is no terminal
    names = {path.name for path in Path("here").iterdir()}
    assert {
        "experiment.toml",
        "events.jsonl",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
        "report.html",
    } <= names
    run = fedge.load_run("here")
    assert run.experiment == fedge.load_experiment(small)
    assert run.summary["updates"] == 4
    assert np.sum(run.summary["partition"]["counts"]) == 8000
    assert run.metrics["accuracy"][-1] > run.metrics["accuracy"][0]
    assert sum(array.size for array in run.model.values()) == run.summary["parameters"]


def test_run_as_json_is_one_object_and_nothing_else(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", small, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert Path(found["folder"]).parent == Path("runs")
    assert found["updates"] == 4


def test_quiet_is_quiet(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run", small, "--quiet", "--out", "q")[2] == ""


def test_the_same_seed_gives_the_same_model_and_another_seed_another(small: Path) -> None:
    first, again = fedge.simulate(small), fedge.simulate(small)
    other = fedge.simulate(experiments.load(small, ["experiment.seed=1"]))
    assert first.summary["model_sha256"] == again.summary["model_sha256"] != other.summary["model_sha256"]
    assert first.folder is None


def test_a_run_is_repeated_from_its_own_folder(small: Path) -> None:
    first = fedge.simulate(small, "first")
    again = fedge.simulate("first/experiment.toml", "again")
    assert first.summary["model_sha256"] == again.summary["model_sha256"]
    assert Path("first/events.jsonl").read_bytes() == Path("again/events.jsonl").read_bytes()


@pytest.mark.slow
def test_processes_change_nothing_but_where(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [json.loads(call(capsys, "run", small, "--json", "--processes", str(many))[1]) for many in (0, 2)]
    assert found[0]["model_sha256"] == found[1]["model_sha256"]


def test_run_never_overwrites(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine").write_text("keep")
    code, out, err = call(capsys, "run", small, "--out", "out")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: 'out' already holds something")
    assert [path.name for path in Path("out").iterdir()] == ["mine"]


def test_tensorboard_is_written_where_asked_for(small: Path) -> None:
    run = fedge.simulate(experiments.load(small, ["report.to=['files', 'tensorboard']"]), "tb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("tb/tensorboard")
    events.Reload()
    assert run.folder is not None
    assert [point.step for point in events.Tensors("accuracy")] == list(run.metrics["updates"])


def test_report_and_compare(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["experiment.stop.target=0.2", "experiment.evaluate_updates=1"]
    for kind in ("fedavg", "fedasync"):
        fedge.simulate(experiments.load(small, [*settings, f"server.scheduler.kind={kind}"]), kind)
    assert call(capsys, "report", "fedavg")[:2] == (0, "fedavg/report.html\n")
    code, out, _ = call(capsys, "compare", "fedavg", "fedasync", "--json")
    found = json.loads(out)
    assert (code, found["target"]) == (0, 0.2)
    assert [row["scheduler"] for row in found["rows"]] == ["fedavg", "fedasync"]
    assert Path(found["page"]).is_file()
    code, out, _ = call(capsys, "compare", "fedavg", "fedasync", "--target", "0.1")
    assert code == 0
    assert "time to target" in out


@pytest.mark.slow
def test_code_beside_the_experiment_is_found(small: Path) -> None:
    Path("mine.py").write_text("from fedge.client.models import linear\ndef model():\n    return linear()\n")
    words = ["run", str(small), "--set", "model.factory=mine:model", "--json", "--processes", "2"]
    script = Path(sys.executable).with_name("fedge")
    done = subprocess.run([script, *words], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["parameters"] == 7850


# ---- starting out ------------------------------------------------------------------------------


def test_init_writes_an_experiment_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "init", tmp_path / "new")
    assert code == 0
    assert str(tmp_path / "new" / "experiment.toml") in out
    assert fedge.load_experiment(tmp_path / "new" / "experiment.toml").experiment.name == "starter"
    code, _, err = call(capsys, "init", tmp_path / "new")
    assert code == 2
    assert "is there already" in err


def test_init_where_nothing_can_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, _, err = call(capsys, "init", tmp_path / "file" / "new")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "name another folder" in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("init", ["The folder it goes to"]),
        ("run", ["The experiment file.", "runs/NAME-DATE-TIME", "--processes"]),
        ("serve", ["The experiment file.", "deploy.listen", "runs/NAME"]),
        ("join", ["host:port of the coordinator.", "the coordinator's.", "client-00K", "on all data", "nowhere"]),
        ("report", ["A run folder."]),
        ("compare", ["Run folders.", "the runs' own"]),
        ("status", ["host:port of the coordinator."]),
        ("robust", ["advise", "which rules withstand"]),
    ],
)
def test_help_shows_every_argument_and_what_holds_without_it(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert [word for word in words if word not in out] == []


def test_no_help_text_holds_markup() -> None:
    commands: list[Any] = list(cli._commands().commands.values())
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            assert parameter.help, f"{command.name} {parameter.name}"
            assert "[" not in parameter.help
    assert "advise" in {command.name for command in commands}


def test_arguments_of_nested_commands_keep_their_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.robust, "registered_commands", list(cli.robust.registered_commands))
    cli.robust.command("nested")(cli.report)
    assert "A run folder." in call(capsys, "robust", "nested", "--help")[1]


def test_without_a_command_there_is_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    assert "compare" in out


def test_the_log_of_grpc_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)  # flwr sets it when another test imports it
    code = "import os, sys, atexit, fedge.cli; atexit.register(lambda: print(os.environ['GRPC_VERBOSITY']))"
    code += "; fedge.cli.main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [fedge.__version__, "NONE"]


def test_help_is_cheap() -> None:
    code = "import sys, fedge.cli; print({'numpy', 'torch', 'msgspec', 'grpc', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- runs that come to nothing -----------------------------------------------------------------

BROKEN = """
import numpy as np
from fedge.client.trainer import FunctionTrainer

def always(experiment, dataset):
    return FunctionTrainer(np.zeros(3), fail)

def fail(weights, task, shard):
    raise ValueError("no [camera]")

def later(experiment, dataset):
    calls = iter(range(99))
    return FunctionTrainer(np.zeros(3), lambda weights, *_: fail(*_, 0) if next(calls) > 3 else weights)

def first(experiment, dataset):
    failing = iter([True])
    return FunctionTrainer(np.zeros(3), lambda weights, *_: fail(*_, 0) if next(failing, False) else weights)
"""


@pytest.fixture
def broken(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Path("fedge_broken_trainer.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    return small


def test_a_run_whose_clients_all_fail_is_an_error_with_its_folder_written(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(
        capsys, "run", broken, "--quiet", "--out", "out", "--set", "client.trainer=fedge_broken_trainer:always"
    )
    assert (code, out) == (5, "")
    assert err.startswith("error: All 2 clients were shut out; the last said: client-00")
    assert "no [camera]" in err
    summary = fedge.load_run("out").summary
    assert (summary["finished"], summary["updates"], summary["evicted"]) == ("idle", 0, 2)
    assert "no [camera]" in summary["failures"]


def test_a_run_whose_clients_are_all_shut_out_is_an_error_whatever_came_before(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = "client.trainer=fedge_broken_trainer:later"
    stop = "experiment.stop={ updates = 50 }"
    code, out, err = call(capsys, "run", broken, "--quiet", "--out", "out", "--set", setting, "--set", stop)
    assert (code, out) == (5, "")
    assert err.startswith("error: All 2 clients were shut out after ")
    assert fedge.load_run("out").summary["updates"] == 4


def test_a_starved_run_says_why_in_error_line_and_summary(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.partition.clients=8", "server.aggregator={ kind = 'bulyan', byzantine = 1 }"]
    plan = [word for setting in words for word in ("--set", setting)]
    attack = ["--set", "simulation.attack={ kind = 'nan', clients = 2 }"]
    why = "'bulyan' with byzantine = 1 needs 7 clients in a group, and 6 are left; set byzantine to at most 0"
    code, _, err = call(capsys, "run", small, "--quiet", "--out", "one", *plan, *attack)
    assert code == 5
    assert f"error: No version came of this run, since {why}" in err
    assert "note: simulation.attack.clients is 2, and server.aggregator withstands byzantine = 1 only" in err
    summary = fedge.load_run("one").summary
    assert why in summary["starved"]
    assert summary["remarks"][0].startswith("simulation.attack.clients is 2")
    leave = ["--set", "simulation.network={ drop_out = 0.25, drop_out_by_s = 0.001 }"]
    code, out, _ = call(capsys, "run", small, "--quiet", "--out", "two", *plan, *leave)
    assert why in out


def test_a_run_with_a_failure_says_so(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", broken, "--out", "out", "--set", "client.trainer=fedge_broken_trainer:first")
    assert code == 0
    assert "tasks failed: 1 (last: client-00" in out
    assert "tasks failed: 1 (last: client-00" in err


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["run", "none.toml"], 2, "BAD_EXPERIMENT"),
        (["run", "small.toml", "--set", "client.bach_size=3"], 2, "BAD_EXPERIMENT"),
        (["run", "small.toml", "--set", "client.optimizer.kind=sdg"], 2, "BAD_EXPERIMENT"),
        (["run", "small.toml", "--set", "data.dataset=none.npz"], 3, "BAD_DATA"),
        (["run", "small.toml", "--set", "data.partition.clients=100000"], 3, "BAD_DATA"),
        (["run", "small.toml", "--set", "model.factory=builtins:dict"], 4, "BAD_MODEL"),
        (["run", "small.toml", "--set", "client.trainer=builtins:len"], 5, "TRAINER_FAILED"),
        (["run", "small.toml", "--bogus"], 2, "USAGE"),
        (["run"], 2, "USAGE"),
        (["runn"], 2, "USAGE"),
        (["compare", ".", "--target", "2"], 2, "BAD_EXPERIMENT"),
        (["report", "nowhere"], 2, "BAD_EXPERIMENT"),
        (["compare", "nowhere"], 2, "BAD_EXPERIMENT"),
        (["serve", "small.toml", "--listen", "0.0.0.0:0"], 6, "ADDRESS"),
        (["serve", "small.toml", "--listen", "nonsense"], 6, "ADDRESS"),
        (["status", "127.0.0.1:1"], 6, "ADDRESS"),
        (["status", "foo"], 6, "ADDRESS"),
        (["init", "/proc/fedge"], 2, "BAD_EXPERIMENT"),
        (["robust", "advise", "--clients", "10", "--byzantine", "5"], 2, "BAD_EXPERIMENT"),
        (["robust", "advise", "--clients", "10"], 2, "USAGE"),
        (["join", "nonsense"], 6, "ADDRESS"),
        (["join", "127.0.0.1:1", "small.toml", "--shard", "7"], 2, "BAD_EXPERIMENT"),
        (["join", "127.0.0.1:1", "--set", "client.batch_size=1"], 2, "BAD_EXPERIMENT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("small")
def test_an_error_is_one_line_or_one_object(
    words: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = call(capsys, *words)
    lines = [line for line in err.splitlines() if not line.startswith("time ")]
    assert (found, out, len(lines)) == (code, "", 1)
    assert lines[0].startswith("error: ")
    found, out, err = call(capsys, *words, "--json")
    error: dict[str, Any] = json.loads(out)["error"]
    assert (found, err) == (code, "")
    assert (error["reason"], error["exit_code"]) == (reason, code)
    assert error["help"] == f"docs/errors.md#{reason.lower()}"
    page = Path(__file__).parents[1] / "docs" / "errors.md"
    assert f"\n### {reason}\n" in page.read_text("utf-8")


@pytest.mark.parametrize("words", [["join", "127.0.0.1:1"], ["edge", "serve", "none"], ["llm", "join", "127.0.0.1:1"]])
def test_a_system_without_locks_is_told_in_one_sentence(words: list[str]) -> None:
    start = f"import sys; sys.modules['fcntl'] = None; from fedge.cli import main; main({words})"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: This command locks files")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("small")
def test_a_simulation_needs_no_locks() -> None:
    start = "import sys; sys.modules['fcntl'] = None; from fedge.cli import main; main(['run', 'small.toml'])"
    subprocess.run([sys.executable, "-c", start], check=True)


def test_a_command_is_suggested_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "robust", "advice")
    assert (code, err.count("Did you mean 'advise'?")) == (2, 1)


def wait_for(path: Path, text: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists() and text in path.read_text("utf-8"):
            return
        time.sleep(0.05)
    pytest.fail(f"{path} never held {text!r}")


@pytest.mark.slow
def test_ctrl_c_exits_130_and_leaves_what_there_is(small: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fedge",
        "run",
        str(small),
        "--out",
        "cut",
        "--set",
        "experiment.stop.updates=1000000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(Path("cut/metrics.jsonl"), '"updates":4')
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted"
    run = fedge.load_run("cut")
    assert run.summary["finished"] == "interrupted"
    assert run.summary["updates"] >= 4


# ---- coordinator and devices -------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_a_serve_that_fails_leaves_no_folder_behind(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for listen, why in (
            (f"127.0.0.1:{port}", "in use"),
            ("nonsense", "is no address"),
            ("0.0.0.0:0", "--insecure-remote"),
        ):
            code, _, err = call(capsys, "serve", "small.toml", "--quiet", "--listen", listen)
            assert (code, len(err.splitlines())) == (6, 1)
            assert why in err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("small")
def test_ctrl_c_on_serve_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "coordinate", interrupted)
    code, _, err = call(capsys, "serve", "small.toml", "--quiet")
    assert code == 130
    assert "the same command goes on with the run" in err


@pytest.mark.parametrize(
    ("setting", "shard", "sentence"),
    [
        ("experiment.seed=1", 99, "--shard 99"),
        ("model.factory=os:getcwd", 0, "coordinator may"),
        ("client.trainer=os:getcwd", 0, "coordinator may"),
    ],
)
def test_who_is_refused_on_joining_leaves_no_ghost(tmp_path: Path, setting: str, shard: int, sentence: str) -> None:
    def device(address: str) -> None:
        serving.participate(address, None, name="ghost", shard=shard, folder=None, progress=None)

    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            made.coordinator.experiment_text = experiments.resolved(experiments.parse(SMALL, [setting]))
            with pytest.raises(ExperimentError, match=sentence):
                await asyncio.to_thread(device, made.address)
            states = await made.coordinator.ask(lambda machine: [one.state for one in machine.clients.values()])
            assert states == []

    asyncio.run(scenario())


@pytest.mark.slow
def test_serve_join_and_status_over_a_socket(small: Path) -> None:
    fedge_ = [sys.executable, "-m", "fedge"]
    with Path("served.err").open("w") as log:
        serve = subprocess.Popen(
            [*fedge_, "serve", str(small), "--listen", "127.0.0.1:0", "--json", "--set", "experiment.stop.updates=6"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        wait_for(Path("served.err"), "listening on")
        address = Path("served.err").read_text().split("listening on ")[1].split(";")[0]
        status = subprocess.run([*fedge_, "status", address, "--json"], capture_output=True, text=True, check=True)
        assert json.loads(status.stdout)["updates"] == 0
        joins = [
            subprocess.Popen(
                [*fedge_, "join", address, "--shard", str(shard), "--json"], stdout=subprocess.PIPE, text=True
            )
            for shard in (0, 1)
        ]
        told = [json.loads(join.communicate(timeout=90)[0]) for join in joins]
        out, _ = serve.communicate(timeout=60)
    finally:
        serve.kill()
    served = json.loads(out)
    assert (serve.returncode, served["updates"]) == (0, 6)
    assert [one["updates"] for one in told] == [3, 3]
    assert set(served["updates_by_client"]) == {"client-000", "client-001"}
    run = fedge.load_run("runs/small")
    assert run.metrics["accuracy"][-1] > run.metrics["accuracy"][0]
    assert served["bytes_up"] == 6 * 4 * served["parameters"]


@pytest.mark.parametrize(
    "setting",
    [
        "data.dataset=/etc",
        "data.dataset=hf:mnist",
        "data.dataset=os:getcwd",
        "data.dataset={ kind = 'fashion-mnist', more = 1 }",
        "model.factory=os:getcwd",
        "model.factory=fedge.cli:main",
        "client.trainer=os:getcwd",
        "client.hooks=[{ kind = 'os:getcwd' }]",
        "client.optimizer.kind=os:getcwd",
        "data.partition.kind=os:getcwd",
        "server.scheduler.kind=os:getcwd",
    ],
)
def test_code_and_files_are_never_chosen_by_the_wire(setting: str) -> None:
    with pytest.raises(ExperimentError, match="coordinator may"):
        serving.check_offered(experiments.parse("", [setting]))


def test_an_experiment_of_built_in_parts_may_be_offered() -> None:
    for text in ("", SMALL, "[model]\nfactory = 'fedge.client.models:cnn'\n[deploy]\nlisten = 'host:1'"):
        assert serving.check_offered(experiments.parse(text)) is None


# ---- aggregate ---------------------------------------------------------------------------------


def test_aggregate_is_any_rule_on_any_rows() -> None:
    np.testing.assert_allclose(fedge.aggregate([[1, 2], [3, 6]]), [2, 4])
    np.testing.assert_allclose(fedge.aggregate(np.array([[1, 2], [3, 6]]), weights=[3, 1]), [1.5, 3])
    np.testing.assert_allclose(fedge.aggregate(torch.ones(3, 2)), [1, 1])


def test_aggregate_takes_the_integers_of_numpy() -> None:
    rows = [[0.0], [1.0], [9.0]]
    assert fedge.aggregate(rows, "median", np.int64(1), seed=np.uint8(3)) == [1.0]


def test_the_root_of_fltrust_is_the_index_of_a_row_also_where_others_are_set_aside() -> None:
    rows = np.array([[np.nan, 0], [4, 0], [0, 2], [1, 0]])
    for root, wanted in ((1, [4, 0]), (2, [0, 2]), (np.int64(3), [1, 0])):
        np.testing.assert_allclose(fedge.aggregate(rows, "fltrust", byzantine=1, root=root), wanted)


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        ([1.0, 2.0], {}, "rows has shape"),
        ([], {}, "rows has shape"),
        ([["a"]], {}, "rows must be real numbers"),
        ([[float("nan")]], {}, "NaN"),
        ([[1.0]], {"weights": [1, 2]}, "weights must be 1 numbers"),
        ([[1.0]], {"weights": [-1]}, "weights must be 1 numbers"),
        ([[1.0]], {"kind": "meen"}, "did you mean 'mean'"),
        ([[1.0]], {"f": 1}, "has no such setting"),
        ([[1.0]], {"weights": ["a"]}, "weights must be 1 numbers"),
        ([[1.0]], {"weights": "abc"}, "weights must be 1 numbers"),
        ([[1.0]], {"weights": [1j]}, "weights must be 1 numbers"),
        ([[1.0 + 2j]], {}, "rows must be real numbers"),
        (np.array([[1.0 + 2j]]), {}, "rows must be real numbers"),
        ([["1"]], {}, "rows must be real numbers"),
        ([[1.0], [2.0, 3.0]], {}, "rows must be real numbers"),
        (torch.ones(3, 2, requires_grad=True), {}, r"give detach\(\)"),
        ([[1e300]], {}, "1 of 1 rows hold NaN, infinite or overflowing"),
        ([[10**400]], {}, "rows must be real numbers"),
        ([[1.0]], {"pre": 3}, r'pre is a list, as in pre = \["nnm"\], not 3'),
        ([[1.0]], {"pre": "nnm"}, "pre is a list"),
        ([[1.0]], {"byzantine": 0.0}, "byzantine must be a whole number, not 0.0"),
        ([[1.0]], {"byzantine": ""}, "byzantine must be a whole number"),
        ([[1.0]], {"byzantine": True}, "byzantine must be a whole number"),
        ([[1.0]], {"seed": "x"}, "seed must be a whole number"),
        ([[1.0]], {"kind": "median", "cache": True}, "cache acts from one group of rows to the next"),
        ([[1.0]], {"kind": "median", "momentum": 0.9}, "momentum acts from one group"),
        (
            [[1.0]] * 5,
            {"kind": "multi-krum", "byzantine": 4},
            "needs 11 rows, and there are 5; set byzantine to at most 1",
        ),
        (
            [[1.0]] * 5,
            {"kind": "bulyan", "byzantine": 1, "pre": ["nnm"]},
            "set byzantine to at most 0, or give at least 7",
        ),
        ([[1.0]] * 5, {"kind": "local-clipping", "byzantine": 7}, "lacks 10 more rows.*byzantine to at most 2"),
        ([[1.0]] * 5, {"kind": "fltrust"}, "'fltrust' needs root, the index of the trusted row: 0 to 4"),
        ([[1.0]] * 5, {"kind": "fltrust", "root": 5}, "0 to 4"),
        ([[1.0], [float("nan")]], {"kind": "fltrust", "root": 1, "byzantine": 1}, "its root, holds NaN"),
    ],
)
def test_aggregate_refuses_what_does_not_fit(rows: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExperimentError, match=sentence):
        fedge.aggregate(rows, **settings)
