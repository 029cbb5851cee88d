"""What a client keeps on disk: its state, and the last update until the coordinator has settled it.

Both lie in one file that is replaced as a whole, so that a client killed at any moment either has trained a task, with
the state that came of it and the update to send, or has not. The id of the last settled task lies beside it.
Must never unpickle: tensors are safetensors, figures JSON.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedge.client.trainer import ClientState
from fedge.core.errors import DataError
from fedge.core.params import Array
from fedge.core.task import Update

log = logging.getLogger("fedge")
_STATE, _UPDATE = "state/", "update/"


@dataclass(frozen=True, slots=True)
class _Header:
    client: str
    run_id: str
    task_id: str
    base_version: int
    steps: int
    examples: int
    timings: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Spool:
    """The folder of one client. `state` outlives tasks and restarts; `pending` is an update to send again, or None.

    What another run left behind is dropped; what cannot be read is put aside with a warning. Raises DataError where
    the folder belongs to another client or cannot be written.
    """

    def __init__(self, folder: Path, client: str, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._last = folder / "last.safetensors"
        self._settled = folder / "settled"
        self.state: ClientState = {}
        self.pending: Update | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._last.exists():
                self._load()
        except OSError as error:
            raise DataError(f"The client's folder {folder} cannot be used ({error}); mend or name another.") from error

    def keep(self, update: Update, state: ClientState) -> None:
        """Put a finished update and the state after it on disk, before it is sent. Raises DataError."""
        tensors = {_UPDATE + name: np.asarray(blob) for name, blob in update.blobs.items()}
        for plugin, part in state.items():
            tensors |= {f"{_STATE}{plugin}/{name}": np.asarray(array) for name, array in part.items()}
        header = _Header(
            self._client,
            self._run_id,
            update.task_id,
            update.base_version,
            update.steps,
            update.examples,
            dict(update.timings),
            dict(update.metrics),
        )
        self._write(self._last, save(tensors, {"fedge": json.dumps(asdict(header))}))

    def settle(self, task_id: str) -> None:
        """The coordinator has counted or refused the update of this task: it is never sent again. Raises DataError."""
        self.pending = None
        self._write(self._settled, task_id.encode())

    def _load(self) -> None:
        try:
            header, tensors = _read(self._last)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            aside = self._last.with_suffix(".broken")
            self._last.rename(aside)
            log.warning(
                "%s cannot be read (%s): put aside as %s, and the client starts afresh", self._last, error, aside
            )
            return
        if header.client != self._client:
            raise DataError(f"{self._last} belongs to client {header.client!r}; give each client a folder of its own.")
        if header.run_id != self._run_id:
            log.info("%s is of an earlier run and is not used", self._last)
            return
        for key in (key for key in tensors if key.startswith(_STATE)):
            plugin, _, name = key.removeprefix(_STATE).partition("/")
            self.state.setdefault(plugin, {})[name] = tensors[key]
        settled = self._settled.read_bytes().decode(errors="replace") if self._settled.exists() else ""
        if settled != header.task_id:
            self.pending = _update(header, tensors)

    def _write(self, path: Path, data: bytes) -> None:
        beside = path.with_suffix(".tmp")
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error}); free some space or name another folder.") from error


def _read(path: Path) -> tuple[_Header, dict[str, Array]]:
    with safe_open(path, framework="numpy") as file:
        # The standard library's JSON, because it brings NaN back as NaN.
        header = msgspec.convert(json.loads(file.metadata()["fedge"]), _Header)
        return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)


def _update(header: _Header, tensors: dict[str, Array]) -> Update:
    blobs = {key.removeprefix(_UPDATE): tensors[key] for key in sorted(tensors) if key.startswith(_UPDATE)}
    return Update(
        header.client,
        header.task_id,
        header.base_version,
        header.steps,
        header.examples,
        blobs,
        header.timings,
        header.metrics,
    )
