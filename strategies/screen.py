"""The screen: what an update must be before any strategy sees it. It changes nothing and keeps nothing.

Checks, in this order, the manifest, the report (steps, timings, metrics), that every value is finite, the norm, and
the count of examples; who sent it, for which task, its size and its hash were checked before it became an `Update`.
Owns no limit (they are in core/limits.py). Must never mend an update: it passes as it is or is refused.
"""

from collections.abc import Mapping
from math import isfinite, sqrt

import numpy as np

from fedge.core.errors import BadExamples, BadReport, NormTooLarge, NotFinite, WrongManifest
from fedge.core.limits import Limits
from fedge.core.params import Array
from fedge.core.task import DELTA, Update


def screen(update: Update, size: int, blobs: frozenset[str], limits: Limits) -> float:
    """The Euclidean norm of the delta of an update that may count.

    `size` is d; `blobs` are the names of the vectors that every update carries beside the delta. Raises the leaf of
    RefusedUpdate that names what is wrong.
    """
    _manifest(update.blobs, size, blobs, limits)
    _report(update, limits)
    norms = {name: _norm(name, blob, limits.max_update_norm) for name, blob in update.blobs.items()}
    if not _whole(update.examples, limits.max_examples):
        raise BadExamples(f"examples must be a whole number from 1 to {limits.max_examples}, not {update.examples!r}.")
    return norms[DELTA]


def _manifest(blobs: Mapping[str, Array], size: int, further: frozenset[str], limits: Limits) -> None:
    for name in (DELTA, *sorted(further)):
        if name not in blobs:
            raise WrongManifest(f"The update has no blob {name!r}; use the client hooks of this federation.")
    if len(blobs) > limits.max_blobs:
        raise WrongManifest(f"The update has {len(blobs)} blobs where {limits.max_blobs} are allowed.")
    for name, blob in blobs.items():
        if name != DELTA and name not in further:
            raise WrongManifest(f"Blob {name!r} is none that this federation asks for; use its client hooks.")
        if not isinstance(blob, np.ndarray) or blob.dtype != np.float32 or blob.shape != (size,):
            found = f"{blob.dtype} {blob.shape}" if isinstance(blob, np.ndarray) else type(blob).__name__
            raise WrongManifest(f"Blob {name!r} must be float32 ({size},), not {found}; use the same model code.")


def _report(update: Update, limits: Limits) -> None:
    if not _whole(update.steps, limits.max_steps):
        raise BadReport(f"steps must be a whole number from 1 to {limits.max_steps}, not {update.steps!r}.")
    for what, values, least in (("timing", update.timings, 0.0), ("metric", update.metrics, -float("inf"))):
        if len(values) > limits.max_metadata_items:
            raise BadReport(f"The update has {len(values)} {what}s where {limits.max_metadata_items} are allowed.")
        for name, value in values.items():
            if not isinstance(name, str) or len(name.encode(errors="replace")) > limits.max_name_bytes:
                raise BadReport(f"A {what} has a name longer than {limits.max_name_bytes} bytes, or none.")
            if not _real(value) or value < least:
                raise BadReport(f"The {what} {name!r} must be a finite number, not {value!r}.")


def _norm(name: str, blob: Array, most: float) -> float:
    with np.errstate(all="ignore"):
        squares = float(np.dot(blob, blob))
    # A sum that is not finite has either met such a value or only grown too large: worth the second look.
    if not isfinite(squares) and not np.isfinite(blob).all():
        raise NotFinite(f"Blob {name!r} holds a NaN or an infinity; the local training diverged.")
    if not isfinite(squares) or squares > most * most:
        norm = sqrt(squares) if isfinite(squares) else float("inf")
        raise NormTooLarge(f"Blob {name!r} has a norm of {norm:.3g} where {most:.3g} is allowed.")
    return sqrt(squares)


def _whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
