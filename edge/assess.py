"""What a bundle is worth on held-out samples: exits calibrated, thresholds chosen, every coding's accuracy and bytes.

Thresholds flatter themselves on the samples that chose them, so where there are enough they are chosen on one half, and
what is told of the exits is of the other.

Owns the runs over the samples and the new description of the bundle. For its figures to mean anything it must never see
the samples that a model was trained on, nor those of the final test.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from fedge.core.errors import DataError, ExperimentError, RefusedTensor
from fedge.core.params import Array
from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, OUTPUT, Boundary, Bundle, Exit, Sent
from fedge.edge.coding import codings
from fedge.edge.exits.calibrate import choose_thresholds, evaluate, temperature
from fedge.edge.exits.rules import check_rule, naming
from fedge.edge.runtime.sessions import Runner, open_piece
from fedge.edge.runtime.tensors import check

IMAGE_CODINGS = ("raw", "png", "jpeg95", "jpeg90", "jpeg75")
FLOAT_CODINGS = ("raw", "f16", "u8+zstd", "u8c@99.9+zstd")
OTHER_CODINGS = ("raw", "raw+zstd")
EXACT = ("raw", "raw+zstd", "png")
LEAST = 1e-9  # what a mean over samples may be off
ENOUGH = 200  # samples from which on exits are calibrated on one half and measured on the other
BATCH = 32  # samples at a time where the model's batch is free

Judge = Callable[[Array, Array], Array]


def same_class(output: Array, truth: Array) -> Array:
    """Which of the samples' logits [n, C >= 2] name the class [n], or the class that other logits [n, C] name.

    Those that are NaN name none.

    Raises DataError where the output names no class, or the truth is neither.
    """
    if not _names(output):
        raise DataError(
            f"The model's output has the shape {list(output.shape)} and names no class of each sample; "
            "go without held-out data, or call assess with a judge of your own."
        )
    right: Array = (output.argmax(axis=1) == _classes(output, truth)) & naming(output)
    return right


def _names(output: Array) -> bool:
    """Whether these are logits [n, C >= 2]."""
    return output.ndim == 2 and output.shape[1] >= 2


def _classes(output: Array, truth: Array) -> Array:
    """The classes [n] that the truth names for an output [n, C]."""
    if truth.shape == output.shape:
        named: Array = truth.argmax(axis=1)
        return named
    count, most = output.shape
    if truth.shape != (count,) or truth.dtype.kind not in "iu":
        raise DataError(f"Labels are {truth.dtype} {list(truth.shape)}; give one whole number per sample, [{count}].")
    if truth.min() < 0 or truth.max() >= most:
        raise DataError(f"Labels go from {truth.min()} to {truth.max()}, the output has {most} classes; mend them.")
    return truth


@dataclass(slots=True)
class _Seen:
    """What the samples left behind, one entry per batch: logits of the exits, outputs, and what each coding gave."""

    exits: dict[str, list[Array]] = field(default_factory=dict)
    outputs: list[Array] = field(default_factory=list)
    right: dict[tuple[str, str], list[Array]] = field(default_factory=dict)
    sizes: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    unfit: set[tuple[str, str]] = field(default_factory=set)


def assess(
    folder: Path,
    x: Array,
    y: Array | None = None,
    *,
    lose: float = 0.01,
    rule: str = "confidence",
    tried: Mapping[str, Sequence[str]] | None = None,
    judge: Judge = same_class,
) -> Bundle:
    """Measure the bundle in `folder` on samples `x` [n, ...] with the truth `y` [n, ...], and describe it anew.

    The exits' thresholds are the lowest with which, surely enough, at most `lose` of the full model's accuracy is lost;
    without `y`, with which at most so many answers differ from the full model's. Of 200 samples or more a random half
    chooses temperatures and thresholds, and the exits' shares and accuracies are those of the other half (`halves`); of
    fewer all do both. Codings have no settings to choose, and are measured on all. `tried` names the codings of a
    boundary; by default a few that suit its type. `judge(outputs [n, ...], truth) -> [n]` in [0, 1] says how right an
    answer is, the truth being `y` or the full model's outputs. An exit with other logits than the output, such as a
    prefilter, keeps its settings. The bundle's version changes, so deploy it again.

    Raises DataError where there is no sample, or the judge can say nothing of the outputs or the truth; RefusedTensor
    where samples do not fit the model or a coding is none, ExperimentError where `lose` is outside [0, 1], there is
    no such `rule`, or `tried` names no boundary.
    """
    bundle = bundles.load(folder)
    _check(bundle, x, y, lose)
    check_rule(rule)
    wanted = _wanted(bundle, tried or {})
    seen = _run(folder, bundle, x, y, wanted, judge)
    measured = {
        name: {coding: Sent(float(np.mean(np.concatenate(seen.right[name, coding]))), _mean(seen.sizes[name, coding]))
               for coding in named if (name, coding) not in seen.unfit}
        for name, named in wanted.items()
    }  # fmt: skip
    exits = _calibrated(bundle, seen, y, lose, rule) if bundle.exits else ()
    return bundles.write(folder, msgspec.structs.replace(bundle, codings=measured, exits=exits, rule=rule))


def halves(count: int) -> tuple[Array, Array]:
    """Of so many samples those that choose the exits' settings, and those that the exits' figures are of.

    Always the same ones. All are both where there are fewer than ENOUGH.
    """
    order = np.random.default_rng(0).permutation(count)
    return (order, order) if count < ENOUGH else (order[: count // 2], order[count // 2 :])


def offer(folder: Path, which: Callable[[Boundary], Sequence[str]] | None = None) -> Bundle:
    """Let every boundary of the bundle in `folder` be sent in the codings that `which` gives, their effect unknown.

    By default in those that change nothing, so no sample is needed to know that they do no harm. Raises BadBundle.
    """
    bundle = bundles.load(folder)
    offered = {
        boundary.name: dict.fromkeys((which or lossless)(boundary), Sent()) for boundary in bundle.boundaries[:-1]
    }
    return bundles.write(folder, msgspec.structs.replace(bundle, codings=offered))


def _wanted(bundle: Bundle, tried: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The codings to measure at each boundary."""
    names = [boundary.name for boundary in bundle.boundaries[:-1]]
    if unknown := [name for name in tried if name not in names]:
        raise ExperimentError(f"Nothing can be sent at {unknown[0]!r}; the bundle has {', '.join(names)}.")
    for coding in (coding for several in tried.values() for coding in several):
        codings.check(coding)
    return {one.name: tuple(tried.get(one.name, suited(one))) for one in bundle.boundaries[:-1]}


