"""Exits for a model: trained on its own states, calibrated and judged on text that training has not seen.

    found = train_exits(folder, text, (10, 20), Path("exits.safetensors"), effort=Effort(seconds=120))

The text should be of the kind that the model will write. Where there is none, the model writes it (`generate`). Of the
sequences a fifth is held out: one half of it chooses temperatures and thresholds, the other says what they lead to.
Owns the order of these steps. Must never be imported by a device: it needs torch when it is called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedge.core.errors import DataError, ExperimentError
from fedge.core.lanes import plain_products
from fedge.core.params import Array
from fedge.core.random import generator
from fedge.edge.exits.calibrate import calibration_error, temperature
from fedge.edge.llm.collab import exits as exit_files
from fedge.edge.llm.collab.exits import Exit, Exits, Figures, logits
from fedge.edge.llm.collab.teacher import Teacher, pieces, teacher
from fedge.edge.llm.collab.thresholds import Seen, compact, row, table, threshold_for
from fedge.edge.llm.models.folder import EMBEDDING, HEAD, NORM, Folder, open_folder
from fedge.edge.llm.models.tokenizer import Tokenizer
from fedge.edge.llm.ranks.pointwise import rms_norm

if TYPE_CHECKING:
    from fedge.edge.llm.collab.fit import Effort

Progress = Callable[[str, float], None]
FEWEST = 10  # sequences: eight to learn from, and one for each half of what is held out
HELD_OUT = 0.2
JUDGED = 4096  # positions of each half, at most
_ROWS = 256  # whose logits are in memory at a time


@dataclass(frozen=True, slots=True, eq=False)
class _Half:
    """Held-out positions: `states` [n, hidden] of each exit, `final` [n, hidden] normalised, and the model's tokens."""

    states: tuple[Array, ...]
    tokens: Array


def train_exits(
    folder: Path,
    text: str,
    layers: Sequence[int],
    out: Path,
    *,
    effort: "Effort",
    generate: int = 0,
    agreement: float = 0.98,
    seed: int = 0,
    progress: Progress | None = None,
) -> Exits:
    """Train an exit after each of `layers` and write them to `out`.

    `generate` sequences of the model's own are added to the text. The threshold, the same for all exits, is the lowest
    that keeps this `agreement` with the full model; the last row of the table says what it leads to, the others what
    other thresholds do. `progress` is told what is going on, and its share from 0 to 1. With steps instead of seconds,
    the same seed gives the same exits on one machine. Raises ExperimentError for layers or settings that cannot be,
    DataError for a text that is too short, ModelError.
    """
    from fedge.edge.llm.collab.fit import Lesson, fit

    tell = progress or (lambda _, __: None)
    with open_folder(folder) as opened:
        start = exit_files.untrained(opened, tuple(layers))
        _check(generate, agreement, effort)
        with teacher(opened, start.layers) as model:
            sequences = _sequences(model, folder, text, generate, seed, tell)
            groups = [_states(model, opened, group, tell) for group in divide(sequences, seed)]
        head = opened.tensor(EMBEDDING if opened.config.tied else HEAD)
    learning, choosing, judging = groups
    lesson = Lesson(learning[:-1], learning[-1], head, start.eps)
    trained = fit(start.exits, lesson, effort, seed, lambda share: tell("train", share))
    halves = [_half(group, head, seed) for group in (choosing, judging)]
    found = _calibrated(replace(start, exits=trained), halves, head, agreement, tell)
    exit_files.save(out, found)
    return found


def _check(generate: int, agreement: float, effort: "Effort") -> None:
    """Raises ExperimentError."""
    if generate < 0 or not 0 < agreement <= 1:
        raise ExperimentError(
            f"{generate} sequences and agreement {agreement} cannot be; name 0 or more, and above 0 up to 1."
        )
    long = effort.steps if effort.seconds is None else effort.seconds
    if not 0 < long < float("inf") or min(effort.tokens, effort.threads) < 1:
        raise ExperimentError(f"No exit is trained in {long} with {effort.tokens} tokens a step; give more of all.")


