"""How fast this device multiplies and reads, measured once and remembered beside its shards.

Owns the measurement, which takes some seconds, and its file. Must never be run while a model runs.
"""

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from fedge.core.errors import ModelError
from fedge.core.lanes import plain_products
from fedge.edge.llm.compute.cgroup import room_bytes
from fedge.edge.llm.compute.kernels import KERNELS, Linear
from fedge.edge.llm.group.overhead import layer_s
from fedge.edge.llm.shards.quant import KINDS, Kind, Matrix, quantise

FILE = "speeds.json"
_WAY = "2"  # of measuring; what was measured in another way is measured again
_ROWS, _COLUMNS = 2048, 2048
_APART_BYTES = 80 << 20
_PART_OF_ROOM = 16  # a measurement must fit beside what else a small device does
_KERNEL_S = 0.15  # for one kind
_LAYERS_S = 0.15
_LEAST_ROUNDS = 4
_LIMIT_S = 120.0
_DISK_BYTES = 32 << 20
_UNKNOWN_BPS = 1e8  # bytes per second


@dataclass(frozen=True, slots=True)
class Speeds:
    """Weights multiplied per second by kind, one token at a time, and bytes per second from the disk; `layer_s` goes
    into a layer's other work, for one token.
    """

    weights_per_s: Mapping[str, float]
    disk_bytes_per_s: float
    machine: str = ""
    layer_s: float = 0.0


def speeds(store: Path) -> Speeds:
    """Of this machine, from the file in `store` if it was measured here. Raises ModelError."""
    path, machine = store / FILE, _machine()
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
        known = msgspec.json.decode(path.read_bytes(), type=Speeds)
        if known.machine == machine:
            return known
    found = _elsewhere(store)
    with contextlib.suppress(OSError):
        path.write_bytes(msgspec.json.encode(found))
    return found


def _elsewhere(store: Path) -> Speeds:
    """Measured in a process of its own, so that what only a measurement loads does not stay in memory."""
    command = [sys.executable, "-m", __name__, str(store)]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=_LIMIT_S)
        return msgspec.json.decode(done.stdout, type=Speeds)
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        raise ModelError(f"This device cannot be measured ({error!s:.200}); state its speeds.") from error


def measure(store: Path) -> Speeds:
    """Of this machine, now."""
    return Speeds({kind: _weights_per_s(kind) for kind in KINDS}, _disk(store), _machine(), layer_s(_LAYERS_S))


def _machine() -> str:
    """What a measurement holds for."""
    # What is installed, not which kernels work: to ask them would load torch into a rank that may never need it.
    engines = [name for name in ("onnxruntime", "torch") if importlib.util.find_spec(name)]
    return " ".join([_WAY, platform.node(), platform.machine(), str(os.cpu_count()), *engines])


def _weights_per_s(kind: Kind) -> float:
    """By the kernel that is fastest on one matrix, on as many as do not stay in a cache, one row at a time."""
    one = quantise(np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS), np.float32), kind)
    usable = [kernel for kernel in KERNELS.values() if kernel.kind == kind and kernel.available()]
    kernel = min(usable, key=lambda kernel: _seconds([kernel.prepare(one)], _KERNEL_S / len(usable)))
    apart = min(_APART_BYTES, int(room_bytes() / _PART_OF_ROOM))
    many = range(max(1, apart // one.data.nbytes))
    linears = [kernel.prepare(Matrix(kind, _ROWS, _COLUMNS, one.data.copy(), one.scale, None)) for _ in many]
    return _ROWS * _COLUMNS / _seconds(linears, _KERNEL_S)


def _seconds(linears: Sequence[Linear], seconds: float) -> float:
    """The least of several rounds for one product, the first of which is not counted."""
    x, times = np.ones((1, _COLUMNS), np.float32), [float("inf")]
    with plain_products:
        for linear in linears:
            linear(x)
        until = time.perf_counter() + seconds
        while len(times) < _LEAST_ROUNDS or time.perf_counter() < until:
            begun = time.perf_counter()
            for linear in linears:
                linear(x)
            times.append((time.perf_counter() - begun) / len(linears))
    return min(times)


def _disk(store: Path) -> float:
    """Bytes per second of a file that is not in memory; a guess where the system cannot forget one."""
    try:
        with tempfile.NamedTemporaryFile(dir=store) as file:
            piece = os.urandom(1 << 20)
            for _ in range(_DISK_BYTES >> 20):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if not hasattr(os, "posix_fadvise"):
                return _UNKNOWN_BPS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            file.seek(0)
            while file.read(1 << 20):
                pass
            return _DISK_BYTES / (time.perf_counter() - begun)
    except OSError:
        return _UNKNOWN_BPS


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(Path(sys.argv[1]))))
