"""From an ONNX model to a bundle: which cuts are offered, which exits they pass, and the pieces between them.

Owns the choice and the naming of boundaries and pieces. The folder appears as a whole, its pieces compared
with the model, or not at all. Must never train,
quantise or measure: exits come calibrated from elsewhere, codings are added to the bundle later.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from fedge.core.errors import CannotCut, ModelError
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import FORMAT, INPUT, OUTPUT, Boundary, Bundle, Exit, Piece, Tensor, write
from fedge.edge.split.extract import extract, plain_session
from fedge.edge.split.graph import Cut, Graph, cut_at, open_graph
from fedge.edge.split.graph import cuts as all_cuts
from fedge.edge.split.image import Image
from fedge.edge.split.order import Line, line, needed
from fedge.edge.split.verify import verify
from fedge.edge.split.weights import write_weights

MOST_CUTS = 8  # offered where the caller names none


def export(
    model: Path,
    folder: Path,
    *,
    cuts: Sequence[str] | None = None,
    exits: Sequence[tuple[str, str]] = (),
    image: Image | None = None,
    classes: Sequence[str] = (),
    primary: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    limits: EdgeLimits = EdgeLimits(),
    on_checked: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Cut the ONNX file `model` and write the bundle into the new or empty `folder`.

    `cuts` names tensors to cut at; by default those are taken that make the data smaller than any place before, at
    most eight. `exits` are names with their logits tensors, in the order of the graph. `classes` names the outputs'
    last axis. `primary` and `shapes` are as in `open_graph`. The batch stays free where the model leaves it free.
    Before the folder appears the pieces are compared with the model on random numbers, for 30 s at most; `on_checked`
    is told in words what was compared. Raises ModelError, and CannotCut where no cut is possible or a piece differs.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{str(folder)!r} is not an empty folder; name a new one.")
    graph = open_graph(model, limits, primary=primary, shapes=shapes, image=image)
    bundle = _plan(graph, model.stem, cuts, exits, tuple(classes))
    if len(bundle.pieces) > limits.max_pieces:
        raise ModelError(f"{len(bundle.pieces)} pieces are more than the {limits.max_pieces} allowed; name fewer cuts.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as name:
            made = Path(name) / "bundle"
            (made / "pieces").mkdir(parents=True)
            bundle = _write(graph, bundle, made, limits)
            on_checked(verify(model, made, graph, bundle, image))
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except OSError as error:
        raise ModelError(f"{str(folder)!r} cannot be written ({error}); free some space or name another.") from error
    return bundle


def _plan(
    graph: Graph, name: str, wanted: Sequence[str] | None, exits: Sequence[tuple[str, str]], classes: tuple[str, ...]
) -> Bundle:
    """The bundle's description, but for what the pieces take and give."""
    logits = [tensor for _, tensor in exits]
    if len({name for name, _ in exits}) < len(exits) or len(set(logits)) < len(exits):
        raise CannotCut("Two exits share a name or a tensor; give each its own.")
    way = _way(graph, logits)
    placed = [_exit_cut(graph, tensor, logits) for tensor in logits]
    named = [cut_at(graph, each, exits=logits) for each in wanted or ()]
    for cut in [*named, *placed]:
        if behind := _left_behind(graph, way, cut, logits):
            raise CannotCut(
                f"The output {behind[0]!r} of the model lies before the cut {cut.name!r}, where no tail can give it; "
                "make it an exit, leave it out of the model, or name an earlier cut."
            )
    chosen = named if wanted is not None else _shrinking(graph, way, logits)
    between = sorted({cut.name: cut for cut in [*chosen, *placed]}.values(), key=lambda cut: cut.position)
    last = tuple(graph.tensor(each) for each in graph.outputs if each not in logits)
    if classes and last[0].shape[-1:] != (len(classes),):
        raise ModelError(f"{len(classes)} classes are named, but the output has the shape {list(last[0].shape)}.")
    boundaries = (
        Boundary(INPUT, (graph.tensor(graph.primary),), 0),
        *(Boundary(cut.name, cut.tensors, cut.position) for cut in between),
        Boundary(OUTPUT, last, len(way.order)),
    )
    leaves = tuple(Exit(each, cut.name, graph.tensor(tensor)) for (each, tensor), cut in zip(exits, placed))
    return Bundle(FORMAT, "", name, boundaries, _pieces(boundaries, leaves), {}, leaves, classes=classes)


def _left_behind(graph: Graph, way: Line, cut: Cut, logits: Sequence[str]) -> list[str]:
    """Outputs of the model, exits aside, that are made before a cut, so that only the device would have them.

    Models with further inputs, as caches, are allowed them: whoever feeds these on both sides takes outputs from both.
    """
    before = {name for node in way.order[: cut.position] for name in node.outputs}
    return [name for name in graph.outputs if name in before and name not in logits and len(graph.inputs) == 1]


