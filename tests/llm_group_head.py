"""Heads and workers of a small random model: the workers as threads of this process, with its real server."""

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedge.core.limits import LlmLimits
from fedge.edge.llm.group import device
from fedge.edge.llm.group.division import everyone
from fedge.edge.llm.group.group import Group
from fedge.edge.llm.group.speeds import Speeds
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.step import Part, Step

SPEED = Speeds({"float32": 1e9, "int8": 1e9, "int4": 1e9}, 1e9)
KERNEL = "numpy-float32"
MEMORY = 1 << 30
LIMITS = LlmLimits(
    connect_timeout_s=10.0,
    step_timeout_s=4.0,
    beat_s=0.1,
    silence_s=5.0,
    settle_s=1.0,
    load_timeout_s=30.0,
    rest_s=3.0,
    fetch_chunk_bytes=4096,
    reconnect_s=0.02,
    max_reconnect_s=0.2,
)
PROMPT = (1, 5, 9, 20, 77, 3)


@contextmanager
def head(model: Path, store: Path, **settings):
    """A group that has not been formed; all its devices share every layer."""
    fixed = {"kind": "float32", "slots": 2, "context": 128, "kernel": KERNEL, "speed": SPEED, "memory_bytes": MEMORY}
    with (
        open_folder(model) as folder,
        Group(folder, store=store, **{**fixed, "divide": everyone, "limits": LIMITS, **settings}) as group,
    ):
        yield group


class Worker:
    """device.run in a thread. `states` are what it said, `error` what it raised."""

    def __init__(self, address: str, store: Path, name: str = "a", **settings):
        self.states, self.error, self.stop = [], None, threading.Event()
        fixed = {"memory_bytes": MEMORY, "kernel": KERNEL, "speed": SPEED, "limits": LIMITS}
        settings = {**fixed, "name": name, "store": store, **settings}
        self._thread = threading.Thread(target=self._run, args=(address, settings), daemon=True)
        self._thread.start()

    def _run(self, address, settings):
        try:
            device.run(address, on_state=self.states.append, stop=self.stop, **settings)
        except Exception as error:
            self.error = error

    def end(self):
        """Stop, and wait until it has."""
        self.stop.set()
        self.wait()

    def wait(self):
        """Until it ends by itself."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "a worker hangs"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def greedy(model: Model, count: int = 12, prompt=PROMPT) -> list[int]:
    """The likeliest tokens after the prompt, one pass for each."""
    tokens, start, out = list(prompt), 0, []
    for _ in range(count):
        step = Step((Part(0, start, len(tokens)),), free=(0,) if start == 0 else ())
        logits = model.run(step, np.array(tokens), None)
        start += len(tokens)
        tokens = [int(np.argmax(logits[-1]))]
        out += tokens
    return out


def alone(model: Path, store: Path, count: int = 12) -> list[int]:
    """The answer of one rank."""
    with head(model, store) as group:
        return greedy(group.form(5), count)


def until(condition, seconds: float = 30.0):
    """What `condition` gives as soon as it is true; fails where it does not become so."""
    due_at = time.monotonic() + seconds
    while time.monotonic() < due_at:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it does not come about")
