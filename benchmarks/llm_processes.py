"""Processes that are measured from outside: their memory by kind, each in a memory control group of its own.

A control group counts all that a process holds, cached pages of files among it, and can have a limit; whoever goes
beyond it after all is killed by the kernel. Owns the groups (Linux's admin-guide, cgroup-v1/memory and cgroup-v2),
which lie below this process's own. Must never know what a process does.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05
_NUMBERS = itertools.count()
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'  # the shell becomes the process


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version of control groups calls things."""

    limit: str
    peak: str
    events: str


_V1 = _Files("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
_V2 = _Files("memory.max", "memory.peak", "memory.events")


class ControlGroup:
    """A fresh memory control group. Raises OSError where the system gives none."""

    def __init__(self, limit_bytes: int | None) -> None:
        self._files, parent = _own()
        self.folder = parent / f"fedge-benchmark-{os.getpid()}-{next(_NUMBERS)}"
        self.folder.mkdir()
        try:
            if limit_bytes is not None:
                (self.folder / self._files.limit).write_text(str(limit_bytes))
                with contextlib.suppress(OSError):  # version 1 does not have it, nor a system without swap need it
                    (self.folder / "memory.swap.max").write_text("0")
        except OSError:
            self.close()
            raise

    @property
    def peak_bytes(self) -> int:
        """The most it ever held, cached files included; never more than the limit."""
        try:
            return int((self.folder / self._files.peak).read_text())
        except OSError:  # version 2 of older kernels
            return 0

    @property
    def killed(self) -> bool:
        """Whether the kernel has killed for want of memory."""
        lines = [line.split() for line in (self.folder / self._files.events).read_text().splitlines()]
        return any(words[0] == "oom_kill" and words[1] != "0" for words in lines)

    def close(self) -> None:
        """Remove it; its processes must be gone."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _own() -> tuple[_Files, Path]:
    """The folder of this process's memory control group. Raises OSError where there is none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _V1, Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    folder = Path("/sys/fs/cgroup") / path.lstrip("/")
    if "memory" not in (folder / "cgroup.subtree_control").read_text().split():
        (folder / "cgroup.subtree_control").write_text("+memory")
    return _V2, folder


def limits_work() -> bool:
    """Whether processes can be given a limit here."""
    try:
        ControlGroup(1 << 30).close()
    except OSError:
        return False
    return True


class Process:
    """A module of this package as a process, of which `wait` and `sample` learn what memory it takes.

    In a control group, where the system gives one; with `limit_bytes` there must be one.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, limit_bytes: int | None = None, inherited: Sequence[int] = ()
    ) -> None:
        self.group: ControlGroup | None = None
        try:
            self.group = ControlGroup(limit_bytes)
        except OSError:
            if limit_bytes is not None:
                raise
        enter = [] if self.group is None else ["/bin/sh", "-c", _ENTER, str(self.group.folder)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- until `close`
        self.private_bytes = self.mapped_bytes = 0
        self.popen = subprocess.Popen(
            [*enter, sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            pass_fds=inherited,
        )

    def sample(self) -> None:
        """Look at its memory now; the peaks are kept."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            lines = [line.split() for line in Path(f"/proc/{self.popen.pid}/status").read_text().splitlines()]
            sizes = {words[0]: int(words[1]) << 10 for words in lines if len(words) == 3 and words[2] == "kB"}
            self.private_bytes = max(self.private_bytes, sizes["RssAnon:"])
            self.mapped_bytes = max(self.mapped_bytes, sizes["RssFile:"] + sizes["RssShmem:"])

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    @property
    def group_bytes(self) -> int | None:
        """The peak of its control group; None without one."""
        return self.group.peak_bytes if self.group else None

    @property
    def fate(self) -> str:
        """Why it has no result, in some words."""
        if self.group and self.group.killed:
            return "killed: out of memory"
        self._errors.seek(0)
        last = self._errors.read().strip().rpartition("\n")[2][:200]
        return f"failed: {last or self.popen.returncode}"

    def close(self) -> None:
        """Kill it if it still runs, and remove the control group."""
        if self.running:
            self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self._errors):
            assert pipe
            with contextlib.suppress(OSError):
                pipe.close()
        if self.group:
            self.group.close()


def watch(processes: Sequence[Process], timeout_s: float) -> bool:
    """Wait until one of them has ended, or time is over; whether one has."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        for process in processes:
            process.sample()
        if not all(process.running for process in processes):
            return True
        time.sleep(POLL_S)
    return False
