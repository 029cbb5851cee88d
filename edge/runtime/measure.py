"""What this machine needs for the pieces and codings of a bundle.

Times are minima over repeats: what else runs on the machine only ever adds to them. Owns what is run, how often and on
which data. Must never decide anything by what it finds; that is the planner's.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path

from fedge.core.errors import BadBundle, RefusedTensor
from fedge.core.params import Array
from fedge.edge.bundle import INPUT, OUTPUT, Boundary, Bundle, Piece
from fedge.edge.coding import codings
from fedge.edge.plan.profile import CodingCost, Profile, coding_key, piece_key
from fedge.edge.runtime import memory
from fedge.edge.runtime.operators import profile_operators
from fedge.edge.runtime.sessions import Runner, open_piece
from fedge.edge.runtime.tensors import check, example

Values = Mapping[str, Array]
ROUGHLY = 3  # repeats where nobody has measured


def profile_bundle(
    folder: Path,
    bundle: Bundle,
    *,
    threads: int = 1,
    repeats: int = 20,
    device: str = "",
    inputs: Values | None = None,
    cache: Path | None = None,
) -> Profile:
    """Measure every piece of the verified bundle, every operator, every coding, and the memory of every piece.

    `inputs` is one example, by tensor name. Without one it is noise, which image codings cannot compress: their sizes
    are then far too large. Memory counts private bytes and mapped weights together, since a device without room for
    both gets slow. Raises as `open_piece`; RefusedTensor where `inputs` do not fit the model, or a coding its boundary.
    """
    first = bundle.boundary(INPUT).tensors
    known: dict[str, Array] = dict(example(first) if inputs is None else inputs)
    check(first, {tensor.name: known[tensor.name] for tensor in first if tensor.name in known})
    pieces: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for piece in _in_order(bundle):
        known = example(piece.inputs) | known  # what no earlier piece gives is noise
        key, given = piece_key(piece.start, piece.end), _given(piece, known)
        with closing(open_piece(folder, bundle, piece.start, piece.end, threads=threads, cache=cache)) as runner:
            known = runner.run(given) | known
            pieces[key] = profile_piece(runner, given, repeats)
        held = memory.piece_memory(folder, bundle, piece.start, piece.end, threads=threads, cache=cache)
        sizes |= {key: held.private + held.mapped} if held else {}
    operators: list[tuple[str, float]] = []
    for piece in line(bundle):
        ends, given = (piece.start, piece.end), _given(piece, known)
        operators += profile_operators(folder, bundle, *ends, given, threads=threads, repeats=repeats, cache=cache)
    costs = {
        coding_key(boundary.name, coding): profile_coding(boundary, known, coding, repeats)
        for boundary in bundle.boundaries
        for coding in bundle.codings.get(boundary.name, {})
    }
    return Profile(device or platform.node(), bundle.version, threads, tuple(operators), pieces, costs, sizes)


def profile_roughly(bundle: Bundle, runners: Iterable[Runner], *, device: str, threads: int) -> Profile:
    """What serves whoever has no profile: seconds of open pieces and of codings, each run a few times on noise.

    Raises as `Runner.run`. A coding that does not hold noise is left out.
    """
    pieces = {
        piece_key(runner.piece.start, runner.piece.end): profile_piece(runner, example(runner.piece.inputs), ROUGHLY)
        for runner in runners
    }
    costs: dict[str, CodingCost] = {}
    for boundary in bundle.boundaries:
        for coding in bundle.codings.get(boundary.name, {}):
            with suppress(RefusedTensor):
                key, noise = coding_key(boundary.name, coding), example(boundary.tensors)
                costs[key] = profile_coding(boundary, noise, coding, ROUGHLY)
    return Profile(device, bundle.version, threads, pieces=pieces, codings=costs)


def profile_piece(runner: Runner, inputs: Values, repeats: int = 20) -> float:
    """Seconds of one run."""
    return _least(lambda: runner.run(inputs), repeats)


def profile_coding(boundary: Boundary, values: Values, coding: str, repeats: int = 20) -> CodingCost:
    """Seconds and bytes to code all tensors of a boundary. Raises RefusedTensor where the coding does not suit them."""
    coded = [codings.encode(tensor.name, values[tensor.name], coding) for tensor in boundary.tensors]

    def encode() -> object:
        return [codings.encode(tensor.name, values[tensor.name], coding) for tensor in boundary.tensors]

    def decode() -> object:
        return [codings.decode(one, tensor) for one, tensor in zip(coded, boundary.tensors)]

    return CodingCost(_least(encode, repeats), _least(decode, repeats), sum(one.size_bytes for one in coded))


def line(bundle: Bundle) -> list[Piece]:
    """The fewest pieces that lead from the input to the output. Raises BadBundle where none do."""
    order = {boundary.name: index for index, boundary in enumerate(bundle.boundaries)}
    taken: list[Piece] = []
    here = INPUT
    while here != OUTPUT:
        onward = [piece for piece in bundle.pieces if piece.start == here]
        if not onward:
            raise BadBundle(f"No piece of the bundle goes on from {here!r}; export it again.")
        taken.append(max(onward, key=lambda piece: order[piece.end]))
        here = taken[-1].end
    return taken


def _given(piece: Piece, known: Values) -> dict[str, Array]:
    return {tensor.name: known[tensor.name] for tensor in piece.inputs}


def _in_order(bundle: Bundle) -> list[Piece]:
    order = {boundary.name: index for index, boundary in enumerate(bundle.boundaries)}
    return sorted(bundle.pieces, key=lambda piece: (order[piece.start], order[piece.end]))


def _least(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(max(repeats, 1)):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)