def _check(bundle: Bundle, x: Array, y: Array | None, lose: float) -> None:
    if not x.ndim or not len(x):
        raise DataError("There is no held-out sample; give some that the model was not trained on.")
    if y is not None and len(y) != len(x):
        raise DataError(f"There are {len(x)} samples and {len(y)} answers; give one answer per sample.")
    if not 0 <= lose <= 1:
        raise ExperimentError(f"{lose} is no share of answers that may be lost; give one from 0 to 1.")
    tensors = bundle.boundary(INPUT).tensors
    if len(tensors) > 1:
        raise DataError("The model has several inputs; only models with one can be assessed.")
    size, fixed = _batch(bundle), max(0, *tensors[0].shape[:1], 0)
    check(tensors, {tensors[0].name: x[: fixed or 1]})
    if fixed and len(x) % size:
        raise DataError(f"The model takes {size} samples at a time; give a multiple of it.")


def _batch(bundle: Bundle) -> int:
    """Samples at a time: many where the batch leads every tensor, else as many as the input says, one if it is free."""
    if all(_batched(boundary) for boundary in bundle.boundaries):
        return BATCH
    return max(1, *bundle.boundary(INPUT).tensors[0].shape[:1])


def _batched(boundary: Boundary) -> bool:
    """Whether the first extent of every tensor is the batch, and no other free extent."""
    return all(tensor.shape[:1] == (-1,) for tensor in boundary.tensors)


def suited(boundary: Boundary) -> Sequence[str]:
    """Codings that suit the tensors of a boundary."""
    if len(boundary.tensors) == 1 and boundary.tensors[0].dtype == "uint8" and boundary.tensors[0].shape[3:] == (3,):
        return IMAGE_CODINGS
    floats = all(tensor.dtype.startswith("float") for tensor in boundary.tensors)
    return FLOAT_CODINGS if floats else OTHER_CODINGS


def lossless(boundary: Boundary) -> Sequence[str]:
    """Those of `suited` that give the tensors back as they were."""
    exact = tuple(coding for coding in suited(boundary) if coding in EXACT)
    return exact if "png" in exact else (*exact, *(coding for coding in OTHER_CODINGS if coding not in exact))


