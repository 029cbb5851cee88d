"""The folder of a run: written while it goes on, read back as a Run. Readable without fedge.

    experiment.toml  events.jsonl  metrics.jsonl  model.safetensors  summary.json

Owns their names, formats and the promise that no file of an earlier run is ever overwritten. Must never import a
framework, load pickles, or compute anything about a run beyond its summary.
"""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedge import experiment as experiments
from fedge.core.errors import DataError, ExperimentError
from fedge.core.params import Array, Layout, Vector
from fedge.experiment import Experiment
from fedge.server.machine.events import Record
from fedge.tally import Tally

EXPERIMENT, EVENTS, METRICS = "experiment.toml", "events.jsonl", "metrics.jsonl"
MODEL, SUMMARY = "model.safetensors", "summary.json"
LIBRARIES = ("numpy", "torch", "grpcio", "protobuf", "msgspec", "safetensors")
BUFFER_BYTES = 1 << 16


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run. `metrics` are columns (float64, NaN where a line has no value) by name, `model`
    the tensors by name (empty where the run was interrupted), `folder` None where nothing was written.
    """

    experiment: Experiment
    summary: Mapping[str, Any]
    metrics: Mapping[str, Array]
    model: Mapping[str, Array] = field(default_factory=dict, repr=False)
    folder: Path | None = None

    def events(self) -> Iterator[dict[str, Any]]:
        """The lines of events.jsonl. Raises DataError for a broken line, or where nothing was written."""
        if self.folder is None:
            raise DataError("This run was not written to a folder, so its events are gone; give simulate an `out`.")
        return _lines(self.folder / EVENTS)


def new_folder(name: str, out: Path | None = None) -> Path:
    """An empty folder: `out`, or runs/NAME-YYYYmmdd-HHMMSS. Raises ExperimentError where `out` holds files."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ExperimentError(f"{str(out)!r} already holds something; choose another --out or move it away.")
        return _made(out)
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    taken = 1
    folder = Path("runs") / stem
    while folder.exists():
        taken += 1
        folder = Path("runs") / f"{stem}-{taken}"
    return _made(folder)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"Cannot make the run folder {str(folder)!r} ({error.strerror}); choose --out.") from None
    return folder


class Watcher(Protocol):
    """Who wants to know how a run goes."""

    def begin(self, tally: Tally) -> None:
        """The run begins, or goes on; `tally` is kept up to date from now on."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; the tally has it already."""


