"""Pieces optimised once for this machine, in a folder of the user's: `$XDG_CACHE_HOME/fedge/pieces` unless told else.

    <key>/piece.onnx    the optimised graph
    <key>/piece.data    its weights, laid out as this processor wants them; they are mapped, not read
    <key>/record.json   size and SHA-256 of both

The key covers the piece, the weights of its bundle, the version of onnxruntime and the processor. An entry appears as a
whole or not at all; one that does not verify is thrown away and made again. Everything here may be deleted at any
time. The record guards against damage, not against somebody who may write to the folder. Must never fail
for want of a cache: without one, pieces run as they are.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from fedge.edge.bundle import WEIGHTS, Bundle, Piece, digest

log = logging.getLogger("fedge")

GRAPH, DATA, RECORD = "piece.onnx", "piece.data", "record.json"
LAYOUT = "1"  # of an entry; part of its key
SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system (FAT): a younger file may change under the same time


# All that onnxruntime and the system raise; the former's exceptions have no base of their own.
FAILURES: tuple[type[Exception], ...] = (
    *(OSError, RuntimeError, ValueError, MemoryError),
    *(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)


class Stamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file was when its hash was last computed, at `checked_ns`."""

    sha256: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    checked_ns: int


def default() -> Path:
    """Where entries lie unless told else; by the XDG base directory specification."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if Path(named).is_absolute() else Path("~/.cache").expanduser()
    return base / "fedge" / "pieces"


def key(bundle: Bundle, piece: Piece) -> str:
    """The name of the entry of this piece on this machine."""
    hashes = [bundle.files[name][1] for name in (piece.file, WEIGHTS) if name in bundle.files]
    facts = [LAYOUT, onnxruntime.__version__, platform.machine(), _processor(), *hashes]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def entry(cache: Path, name: str, make: Callable[[Path], None]) -> Path | None:
    """The folder of a verified entry, filled by `make` where there is none; None where that is impossible."""
    wanted = cache / name
    try:
        if _verifies(wanted):
            return wanted
        shutil.rmtree(wanted, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
        try:
            make(fresh)
            _record(fresh)
            return _settle(fresh, wanted)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except FAILURES as error:  # a full disk, a folder that is read-only, a graph that cannot be saved
        log.warning("the piece is not optimised, as %s cannot be used (%s); it runs, with more memory", cache, error)
        return None


def _settle(fresh: Path, wanted: Path) -> Path | None:
    """Give the new entry its name, unless another process was faster: then its entry serves."""
    try:
        fresh.rename(wanted)
    except OSError:
        return wanted if _verifies(wanted) else None
    handle = os.open(wanted.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return wanted


def _verifies(folder: Path) -> bool:
    """Every file is what the record says. A file is read again only where it may have changed since it last was."""
    try:
        stamps = msgspec.json.decode((folder / RECORD).read_bytes(), type=dict[str, Stamp])
        files = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
        if GRAPH not in stamps or files != {RECORD, *stamps}:
            return False
        fresh = {name: _again(folder / name, stamp) for name, stamp in stamps.items()}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False
    if any(fresh[name].sha256 != stamp.sha256 for name, stamp in stamps.items()):
        return False
    if fresh != stamps:
        with contextlib.suppress(OSError):  # the cache may have become read-only; then the next reader hashes again
            _write(folder, fresh)
    return True


def _again(path: Path, old: Stamp) -> Stamp:
    """The stamp of the file now: the old one where nothing was written to the file since."""
    facts = path.stat()
    same = (facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns) == (
        *(old.size, old.inode),
        *(old.mtime_ns, old.ctime_ns),
    )
    settled = old.checked_ns - max(old.mtime_ns, old.ctime_ns) > SETTLED_NS
    return old if same and settled else _stamp(path)


def _stamp(path: Path) -> Stamp:
    now, facts = time.time_ns(), path.stat()
    return Stamp(digest(path), facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, now)


def _record(folder: Path) -> None:
    """Put all files of the folder on disk, then the record of them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _write(folder, {path.name: _stamp(path) for path in folder.iterdir()})


def _write(folder: Path, stamps: dict[str, Stamp]) -> None:
    """Replace the record, in one step."""
    with tempfile.NamedTemporaryFile(dir=folder.parent, prefix=".record-", delete=False) as file:
        file.write(msgspec.json.encode(stamps))
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(folder / RECORD)


def _processor() -> str:
    """What the processor can do: Linux lists it; elsewhere its name must serve."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = (line for line in lines if line.lower().startswith(("flags", "features")))
    return next(found, platform.processor())
