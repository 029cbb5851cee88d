"""What an attacker knows when its client is about to send, and what an attack may be.

An attack is tried out in simulations and in the tests of whoever deploys a coordinator, as strongly as papers assume:
it sees what the honest clients send and may ask the very rule it is up against. All vectors are deltas, base - local.

Owns these words and the one way in which a true update becomes a hostile one. Must never hold an attack.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import FedgeError, StrategyError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA, Update


@dataclass(frozen=True, slots=True)
class Scene:
    """The moment before a hostile client sends; vectors are float32 [d] and read-only.

    `own` is what it would send in truth. `honest` holds the newest update of every honest client, finished or still
    under way, in a fixed order; where the attack is not omniscient, or nobody is known yet, `own` alone. `byzantine`
    (f) of all `clients` (N) are hostile. `aggregate` is the rule in use, on rows: those of `honest` and f hostile ones
    behind them; it raises a FedgeError where the rule refuses them, and is None where no rule is known.

    `past` holds the first update of `own`'s client, once there has been one. `lead` is what the first of the hostile
    clients to train on the newest version made of it. `seed` is the same for all of them on the same version, `client`
    is one's own name.
    """

    own: Vector
    honest: Sequence[Vector]
    byzantine: int = 1
    clients: int = 2
    aggregate: Callable[[Sequence[Vector]], Vector] | None = None
    past: Sequence[Vector] = ()
    lead: Vector | None = None
    seed: int = 0
    client: str = ""


class Attack(Protocol):
    """What a hostile client sends in place of its update. `omniscient`: it looks at `honest` or `aggregate`."""

    omniscient: ClassVar[bool]

    def forge(self, scene: Scene) -> Vector:
        """The delta to send, [d]; nothing in the scene may be changed."""


@runtime_checkable
class Poisons(Protocol):
    """An attack on the examples that a hostile client trains on."""

    def poison(self, x: Array, y: NDArray[np.int64], classes: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
        """What becomes of one client's examples x [n, ...] with labels y [n] in 0 .. classes - 1; new arrays."""


@runtime_checkable
class Lies(Protocol):
    """An attack on what an update says about itself."""

    def lie(self, update: Update) -> Update:
        """The update with other metadata."""


@runtime_checkable
class Fussy(Protocol):
    """An attack that cannot do with any number of honest clients."""

    def check(self, honest: int) -> None:
        """Raises ExperimentError where so many will not do."""


def misled(attack: Any, scene: Scene, update: Update) -> Update:
    """What is sent in place of `update`. Raises StrategyError where the attack raises, or forges no vector [d]."""
    name = type(attack).__name__
    try:
        forged = np.asarray(attack.forge(scene), np.float32)
        sent = dataclasses.replace(update, blobs={**update.blobs, DELTA: forged})
        sent = attack.lie(sent) if isinstance(attack, Lies) else sent
    except FedgeError:
        raise
    except Exception as error:  # a plug-in boundary: whose, and what it was doing
        raise StrategyError(f"Attack {name} raised {error!r} for {update.client}; mend it.") from error
    if forged.shape != scene.own.shape:
        raise StrategyError(f"Attack {name} forged shape {forged.shape} for {update.client}, not {scene.own.shape}.")
    return sent
