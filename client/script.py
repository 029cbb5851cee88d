"""An existing training script as a client, in three lines.

    session = fedge.client.connect("127.0.0.1:7443", name="site-1", examples=len(data), layout=model)
    while (task := session.receive(model)) is not None:
        ...  # train `model` for task.steps steps, as ever
        session.send(model.state_dict(), metrics={"loss": loss})

Without torch, leave out `model` and read `task.weights`, a dict of arrays by name. Owns the way between named tensors
and the flat vector. Knows modules and tensors only by their methods, and must never import a framework.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from fedge.client.session import Session
from fedge.core.errors import RefusedUpdate, TaskSpent, TrainerError
from fedge.core.limits import Limits
from fedge.core.params import Array, Layout
from fedge.core.task import DELTA, Broadcast, Scalar, Task, Update

log = logging.getLogger("fedge")


class Module(Protocol):
    """What is needed of a model: torch.nn.Module has it."""

    def named_parameters(self) -> Iterable[tuple[str, Any]]:
        """Trainable tensors by name."""

    def named_buffers(self) -> Iterable[tuple[str, Any]]:
        """Further tensors by name."""

    def state_dict(self) -> Mapping[str, Any]:
        """All tensors by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Take all tensors over."""


@dataclass(frozen=True, slots=True)
class Received:
    """A task with the model to start from. `weights` are arrays of your own to change; `steps` is how many to train."""

    id: str
    version: int
    steps: int
    hyper: Mapping[str, Scalar]
    weights: dict[str, Array]


class Script:
    """What `connect` returns: receive and send by turns, until `receive` gives None."""

    def __init__(self, session: Session, name: str, examples: int, layout: Layout) -> None:
        self._session = session
        self._name, self._examples, self._layout = name, examples, layout
        self._work: tuple[Task, Broadcast] | None = None
        self._spent = ""  # a refusal that is no fault if the run turns out to be over
        if session.unsettled:
            self._settled(session.resend)

    @property
    def finished(self) -> str:
        """Why the run ended; empty while it goes on."""
        return self._session.finished

    def receive(self, model: Module | None = None) -> Received | None:
        """The next task, or None once the run is finished; its weights are put into `model` where given. Blocks.

        A task received before and never answered is given back. Raises what Session raises.
        """
        if self._work:
            self._session.fail(self._work[0], "The script asked for another task and sent nothing for this one.")
        self._work = self._session.receive()
        if self._spent and self._work:
            log.warning("%s", self._spent)
        self._spent = ""
        if self._work is None:
            self.close()
            return None
        task, broadcast = self._work
        weights: dict[str, Array] = dict(self._layout.unflatten(broadcast.vector.copy()))
        if model is not None:
            _load(model, weights)
        return Received(task.id, task.version, task.steps, task.hyper, weights)

    def send(
        self,
        weights: Mapping[str, Any] | Module,
        *,
        metrics: Mapping[str, float] | None = None,
        steps: int | None = None,
    ) -> bool:
        """Send what training made of the weights received; whether it counts (a refusal is logged). Blocks.

        `weights` are arrays or tensors by name, or the model. `steps` is how many were done, where not those asked.
        Raises TrainerError where no task is held, ModelError where a name or shape differs.
        """
        if self._work is None:
            raise TrainerError("There is no task to answer; call receive() before send().")
        task, broadcast = self._work
        local = self._layout.flatten(_arrays(weights))
        update = Update(
            client=self._name,
            task_id=task.id,
            base_version=task.version,
            steps=task.steps if steps is None else steps,
            examples=self._examples,
            blobs={DELTA: broadcast.vector - local},
            metrics={key: float(value) for key, value in (metrics or {}).items()},
        )
        return self._settled(lambda: self._session.send(update))

    def close(self) -> None:
        """Leave the run. May be called twice."""
        self._session.close()

    def __enter__(self) -> "Script":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _settled(self, send: Callable[[], bool]) -> bool:
        self._work = None
        try:
            send()
        except RefusedUpdate as error:
            sentence = f"an update was refused ({error.reason}): {error}"
            if isinstance(error, TaskSpent):
                self._spent = sentence
            else:
                log.warning("%s", sentence)
            return False
        return True


def connect(
    address: str,
    name: str,
    *,
    examples: int,
    layout: Layout | Module | Mapping[str, Any],
    folder: str | Path | None = None,
    limits: Limits | None = None,
) -> Script:
    """Join the coordinator at "host:port" as the client `name`, which has `examples` training examples.

    `layout` tells the order and shapes of the tensors: the model itself, its weights by name, or a Layout. `folder`
    keeps what must survive a restart. Raises ModelError (another model, or none), RefusedClient, DataError and
    AddressError (nobody answers).
    """
    known = layout_of(layout)
    session = Session(
        address, name, examples=examples, layout=known, folder=Path(folder) if folder else None, limits=limits
    )
    return Script(session, name, examples, known)


def layout_of(model: Layout | Module | Mapping[str, Any]) -> Layout:
    """The layout of a model: what is trained, then frozen parameters and float buffers; counters stay what they are.

    Of weights by name, all float ones count as parameters: a model with batch norm must be given as itself.
    """
    if isinstance(model, Layout):
        return model
    arrays = _arrays(model)
    floats = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
    if isinstance(model, Mapping):
        return Layout.of(floats)
    parameters = dict(model.named_parameters())
    trained = {name: floats[name] for name, tensor in parameters.items() if getattr(tensor, "requires_grad", True)}
    frozen = {name: floats[name] for name in parameters if name not in trained}
    tied = floats.keys() - parameters.keys() - {name for name, _ in model.named_buffers()}  # second names of tensors
    whole = {**trained, **frozen, **{name: array for name, array in floats.items() if name not in tied}}
    rest = {name: array for name, array in arrays.items() if name not in floats}
    shapes = tuple(array.shape for array in whole.values())
    return Layout(tuple(whole), shapes, sum(array.size for array in trained.values()), rest)


def _arrays(weights: Mapping[str, Any] | Module) -> dict[str, Array]:
    named = weights if isinstance(weights, Mapping) else weights.state_dict()
    return {name: _array(value) for name, value in named.items()}


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):  # a tensor, perhaps on another device, perhaps of a type NumPy has not
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).cpu().numpy()
    return np.asarray(value)


def _load(model: Module, weights: Mapping[str, Array]) -> None:
    state = dict(model.state_dict())
    for name, array in weights.items():
        state[name] = state[name].new_tensor(array)
    model.load_state_dict(state)
