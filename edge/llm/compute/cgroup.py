"""How much memory the system may still give this process and its files, by the limits of its control groups.

Owns the files of control groups, version 1 and 2 (Linux's admin-guide, cgroup-v1/memory and cgroup-v2). Elsewhere, and
where no limit is set, only the machine's free memory counts, or half of all where a system does not say what is free.
Must never set anything.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
SELF = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def room_bytes(own: Path = SELF, root: Path = ROOT, meminfo: Path = MEMINFO) -> float:
    """Bytes that files may take in memory beside what processes hold; infinite where nothing is known."""
    found = [_free(meminfo)]
    for folder in _folders(own, root):
        for limit, held in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):
            found.append(_number(folder / limit) - _fields(folder / "memory.stat").get(held, 0))
    return max(min(found), 0)


def _folders(own: Path, root: Path) -> Iterator[Path]:
    """The groups of this process and those above them; in a container its own may lie at the root."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base = root / "memory" if "memory" in controllers.split(",") else root
            if controllers and base == root:
                continue
            for part in (Path(path), *Path(path).parents):
                yield base / part.relative_to("/")


def _free(meminfo: Path) -> float:
    kilobytes = _fields(meminfo).get("MemAvailable:")
    return _installed() / 2 if kilobytes is None else kilobytes * 1024


def _installed() -> float:
    """All memory of the machine; infinite where the system does not say."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no such call, or no such name
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _number(path: Path) -> float:
    """What a file of one number says; infinite for "max", and where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return float("inf")


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in path.read_text().splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    return {}