def _sequences(model: Teacher, folder: Path, text: str, generate: int, seed: int, tell: Progress) -> list[list[int]]:
    """What there is to learn from. Raises DataError."""
    found = []
    if text:
        found = pieces(Tokenizer(folder).encode(text, special=False), model.config.bos, model.span)
    if generate:
        found += model.write(generate, seed, lambda done, count: tell("write", done / count))
    if len(found) < FEWEST:
        raise DataError(
            f"There are {len(found)} sequences of {model.span} tokens to learn from, {FEWEST} are needed; "
            "give a longer text, or let the model write more."
        )
    return found


def divide(sequences: list[list[int]], seed: int) -> list[list[list[int]]]:
    """To learn from, to choose by, and to judge by."""
    order = generator(seed, "held out").permutation(len(sequences))
    half = max(1, round(len(sequences) * HELD_OUT / 2))
    cuts = [order[2 * half :], order[:half], order[half : 2 * half]]
    return [[sequences[at] for at in cut] for cut in cuts]


def _states(model: Teacher, folder: Folder, sequences: list[list[int]], tell: Progress) -> list[Array]:
    """States [n, hidden] of each exit, and last those of the end, normalised as the head is given them."""
    found = model.states_of(sequences, lambda done, count: tell("states", done / count))
    found[-1] = rms_norm(found[-1], folder.tensor(NORM), folder.config.eps)
    return found


@plain_products
def _half(group: list[Array], head: Array, seed: int) -> _Half:
    """At most JUDGED of the positions."""
    n = len(group[-1])
    chosen = np.sort(generator(seed, "judged").permutation(n)[:JUDGED])
    *states, final = (one[chosen] for one in group)
    tokens = [(final[at : at + _ROWS] @ head.T).argmax(axis=1) for at in range(0, len(chosen), _ROWS)]
    return _Half(tuple(states), np.concatenate(tokens))


def _calibrated(found: Exits, halves: Sequence[_Half], head: Array, agreement: float, tell: Progress) -> Exits:
    """The exits with temperatures and thresholds chosen by the first half, and figures of the second."""
    choosing, judging = halves
    zeros = np.zeros(len(choosing.tokens), np.int64)
    raw, _ = _look(found, choosing, head)
    warm = [replace(one, temperature=temperature(few, zeros)) for one, few in zip(found.exits, raw, strict=True)]
    tell("calibrate", 0.3)
    found = replace(found, exits=tuple(warm))
    _, seen = _look(found, choosing, head)
    tell("calibrate", 0.6)
    bar = threshold_for(seen, agreement)
    few, judged = _look(found, judging, head)
    tell("calibrate", 1.0)
    exits = tuple(
        replace(one, threshold=bar, figures=_figures(one, logits_, sure))
        for one, logits_, sure in zip(found.exits, few, judged.agrees, strict=True)
    )
    return replace(found, exits=exits, table=(*table(judged), row(judged, [bar] * len(exits))))


def _figures(one: Exit, few: Array, agrees: Array) -> Figures:
    """Of logits that have been divided by the temperature already."""
    zeros = np.zeros(len(few), np.int64)
    before = calibration_error(few, zeros, 1 / one.temperature)
    return Figures(before, calibration_error(few, zeros), float(agrees.mean()))


@plain_products
def _look(found: Exits, half: _Half, head: Array) -> tuple[list[Array], Seen]:
    """The compact logits of each exit, and what they all say."""
    kept: list[list[Array]] = [[] for _ in found.exits]
    sure: list[list[Array]] = [[] for _ in found.exits]
    agrees: list[list[Array]] = [[] for _ in found.exits]
    for at in range(0, len(half.tokens), _ROWS):
        tokens = half.tokens[at : at + _ROWS]
        for number, one in enumerate(found.exits):
            said = logits(one, half.states[number][at : at + _ROWS], lambda z: z @ head.T, found.eps)
            kept[number].append(compact(said, tokens))
            top = said.max(axis=1, keepdims=True)
            sure[number].append(1 / np.exp(said - top).sum(axis=1, dtype=np.float64))
            agrees[number].append(said.argmax(axis=1) == tokens)
    seen = Seen(np.stack([np.concatenate(one) for one in sure]), np.stack([np.concatenate(one) for one in agrees]))
    return [np.concatenate(one) for one in kept], seen
