"""Pieces optimised once for this machine, in a folder of the user's: `$XDG_CACHE_HOME/fedge/pieces` unless told else.

    <key>/piece.onnx    the optimised graph
    <key>/piece.data    its weights, laid out as this processor wants them; they are mapped, not read
    <key>/record.json   size and SHA-256 of both

The key covers the piece, the weights of its bundle, the version of onnxruntime and the processor. An entry appears as a
whole or not at all; one that does not verify is thrown away and made again. Beyond `max_cache_bytes` those leave that
were not used longest: the time of a folder is that of its last use, and who runs an entry holds a lock on its folder.
Everything here may be deleted at any time. The record guards against damage, not against somebody who may write to the
folder. Must never fail for want of a cache: without one, pieces run as they are.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import WEIGHTS, Bundle, Piece, digest

log = logging.getLogger("fedge")

GRAPH, DATA, RECORD = "piece.onnx", "piece.data", "record.json"
LAYOUT = "1"  # of an entry; part of its key
SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system (FAT): a younger file may change under the same time
YOUNG_S = 60.0  # what was used since may be about to be opened
LEFT_S = 86400.0  # what no entry came of by then, none will: a process was killed


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


def entry(
    cache: Path, name: str, make: Callable[[Path], None], most_bytes: int = EdgeLimits().max_cache_bytes
) -> Path | None:
    """The folder of a verified entry, filled by `make` where there is none; None where that is impossible.

    Where it is new, older ones make room; see `prune`.
    """
    wanted = cache / name
    with contextlib.suppress(OSError):
        os.utime(wanted)
    try:
        if _verifies(wanted):
            return wanted
        shutil.rmtree(wanted, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
        try:
            make(fresh)
            _record(fresh)
            settled = _settle(fresh, wanted)
            with contextlib.suppress(OSError):
                prune(cache, most_bytes)
            return settled
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except FAILURES as error:  # a full disk, a folder that is read-only, a graph that cannot be saved
        log.warning("the piece is not optimised, as %s cannot be used (%s); it runs, with more memory", cache, error)
        return None


def hold(folder: Path, user: object) -> None:
    """Keep `prune`, in any process, from this entry until `user` is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):  # a file system without locks: then the entry may leave, and be made again
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    weakref.finalize(user, os.close, handle)


def prune(cache: Path, most_bytes: int) -> None:
    """Remove entries, those not used longest first, until at most `most_bytes` are left.

    What is in use stays, and what was used in the last YOUNG_S. Several processes may make, use and prune at a time.
    """
    now = time.time()
    found: list[tuple[float, int, Path]] = []
    for path in cache.iterdir():
        with contextlib.suppress(OSError):  # another process may be at it
            size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else 0
            found.append((path.stat().st_mtime, size, path))
    total = sum(size for _, size, _ in found)
    for used_at, size, path in sorted(found):
        unused_s = now - used_at
        leaves = unused_s > LEFT_S if path.name.startswith(".") else total > most_bytes and unused_s > YOUNG_S
        if leaves and _remove(path):
            total -= size


def _remove(path: Path) -> bool:
    """Remove an entry, or what is left of one, unless it is in use. It goes as a whole: nobody finds half of one."""
    gone = path.with_name(f".gone-{os.getpid()}-{path.name}")
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.rename(gone)
        finally:
            os.close(handle)
    except OSError:
        return False
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink(missing_ok=True)
    return True


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
