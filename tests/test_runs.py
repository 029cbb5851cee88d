"""The folder of a run: what is written reads back, nothing is overwritten, a cut-off file is mended or refused."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import fedge
from fedge import build, runs
from fedge import experiment as experiments
from fedge.core.errors import DataError, ExperimentError
from fedge.core.params import Layout
from fedge.experiment import Stop
from fedge.progress import Progress, bar, duration, size, sparkline
from fedge.runs import Recorder
from fedge.server.machine.events import Record
from fedge.tally import Tally

PLAN = build.settled(experiments.parse("", ["experiment.stop.target=0.5", "experiment.name=t"]))
LAYOUT = Layout(("a", "b"), ((2, 2), (3,)), 7, {"count": np.array(5, np.int64)})
VECTOR = np.arange(7, dtype=np.float32)
PARTITION = {"classes": ["x"], "counts": [[3]], "clients": ["c0"]}

RECORDS = [
    Record(0.0, "joined", {"client": "c0", "examples": 3}),
    Record(1.0, "arrived", {"client": "c0", "staleness": 2, "bytes": 28, "late": True, "norm": np.float32(1.5)}),
    Record(1.0, "aggregated", {"version": 1, "members": [{"client": "c0"}], "pools": ("p",)}),
    Record(2.0, "refused", {"client": "c0", "task": "x", "reason": "NOT_FINITE", "detail": ""}),
    Record(3.0, "arrived", {"client": "c1", "staleness": 0, "bytes": 28}),
    Record(3.0, "aggregated", {"version": 2, "members": [{"client": "c1"}], "pools": ("p",)}),
    Record(4.0, "finished", {"reason": "target"}),
]
LINES: list[dict[str, Any]] = [
    {"t": 0.0, "wall_s": 0.1, "version": 0, "updates": 0, "accuracy": 0.1, "loss": 2.0, "bytes_down": 10},
    {"t": 1.0, "wall_s": 0.2, "version": 1, "updates": 1, "accuracy": 0.6, "loss": None, "bytes_down": 20},
    {"t": 3.0, "wall_s": 0.3, "version": 2, "updates": 2, "accuracy": 0.5, "loss": 1.0, "bytes_down": 30},
]


def write(folder: Path) -> runs.Run:
    folder.mkdir()
    with Recorder(PLAN, folder) as recorder:
        for record in RECORDS:
            recorder.record(record)
        for line in LINES:
            recorder.metrics(line)
        return recorder.finish(PARTITION, LAYOUT, VECTOR)


def test_a_run_reads_back_as_it_was(tmp_path: Path) -> None:
    made = write(tmp_path / "run")
    found = fedge.load_run(tmp_path / "run")
    assert found.experiment == PLAN
    assert found.summary == json.loads(json.dumps(made.summary))
    for name, column in found.metrics.items():
        np.testing.assert_array_equal(column, made.metrics[name])
    np.testing.assert_array_equal(found.metrics["loss"], [2.0, np.nan, 1.0])
    assert [event["event"] for event in found.events()] == [record.kind for record in RECORDS]
    assert next(iter(found.events())) == {"t": 0.0, "event": "joined", "client": "c0", "examples": 3}
    np.testing.assert_array_equal(found.model["a"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(found.model["b"], [4, 5, 6])
    assert found.model["count"] == 5


def test_the_folder_is_readable_without_fedge(tmp_path: Path) -> None:
    write(tmp_path / "run")
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == {"a", "b", "count"}
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert all(list(json.loads(line))[:2] == ["t", "event"] for line in lines)


def test_the_summary_adds_up(tmp_path: Path) -> None:
    summary = write(tmp_path / "run").summary
    assert summary["finished"] == "target"
    assert summary["accuracy"] == {"final": 0.5, "best": 0.6}
    assert (summary["target"], summary["time_to_target_s"]) == (0.5, 1.0)
    assert (summary["versions"], summary["updates"], summary["late"]) == (2, 2, 1)
    assert summary["refused"] == {"NOT_FINITE": 1}
    assert (summary["bytes_up"], summary["bytes_down"]) == (56, 30)
    assert summary["staleness"] == {"mean": 1.0, "max": 2}
    assert summary["updates_by_client"] == {"c0": 1, "c1": 1}
    assert summary["seconds"] == 4.0
    assert summary["model_sha256"] == hashlib.sha256(VECTOR.tobytes()).hexdigest()
    assert summary["partition"] == PARTITION
    assert {"python", "fedge", "numpy"} <= set(summary["libraries"])


def test_without_a_folder_the_run_is_in_memory() -> None:
    with Recorder(PLAN, None) as recorder:
        for line in LINES:
            recorder.metrics(line)
        made = recorder.finish(PARTITION, LAYOUT, VECTOR, "idle")
    assert made.folder is None
    assert made.summary["finished"] == "idle"
    np.testing.assert_array_equal(made.metrics["version"], [0, 1, 2])
    with pytest.raises(DataError, match="not written"):
        made.events()


def test_an_interrupted_run_has_no_model(tmp_path: Path) -> None:
    with Recorder(PLAN, tmp_path) as recorder:
        recorder.record(RECORDS[0])
        recorder.finish(PARTITION, reason="interrupted")
    found = fedge.load_run(tmp_path)
    assert (found.model, found.summary["finished"], found.summary["accuracy"]) == ({}, "interrupted", {})


def test_a_recorder_goes_on_where_a_killed_one_stopped(tmp_path: Path) -> None:
    with Recorder(PLAN, tmp_path) as recorder:
        for record in RECORDS[:4]:
            recorder.record(record)
        recorder.metrics(LINES[0])
    for name in ("events.jsonl", "metrics.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"t":3.0,"ev')  # what a kill leaves
    progress = Progress("title", Stop(updates=4), Console(file=io.StringIO()))
    with Recorder(PLAN, tmp_path, [progress]) as recorder:
        assert recorder.recorded == 4
        assert dict(progress._rows({}))["updates"] == "1"
        for record in RECORDS[4:]:
            recorder.record(record)
        for line in LINES[1:]:
            recorder.metrics(line)
        again = recorder.finish(PARTITION, LAYOUT, VECTOR)
    whole = write(tmp_path / "whole")
    volatile = {"wall_s"}
    assert {key: value for key, value in again.summary.items() if key not in volatile} == {
        key: value for key, value in whole.summary.items() if key not in volatile
    }
    for name in ("events.jsonl", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_recorder_refuses_the_folder_of_another_experiment(tmp_path: Path) -> None:
    with Recorder(PLAN, tmp_path):
        pass
    other = build.settled(experiments.parse("", ["experiment.seed=9"]))
    with pytest.raises(ExperimentError, match="another experiment"):
        Recorder(other, tmp_path)


def test_a_new_folder_never_holds_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {runs.new_folder("name") for _ in range(3)}
    assert len(made) == 3
    assert all(folder.parent == Path("runs") and folder.name.startswith("name-") for folder in made)
    assert runs.new_folder("name", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "a" / "b" / "file").touch()
    with pytest.raises(ExperimentError, match="already holds something"):
        runs.new_folder("name", tmp_path / "a" / "b")
    with pytest.raises(ExperimentError, match="Cannot make"):
        runs.new_folder("name", tmp_path / "a" / "b" / "file" / "c")


def spoil_summary(folder: Path) -> None:
    (folder / "summary.json").write_text("{")


def spoil_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"t": 1}\nnonsense\n')


def spoil_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04nonsense")


@pytest.mark.parametrize("spoil", [spoil_summary, spoil_metrics, spoil_model])
def test_a_damaged_file_is_named(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(DataError, match="damaged") as caught:
        fedge.load_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="is no folder of a run"):
        fedge.load_run(tmp_path / "none")


# ---- progress ----------------------------------------------------------------------------------


def watch(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with Progress("title", Stop(updates=4), console) as progress, Recorder(PLAN, None, [progress]) as recorder:
        for record in RECORDS:
            recorder.record(record)
        for line in LINES:
            recorder.metrics(line)
        if terminal:
            progress._console.print(progress._table())
    return out.getvalue()


def test_without_a_terminal_progress_is_one_plain_line_per_evaluation() -> None:
    lines = watch(terminal=False).splitlines()
    assert len(lines) == len(LINES)
    assert "\x1b" not in lines[-1]
    assert "accuracy 50.00%" in lines[-1]
    assert "updates 2" in lines[-1]


def test_on_a_terminal_progress_is_a_table() -> None:
    shown = watch(terminal=True)
    assert "title" in shown
    assert "50%" in shown
    assert sparkline([0.1, 0.6, 0.5]) in shown


def test_failures_are_shown_with_the_last_that_was_said() -> None:
    tally = Tally()
    for kind, values in (
        ("failed", {"client": "c0", "task": "x", "reason": "[red] raised"}),
        ("evicted", {"client": "c0", "reason": "3 tasks"}),
        ("finished", {"reason": "updates"}),
        ("refused", {"client": "c1", "task": "y", "reason": "TASK_SPENT", "detail": "The run is over."}),
    ):
        tally.record(Record(1.0, kind, values))
    assert tally.failures == "tasks failed: 1, clients shut out: 1 (last: [red] raised)"
    assert tally.summary()["failures"] == tally.failures
    out = io.StringIO()
    with Progress("title", Stop(updates=4), Console(file=out, width=300)) as progress:
        progress.begin(tally)
        progress.metrics({})
        progress._console.print(progress._table())
    assert out.getvalue().count(tally.failures) == 2
    assert Tally().failures == ""


def test_small_words() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert bar(0.5, 4) == "━━╌╌ 50%"
    assert [duration(value) for value in (4.25, 185, 7620)] == ["4.2 s", "3 min 05 s", "2 h 07 min"]
    assert [size(value) for value in (5, 1200, 3_400_000, 2.5e15)] == ["5 B", "1.2 kB", "3.4 MB", "2500.0 TB"]