class _Line:
    """The pieces that are needed to reach every boundary, and to go to the end from it."""

    def __init__(self, folder: Path, bundle: Bundle, stack: ExitStack) -> None:
        self._open: dict[tuple[str, str], Runner] = {}
        self._folder, self._bundle, self._stack = folder, bundle, stack

    def run(self, start: str, end: str, values: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors at `end`, and the logits of exits on the way."""
        if (start, end) not in self._open:
            runner = open_piece(self._folder, self._bundle, start, end)
            self._stack.callback(runner.close)
            self._open[start, end] = runner
        return self._open[start, end].run(values)


def _run(
    folder: Path, bundle: Bundle, x: Array, y: Array | None, wanted: Mapping[str, Sequence[str]], judge: Judge
) -> _Seen:
    seen = _Seen()
    tensor = bundle.boundary(INPUT).tensors[0]
    size = _batch(bundle)
    with ExitStack() as stack:
        pieces = _Line(folder, bundle, stack)
        for at in range(0, len(x), size):
            reached = _walk(pieces, bundle, {tensor.name: x[at : at + size]}, seen)
            truth = seen.outputs[-1] if y is None else y[at : at + size]
            for name, named in wanted.items():
                for coding in (one for one in named if (name, one) not in seen.unfit):
                    _send(pieces, bundle, name, coding, reached[name], truth, judge, seen)
    return seen


def _walk(pieces: _Line, bundle: Bundle, values: dict[str, Array], seen: _Seen) -> dict[str, dict[str, Array]]:
    """The tensors at every boundary; logits of exits and the output go to `seen`."""
    leaves = {leave.boundary: leave for leave in bundle.exits}
    reached, start = {INPUT: values}, INPUT
    for boundary in bundle.boundaries[1:]:
        found = pieces.run(start, boundary.name, reached[start])
        reached[boundary.name] = {tensor.name: found[tensor.name] for tensor in boundary.tensors}
        if boundary.name in leaves:
            start = boundary.name
            for leave in bundle.exits:
                if leave.logits.name in found:
                    seen.exits.setdefault(leave.name, []).append(found[leave.logits.name])
    seen.outputs.append(_output(bundle, reached[OUTPUT]))
    return reached


def _output(bundle: Bundle, values: Mapping[str, Array]) -> Array:
    return values[bundle.boundary(OUTPUT).tensors[0].name]


def _send(
    pieces: _Line,
    bundle: Bundle,
    name: str,
    coding: str,
    values: Mapping[str, Array],
    truth: Array,
    judge: Judge,
    seen: _Seen,
) -> None:
    """Code each sample by itself, as a device would, and let the tail answer what comes out of it."""
    tensors = bundle.boundary(name).tensors
    count = len(next(iter(values.values())))
    parts = [slice(at, at + 1) for at in range(count)] if _batched(bundle.boundary(name)) else [slice(None)]
    decoded: dict[str, list[Array]] = {tensor.name: [] for tensor in tensors}
    try:
        for part in parts:
            coded = [codings.encode(tensor.name, values[tensor.name][part], coding) for tensor in tensors]
            seen.sizes.setdefault((name, coding), []).append(sum(one.size_bytes for one in coded))
            for one, tensor in zip(coded, tensors):
                decoded[tensor.name].append(codings.decode(one, tensor))
    except RefusedTensor:  # these values do not fit the coding: it is not offered
        seen.unfit.add((name, coding))
        return
    found = pieces.run(name, OUTPUT, {key: np.concatenate(rows) for key, rows in decoded.items()})
    right = np.asarray(judge(_output(bundle, found), truth), np.float64)
    seen.right.setdefault((name, coding), []).append(right)


def _mean(sizes: Sequence[int]) -> float:
    return float(np.mean(sizes))


def _calibrated(bundle: Bundle, seen: _Seen, y: Array | None, lose: float, rule: str) -> tuple[Exit, ...]:
    """The exits with temperatures, thresholds, and what they did. Those of other classes than the output's stay."""
    final = np.concatenate(seen.outputs)
    found = {name: np.concatenate(parts) for name, parts in seen.exits.items()}
    kin = [leave for leave in bundle.exits if _names(final) and found[leave.name].shape == final.shape]
    if not kin:
        return bundle.exits
    truth = np.asarray(_classes(final, final if y is None else y), np.int64)
    places = {boundary.name: boundary.position for boundary in bundle.boundaries}
    work = [*(float(places[leave.boundary]) for leave in kin), float(places[OUTPUT])]

    def of(rows: Array) -> tuple[list[Array], Array, Array | None]:
        return [found[leave.name][rows] for leave in kin], final[rows], None if y is None else truth[rows]

    choosing, telling = halves(len(final))
    logits, last, labels = of(choosing)
    full = 1.0 if labels is None else float(np.mean(last.argmax(axis=1) == labels))
    heats = [temperature(one, truth[choosing]) for one in logits]
    wanted = max(full - lose - LEAST, 0.0)
    chosen = choose_thresholds(logits, last, labels, wanted=wanted, temperatures=heats, work=work, rule=rule)
    outcome = evaluate(*of(telling), rule=rule, temperatures=heats, thresholds=chosen.thresholds, work=work)
    chosen = replace(chosen, outcome=outcome)
    return _beside(bundle.exits, {leave.name: leave for leave in chosen.put(kin)})


def _beside(exits: tuple[Exit, ...], calibrated: Mapping[str, Exit]) -> tuple[Exit, ...]:
    """The calibrated exits in their places. They share what the others, which were not measured here, leave over."""
    rest = max(0.0, 1.0 - sum(leave.share for leave in exits if leave.name not in calibrated))
    return tuple(
        msgspec.structs.replace(calibrated[leave.name], share=rest * calibrated[leave.name].share)
        if leave.name in calibrated
        else leave
        for leave in exits
    )
