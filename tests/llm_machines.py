"""Machines on one machine: each has a network of its own behind a bridge, an address, and a bounded memory.

Owns network namespaces, their links (with a rate, by tbf), one memory control group per machine, and a tap that sees
every packet of a link. Needs root on Linux; `missing` says what is not permitted here, by trying it.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.llm_processes import ControlGroup

T = TypeVar("T")
NAME = "wide"  # what the API calls the model
_NEWNET = 0x40000000  # setns(2)
_ALL = 3  # ETH_P_ALL
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'  # the shell becomes the process
_PREFIX = f"fedge-{os.getpid()}"


def missing(folder: Path) -> str:
    """What of all this cannot be had here; empty where nothing is missing. `folder` is where files will lie."""
    tries = {
        "network namespaces with veth, bridge and tbf (CAP_NET_ADMIN and CAP_SYS_ADMIN)": _try_network,
        "entering a network namespace and packet sockets (CAP_SYS_ADMIN and CAP_NET_RAW)": _try_tap,
        "a memory control group": lambda: ControlGroup(1 << 30).close(),
        f"files of {folder} on a disk: they are memory": lambda: _on_disk(folder),
    }
    for what, attempt in tries.items():
        try:
            attempt()
        except (OSError, subprocess.SubprocessError) as error:
            return f"{what} ({error})"
    return ""


class Machine:
    """A namespace, its address, and a memory control group of `limit_bytes` for all that runs in it.

    As on a small device there is no torch. `folder` is the machine's own.
    """

    def __init__(self, namespace: str, address: str, limit_bytes: int | None, folder: Path) -> None:
        self.namespace, self.address, self.folder = namespace, address, folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text('import sys\nsys.modules["torch"] = None\n')
        self.group = ControlGroup(limit_bytes)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`fedge` with these arguments; what it says is in `said`."""
        return self.python("-m", "fedge", *arguments)

    def python(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Python with these arguments."""
        enter = ["/bin/sh", "-c", _ENTER, str(self.group.folder), "nsenter", f"--net=/run/netns/{self.namespace}"]
        enter += ["setpriv", "--pdeathsig", "KILL"]  # however the tests end, it ends as well
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [*enter, sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        self._processes.append(process)
        return process

    @property
    def environment(self) -> dict[str, str]:
        """Of its processes."""
        return os.environ | {"PYTHONPATH": str(self.folder), "PYTHONUNBUFFERED": "1"}

    @property
    def said(self) -> str:
        """By all processes of this machine so far."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def cable(self, plugged: bool) -> None:
        """Pull the cable, or plug it in again; nobody is told."""
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up" if plugged else "down")

    def kill(self) -> None:
        """All that runs here, at once."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        """Kill what runs here, and remove the control group."""
        self.kill()
        self.group.close()


class Tap:
    """Every packet of a link, and how often each of `needles` was in one."""

    def __init__(self, namespace: str, interface: str, needles: Mapping[str, bytes]) -> None:
        self.needles = dict(needles)
        self.found: Counter[str] = Counter()
        self.packets = self.bytes = 0
        self._socket = inside(namespace, lambda: _packets(interface))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        buffer = bytearray(1 << 17)
        while not self._over.is_set():
            try:
                size = self._socket.recv_into(buffer)
            except TimeoutError:
                continue
            self.packets, self.bytes = self.packets + 1, self.bytes + size
            self.found.update(name for name, needle in self.needles.items() if buffer.find(needle, 0, size) >= 0)

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


@contextmanager
def machines(names: Sequence[str], limit_bytes: int | None, rate_mbit: int, folder: Path) -> Iterator[list[Machine]]:
    """They see each other over links of this rate. The bridge's namespace is `hub()`, its ports have their names."""
    _sweep()
    with contextlib.ExitStack() as opened:
        _namespace(opened, hub())
        _run("ip", "-n", hub(), "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub(), "link", "set", "bridge", "up")
        made = []
        for number, name in enumerate(names, 1):
            namespace, address = f"{_PREFIX}-{name}", f"10.77.0.{number}"
            _namespace(opened, namespace)
            _run(
                "ip",
                "-n",
                hub(),
                "link",
                "add",
                "name",
                name,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                namespace,
            )
            _run("ip", "-n", hub(), "link", "set", "dev", name, "master", "bridge", "up")
            _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            for place, interface in ((namespace, "eth0"), (hub(), name)):
                _run("ip", "-n", place, "link", "set", "dev", interface, "up")
                shape = ("root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "50ms")
                _run("tc", "-n", place, "qdisc", "add", "dev", interface, *shape)
            machine = Machine(namespace, address, limit_bytes, folder / name)
            opened.callback(machine.close)
            made.append(machine)
        yield made


def hub() -> str:
    """The namespace of the bridge."""
    return f"{_PREFIX}-hub"


def inside(namespace: str, work: Callable[[], T]) -> T:
    """What `work` gives in a thread of that network; sockets that it makes stay there."""
    found: list[Any] = []

    def run() -> None:
        try:
            with open(f"/run/netns/{namespace}") as file:  # noqa: PTH123
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = found[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def get(machine: Machine, path: str, port: int = 8000) -> str:
    """From that machine's own loopback; empty while nobody answers."""

    def work() -> str:
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        except OSError:
            return ""
        finally:
            connection.close()

    return inside(machine.namespace, work)


def complete(
    machine: Machine, on_text: Callable[[int], None] = lambda _: None, timeout_s: float = 120, **body: Any
) -> str:
    """The text of a streamed completion; `on_text` is told how many chunks have come. An error is raised as it is."""

    def work() -> str:
        text, chunks = "", 0
        asked = json.dumps({"model": NAME, "stream": True, "temperature": 0} | body)
        with contextlib.closing(HTTPConnection("127.0.0.1", 8000, timeout=timeout_s)) as connection:
            connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text, chunks = text + event["choices"][0]["text"], chunks + 1
                    on_text(chunks)
        return text

    return inside(machine.namespace, work)


def until(condition: Callable[[], T], seconds: float, what: Callable[[], str]) -> T:
    """What `condition` gives as soon as it is true; fails with `what` there is to see."""
    due_at = time.monotonic() + seconds
    while time.monotonic() < due_at:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"it does not come about:\n{what()}")


def evict(folder: Path) -> None:
    """Nothing of the folder stays in memory, so that whoever reads it next has to pay for it."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _packets(interface: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    made.bind((interface, _ALL))
    made.settimeout(0.2)
    return made


def _sweep() -> None:
    """Namespaces and control groups of tests that were killed."""
    for path in Path("/run/netns").glob("fedge-*-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            _run("ip", "netns", "delete", path.name)
    with contextlib.closing(ControlGroup(None)) as own:
        beside = list(own.folder.parent.glob("fedge-benchmark-*-*"))
    for path in beside:
        if not Path("/proc", path.name.split("-")[2]).exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def _namespace(opened: contextlib.ExitStack, name: str) -> None:
    _run("ip", "netns", "add", name)
    opened.callback(_run, "ip", "netns", "delete", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _try_network() -> None:
    with contextlib.ExitStack() as opened:
        _namespace(opened, f"{_PREFIX}-try")
        _run("ip", "-n", f"{_PREFIX}-try", "link", "add", "x", "type", "veth", "peer", "name", "y")
        _run("ip", "-n", f"{_PREFIX}-try", "link", "add", "bridge", "type", "bridge")
        shape = ("root", "tbf", "rate", "10mbit", "burst", "32kb", "latency", "50ms")
        _run("tc", "-n", f"{_PREFIX}-try", "qdisc", "add", "dev", "x", *shape)


def _try_tap() -> None:
    with contextlib.ExitStack() as opened:
        _namespace(opened, f"{_PREFIX}-try")
        inside(f"{_PREFIX}-try", lambda: _packets("lo")).close()


def _on_disk(folder: Path) -> None:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
    if done.stdout.strip() in ("tmpfs", "ramfs"):
        raise OSError(done.stdout.strip())
