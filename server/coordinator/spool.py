"""The spool: uploads on their way in, one file per task, resumable after a cut on either side.

Owns the files in STATE/spool until an upload is whole and verified, and then hands it to the journal's folder, synced,
under a name made of its hash. Must never mix the bytes of two uploads, or make a path of a name that was not issued.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from fedge.core.errors import TaskSpent, WrongHash
from fedge.protos import fedge_pb2 as pb
from fedge.protos.wire import Receiver
from fedge.server.coordinator.facts import Stored
from fedge.server.coordinator.files import sync, sync_folder
from fedge.server.coordinator.journal import guarded

_BLOCK = 1 << 20


class Upload:
    """One upload in progress. Its methods block on the disk; a later upload for the same task ends it."""

    def __init__(self, path: Path, begin: pb.UploadBegin) -> None:
        self._begin = begin
        self._path = path
        self._lock = Lock()
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._receiver = Receiver(begin.manifest, self, self._spooled())

    @property
    def offset(self) -> int:
        """How many bytes are here."""
        return self._receiver.offset

    def take(self, chunk: pb.Chunk) -> None:
        """The next chunk, or the first one again. Raises a leaf of RefusedUpdate, or JournalError (disk full)."""
        with self._lock, guarded("write an upload"):
            self._check_open()
            if chunk.offset == 0 < self.offset:
                self._file.seek(0)
                self._file.truncate()
                self._receiver = Receiver(self._begin.manifest, self)
            self._receiver.take(chunk)

    def finish(self, folder: Path) -> Stored:
        """Verify, sync and move to `folder`. Raises WrongSize, or WrongHash and then the bytes are dropped."""
        with self._lock, guarded("store an update"):
            self._check_open()
            try:
                self._receiver.finish()
            except WrongHash:
                self._path.unlink()
                raise
            sync(self._file.fileno())
            self._file.close()
            sha256 = self._begin.manifest.sha256.hex()
            name = f"{sha256}-{self._begin.task_id}"
            self._path.rename(folder / name)
            sync_folder(folder)
        return Stored(self._begin.SerializeToString(deterministic=True), name, sha256)

    def close(self) -> None:
        """Take no more; what is here stays for a later upload."""
        with self._lock:
            self._file.close()

    def write(self, data: bytes) -> None:
        """All of `data` to the file: the sink of the receiver."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.close()  # the receiver has counted bytes that are not there
            raise

    def _check_open(self) -> None:
        if self._file.closed:
            raise TaskSpent("Another upload for this task has begun; let that one finish.")

    def _spooled(self) -> Iterator[bytes]:
        while block := self._file.read(_BLOCK):
            yield block


class Spool:
    """All uploads in progress. Used from the event loop; what blocks is for a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with guarded(f"use the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, Upload] = {}

    def begin(self, begin: pb.UploadBegin) -> Upload:
        """Open the upload of a task that was issued; goes on where one of the same bytes was cut. Blocks."""
        earlier = self._open.get(begin.task_id)
        if earlier:
            earlier.close()
        path = self._path(begin.task_id, begin.manifest.sha256.hex())
        with guarded("open an upload"):
            for other in self._folder.glob(f"{begin.task_id}-*"):
                if other != path or other.stat().st_size > begin.manifest.size_bytes:
                    other.unlink()
            upload = self._open[begin.task_id] = Upload(path, begin)
        return upload

    def offset(self, task_id: str) -> int:
        """How many bytes of a task's upload are here."""
        return sum(path.stat().st_size for path in self._folder.glob(f"{task_id}-*"))

    def tasks(self) -> list[tuple[str, float]]:
        """The tasks that have bytes here, and when the last came (seconds since the epoch)."""
        return [(path.name.partition("-")[0], path.stat().st_mtime) for path in self._folder.iterdir()]

    def drop(self, task_id: str) -> None:
        """Delete what came for a task."""
        upload = self._open.pop(task_id, None)
        if upload:
            upload.close()
        for path in self._folder.glob(f"{task_id}-*"):
            path.unlink(missing_ok=True)

    def end(self, upload: Upload, task_id: str) -> None:
        """An upload's call is over."""
        upload.close()
        if self._open.get(task_id) is upload:
            del self._open[task_id]

    def _path(self, task_id: str, sha256: str) -> Path:
        return self._folder / f"{task_id}-{sha256}.part"