def _pieces(boundaries: Sequence[Boundary], exits: Sequence[Exit]) -> tuple[Piece, ...]:
    """From each boundary to all later ones up to the next exit's, and to the output."""
    stops = {leave.boundary for leave in exits}
    pieces = []
    for first, start in enumerate(boundaries[:-1]):
        for last, end in enumerate(boundaries[first + 1 :], first + 1):
            passed = any(boundary.name in stops for boundary in boundaries[first + 1 : last])
            if passed and end.name != OUTPUT:
                continue
            names = tuple(leave.name for leave in exits if leave.boundary == end.name)
            pieces.append(Piece(f"pieces/{first:02d}-{last:02d}.onnx", start.name, end.name, (), (), names))
    return tuple(pieces)


def _exit_cut(graph: Graph, tensor: str, logits: Sequence[str]) -> Cut:
    """The last cut from which an exit's logits can be computed, of one tensor if there is any."""
    graph.tensor(tensor)
    maker = {name: node for node in graph.nodes for name in node.outputs}
    if tensor not in line(graph.nodes, graph.primary, [tensor]).data - {graph.primary}:
        raise CannotCut(f"The exit {tensor!r} does not vary with the input {graph.primary!r}; name its logits tensor.")

    def tells(cut: Cut) -> bool:
        stop = {each.name for each in cut.tensors}
        inner = [graph.nodes[index] for index in needed(maker, [tensor], stop)]
        told = graph.primary in stop or not graph.batched.isdisjoint(stop)
        probes = [node.batch and told for node in inner if node.probes(graph.primary)]
        others = {name for node in inner if not node.probes(graph.primary) for name in node.inputs}
        return graph.primary in stop or (graph.primary not in others and all(probes))

    fitting = [cut for cut in all_cuts(graph, exits=logits) if tells(cut)]
    single = [cut for cut in fitting if len(cut.tensors) == 1]
    if not fitting:
        raise CannotCut(f"No cut lies before the exit {tensor!r}; attach it further on.")
    return (single or fitting)[-1]


def _shrinking(graph: Graph, way: Line, logits: Sequence[str]) -> list[Cut]:
    """The cuts that send fewer bytes, floats as float16, than any place before; of many those that shrink most."""
    smallest = _sent_bytes([graph.tensor(graph.primary)])
    found: list[tuple[float, Cut]] = []
    for cut in all_cuts(graph, exits=logits):
        size = _sent_bytes(cut.tensors)
        if size < smallest and not _left_behind(graph, way, cut, logits):
            found.append((size / smallest, cut))
            smallest = size
    return [cut for _, cut in sorted(found, key=lambda pair: pair[0])[:MOST_CUTS]]


def _sent_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of one sample, floats as float16."""
    total = 0
    for tensor in tensors:
        dtype = np.dtype(tensor.dtype)
        width = 2 if dtype.kind == "f" else dtype.itemsize
        total += width * int(np.prod([1 if extent < 0 else extent for extent in tensor.shape], dtype=np.int64))
    return total


def _way(graph: Graph, logits: Sequence[str]) -> Line:
    way = line(graph.nodes, graph.primary, [name for name in graph.outputs if name not in logits])
    if not way.order:
        raise CannotCut(f"No output varies with the input {graph.primary!r}; name another as primary.")
    return way


def _write(graph: Graph, bundle: Bundle, folder: Path, limits: EdgeLimits) -> Bundle:
    logits = [leave.logits.name for leave in bundle.exits]
    maker = {name: node for node in graph.nodes for name in node.outputs}
    wanted = [*graph.outputs, *logits]
    read = {name for index in needed(maker, wanted) for name in graph.nodes[index].inputs} | set(wanted)
    used = (tensor for tensor in graph.model.graph.initializer if tensor.name in read)
    weights = write_weights(used, graph.folder, folder, limits)
    way = _way(graph, logits)
    made = {name: position for position, node in enumerate(way.order, 1) for name in node.outputs}
    pieces = []
    for piece in bundle.pieces:
        start = bundle.boundary(piece.start)
        outputs = _outputs(bundle, made, piece)
        model, inputs = extract(graph, start.tensors, outputs, weights)
        data = model.SerializeToString(deterministic=True)
        if len(data) > limits.max_model_bytes:
            raise ModelError(f"A piece has {len(data)} bytes of graph, {limits.max_model_bytes} are allowed.")
        plain_session(data, folder)
        (folder / piece.file).write_bytes(data)
        pieces.append(msgspec.structs.replace(piece, inputs=inputs, outputs=outputs))
    return write(folder, msgspec.structs.replace(bundle, pieces=tuple(pieces)))


def _outputs(bundle: Bundle, made: Mapping[str, int], piece: Piece) -> tuple[Tensor, ...]:
    """What a piece gives: the tensors at its end, its exits' logits, and other outputs of the model it passes."""
    start, end = bundle.boundary(piece.start).position, bundle.boundary(piece.end)
    final = bundle.boundary(OUTPUT)
    if end.name == OUTPUT:
        return tuple(tensor for tensor in final.tensors if made.get(tensor.name, final.position) > start)
    logits = [leave.logits for leave in bundle.exits if leave.name in piece.exits]
    given = {tensor.name: tensor for tensor in [*end.tensors, *logits]}
    passed = [tensor for tensor in final.tensors if start < made.get(tensor.name, final.position + 1) <= end.position]
    return tuple((given | {tensor.name: tensor for tensor in passed}).values())
