"""Where code of a user's own is asked for something: what it raises, or gives that is of no use, goes on with its name.

Must never judge what a plug-in is for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedge.core.errors import FedgeError, StrategyError


@contextmanager
def plugged(what: str) -> Iterator[None]:
    """`what` does something. Raises StrategyError for whatever it raises, and FedgeErrors as they are."""
    try:
        yield
    except FedgeError:
        raise
    except Exception as error:  # a plug-in boundary: who, doing what, with what
        raise StrategyError(f"{what} raised {error!r}; mend it.") from error


def asked(plugin: Any, method: str, *arguments: Any) -> Any:
    """What `plugin.method(*arguments)` gives. Raises StrategyError where it raises."""
    with plugged(named(plugin, method)):
        return getattr(plugin, method)(*arguments)


def rows_asked(plugin: Any, *arguments: int) -> int:
    """What `plugin.least(*arguments)` gives. Raises StrategyError unless that is a whole number."""
    found = asked(plugin, "least", *arguments)
    if isinstance(found, bool) or not isinstance(found, int | np.integer):
        raise StrategyError(f"{named(plugin, 'least')} gave {found!r}; give a whole number of rows.")
    return int(found)


def numbers(plugin: Any, method: str, found: Any, shape: tuple[int, ...]) -> Any:
    """`found` as an array. Raises StrategyError unless it is finite numbers of that shape."""
    who = named(plugin, method)
    with plugged(who):
        array = np.asarray(found)
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise StrategyError(f"{who} gave {array.dtype} of shape {array.shape}; give numbers of shape {shape}.")
    if not np.isfinite(array).all():
        raise StrategyError(f"{who} gave NaN or infinite values; give finite numbers.")
    return array


def named(plugin: Any, method: str) -> str:
    """As sentences begin: "Median.reduce()"."""
    return f"{type(plugin).__name__}.{method}()"
