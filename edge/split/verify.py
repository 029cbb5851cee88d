"""Whether the pieces of a new bundle give what the whole model gives, on one random input.

Owns the run of both, as written and on one thread, and the comparison. Must never write a file, or take longer than it
is given: what was not compared is said.
"""

import threading
from collections.abc import Sequence
from math import inf
from pathlib import Path

import numpy as np
import onnxruntime as ort

from fedge.core.errors import CannotCut
from fedge.core.params import Array
from fedge.edge.bundle import INPUT, OUTPUT, Bundle, Piece, Tensor
from fedge.edge.split.extract import plain_session
from fedge.edge.split.graph import Graph
from fedge.edge.split.image import Image, scaled
from fedge.edge.split.skeleton import nodes_in, one_line

LIMIT_S = 30.0
ROWS = 2  # of a free batch: with one alone, an extent mistaken for the batch would go unseen
CLOSE = 1e-4  # apart, as a share of the largest value; one kernel on one thread gives the same bits
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def verify(
    model: Path, folder: Path, graph: Graph, bundle: Bundle, image: Image | None = None, limit_s: float = LIMIT_S
) -> str:
    """Compare the pieces in `folder` with the ONNX file `model` that they were cut from; what was compared, in words.

    Every tensor that pieces and model, or two pieces, have in common is compared. First come those that lead from the
    input to each cut and from there to the output. A model that does not run on random numbers, or draws some itself,
    cannot be compared. Raises CannotCut where anything differs.
    """
    if drawn := sorted({node.op_type for node in nodes_in(graph.model.graph)} & RANDOM):
        return f"not checked, as {drawn[0]} gives something else each time"
    options = ort.RunOptions()
    options.log_severity_level = 4  # what is wrong is in the error
    timer = threading.Timer(limit_s, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        known = _whole(model, graph, image, options)
        if isinstance(known, str):
            return known
        done, gap = _compared(folder, bundle, known, options)
    finally:
        timer.cancel()
    exactly = "bit for bit" if gap == 0 else f"to {gap:.1g} of the largest value"
    told = f"on one random input {done} of {len(bundle.pieces)} pieces give what the whole model gives, {exactly}"
    return told if done == len(bundle.pieces) else f"{told}; the others would take more than {limit_s:g} s"


def _whole(model: Path, graph: Graph, image: Image | None, options: ort.RunOptions) -> dict[str, Array] | str:
    """A random input and what the whole model makes of it, by tensor name; or why there is none."""
    said = ""
    for rows in (ROWS, 1):
        try:
            return _answered(model, graph, image, options, rows)
        except Exception as error:  # onnxruntime's errors have no base class but this
            said = one_line(error)
        if options.terminate:
            return "not checked, as the whole model alone takes too long"
    return f"not checked, as the whole model does not run on random numbers ({said})"


def _answered(model: Path, graph: Graph, image: Image | None, options: ort.RunOptions, rows: int) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    feeds = {name: _noise(graph.tensor(name), rows, generator) for name in graph.inputs}
    session = plain_session(str(model), model.parent)
    names = [value.name for value in session.get_inputs()]
    given = dict(feeds)
    if image is not None:
        (own,) = set(names) - feeds.keys()
        given[own] = scaled(feeds[graph.primary], image)
    outputs = [value.name for value in session.get_outputs()]
    found = session.run(outputs, {name: given[name] for name in names}, options)
    return feeds | dict(zip(outputs, found))


def _compared(folder: Path, bundle: Bundle, known: dict[str, Array], options: ort.RunOptions) -> tuple[int, float]:
    """How many pieces were compared, and the largest gap that was found."""
    largest = 0.0
    for done, piece in enumerate(_in_order(bundle.pieces)):
        try:
            session = plain_session((folder / piece.file).read_bytes(), folder)
            names = [tensor.name for tensor in piece.outputs]
            made = session.run(names, {tensor.name: known[tensor.name] for tensor in piece.inputs}, options)
        except Exception as error:  # as above
            if options.terminate:
                return done, largest
            raise CannotCut(f"{_place(piece)} cannot run where the model can ({one_line(error)}); {_REMEDY}.") from None
        for name, value in zip(names, made):
            gap = _gap(known.setdefault(name, value), value)
            if gap > CLOSE:
                raise CannotCut(f"{_place(piece)} gives another {name!r} than the whole model does; {_REMEDY}.")
            largest = max(largest, gap)
    return len(bundle.pieces), largest


_REMEDY = "name other cuts, or export the model anew with a fixed batch"


def _place(piece: Piece) -> str:
    if piece.start == INPUT and piece.end == OUTPUT:
        return "The model as one piece"
    return f"The piece from {piece.start!r} to {piece.end!r}"


def _in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """For each boundary the piece that reaches it first and the one that goes on to the output, then all others."""
    heads: dict[str, Piece] = {}
    for piece in pieces:
        heads.setdefault(piece.end, piece)
    first = [piece for piece in pieces if piece.end == OUTPUT or heads[piece.end] is piece]
    return [*first, *(piece for piece in pieces if piece not in first)]


def _noise(tensor: Tensor, rows: int, generator: np.random.Generator) -> Array:
    """Bytes over their whole range, as pictures have; floats from 0 to 1; other numbers 0 and 1, as a small table of
    embeddings still has them.
    """
    dtype = np.dtype(tensor.dtype)
    shape = [rows if extent < 0 else extent for extent in tensor.shape]
    if dtype.kind == "f":
        return generator.random(shape).astype(dtype)
    return generator.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)


def _gap(one: Array, other: Array) -> float:
    """How far apart two tensors are, as a share of the largest value; infinite where that cannot be said."""
    floats = one.dtype.kind == "f"
    if one.shape == other.shape and one.dtype == other.dtype and np.array_equal(one, other, equal_nan=floats):
        return 0.0
    if one.shape != other.shape or not floats or other.dtype != one.dtype:
        return inf
    differ = (one != other) & ~(np.isnan(one) & np.isnan(other))
    apart = np.abs(one[differ].astype(np.float64) - other[differ])
    largest = np.abs(one[np.isfinite(one)]).max(initial=0.0)
    gap = float(apart.max() / largest) if largest > 0 else inf
    return gap if np.isfinite(gap) else inf