class Recorder:
    """Takes a run down, in memory and, where `folder` is given, in its files; and tells the watchers.

    A folder that holds records of this experiment is gone on with (`recorded` counts its lines), so that a coordinator
    started again completes it. `remarks` go into the summary.
    Raises ExperimentError where the folder holds another experiment.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path | None,
        watchers: Sequence[Watcher] = (),
        remarks: Sequence[str] = (),
    ) -> None:
        self.tally = Tally(target=experiment.experiment.stop.target, rule=experiment.server.aggregator)
        self._remarks = list(remarks)
        self.recorded = 0
        self._experiment = experiment
        self._folder = folder
        self._watchers = watchers
        self._began = time.monotonic()
        self._wall_s = 0.0  # of earlier processes
        self._events: TextIO | None = None
        self._metrics: TextIO | None = None
        if folder is not None:
            _claim(folder, experiment)
            self._recall(folder)
            self._events = (folder / EVENTS).open("a", BUFFER_BYTES, "utf-8")
            self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        for watcher in watchers:
            watcher.begin(self.tally)

    def _recall(self, folder: Path) -> None:
        """Count what an earlier process wrote."""
        for line in _mended(folder / EVENTS):
            self.tally.record(Record(line.pop("t"), line.pop("event"), line))
            self.recorded += 1
        for line in _mended(folder / METRICS):
            self.tally.metrics(line)
            self._wall_s = line.get("wall_s", self._wall_s)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._events, self._metrics):
            if file is not None:
                file.close()

    def record(self, record: Record) -> None:
        """One record of the machine."""
        self.tally.record(record)
        if self._events is not None:
            self._events.write(_json({"t": record.t, "event": record.kind, **record.values}) + "\n")

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; both files go out at once, so that a run can be watched."""
        self.tally.metrics(line)
        if self._metrics is not None and self._events is not None:
            self._metrics.write(_json(line) + "\n")
            self._metrics.flush()
            self._events.flush()
        for watcher in self._watchers:
            watcher.metrics(line)

    @property
    def wall_s(self) -> float:
        """Real seconds spent on the run so far, by all processes."""
        return self._wall_s + time.monotonic() - self._began

    def finish(
        self, partition: Mapping[str, Any], layout: Layout | None = None, vector: Vector | None = None, reason: str = ""
    ) -> Run:
        """The summary and, where there is one, the model."""
        model = {} if layout is None or vector is None else {**layout.unflatten(vector), **layout.buffers}
        summary = {
            "name": self._experiment.experiment.name,
            "seed": self._experiment.experiment.seed,
            "finished": reason or self.tally.finished,
            "remarks": self._remarks,
            **self.tally.summary(),
            "wall_s": self.wall_s,
            "model_sha256": "" if vector is None else hashlib.sha256(vector.tobytes()).hexdigest(),
            "parameters": 0 if layout is None else layout.size,
            "partition": partition,
            "libraries": libraries(),
        }
        if self._folder is not None:
            text = json.dumps(msgspec.json.decode(_json(summary)), indent=2, ensure_ascii=False)
            (self._folder / SUMMARY).write_text(text + "\n", "utf-8")
            if model:
                tensors = {name: np.ascontiguousarray(array) for name, array in model.items()}
                (self._folder / MODEL).write_bytes(save(tensors))
        return Run(self._experiment, summary, columns(self.tally.lines), model, self._folder)


def load_run(path: Path | str) -> Run:
    """Read a run folder. Raises ExperimentError where it is none, DataError where a file is damaged."""
    folder = Path(path)
    missing = [name for name in (EXPERIMENT, METRICS, SUMMARY) if not (folder / name).is_file()]
    if missing:
        raise ExperimentError(f"{str(folder)!r} is no folder of a run: it has no {missing[0]}; give one under runs/.")
    experiment = experiments.load(folder / EXPERIMENT)
    try:
        summary = msgspec.json.decode((folder / SUMMARY).read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise DataError(f"{folder / SUMMARY} is damaged: {error}.") from None
    metrics = columns(list(_lines(folder / METRICS)))
    return Run(experiment, summary, metrics, _model(folder / MODEL), folder)


def columns(lines: list[Mapping[str, Any]] | list[dict[str, Any]]) -> dict[str, Array]:
    """Lines as columns of float64 [lines]; NaN where a line has no number."""
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: np.array([_number(line.get(name)) for line in lines], np.float64) for name in names}


def libraries() -> dict[str, str]:
    """The versions that shape a result, by distribution; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("fedge", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _model(path: Path) -> dict[str, Array]:
    if not path.is_file():
        return {}
    try:
        tensors: dict[str, Array] = load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}.") from None
    return tensors


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise DataError(f"{path}, line {number} is damaged: {error}.") from None


def _claim(folder: Path, experiment: Experiment) -> None:
    """Write the experiment down, or check that it is the one written there."""
    text = experiments.resolved(experiment)
    try:
        with (folder / EXPERIMENT).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        if (folder / EXPERIMENT).read_text("utf-8") != text:
            raise ExperimentError(
                f"{str(folder)!r} holds a run of another experiment; choose another folder."
            ) from None


def _mended(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what a killed process left of a last line is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return list(_lines(path))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a record may hold plain data, not {type(value).__name__}")


_encoder = msgspec.json.Encoder(enc_hook=_plain)


def _json(value: Any) -> str:
    return _encoder.encode(value).decode()
