"""A model's graph, and the places where it falls into a head and a tail.

Liveness counts from one input, the primary one: a cut is a position in the order of operators where at most `most`
tensors that vary with it are still needed. Other inputs (masks, positions, caches) are fed to whichever side reads
them, and what is computed from them alone is computed on both. Asking for the shape of the primary input is no
dependence on it. Owns the analysis; must never read weights or write files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from fedge.core.errors import CannotCut, ModelError
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import INPUT, OUTPUT, Tensor
from fedge.edge.split.groups import fused, roots
from fedge.edge.split.image import Image, prepend
from fedge.edge.split.order import Line, Node, line
from fedge.edge.split.skeleton import captured, graphs_in, one_line, read_skeleton
from fedge.edge.split.tidy import fix, fold_shapes, same_batch, tidy


@dataclass(frozen=True)
class Graph:
    """A checked skeleton. `tensors` has what is known in full but for the first extent: -1 is the batch, -2 another.

    `batched` are the tensors whose first extent is for certain that of the primary input. `folder` holds the weights.
    """

    model: ModelProto
    folder: Path
    primary: str
    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    batched: frozenset[str]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs, the primary one among them."""
        return tuple(value.name for value in self.model.graph.input)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return tuple(value.name for value in self.model.graph.output)

    def tensor(self, name: str) -> Tensor:
        """Type and shape of a tensor. Raises CannotCut where there is none, or the graph does not tell."""
        if name not in self.tensors:
            if name not in self.inputs and not any(name in node.outputs for node in self.nodes):
                raise CannotCut(f"The graph makes no tensor {name!r}; mend the name.")
            raise CannotCut(
                f"The shape of the tensor {name!r} is unknown but for its batch; "
                "give the inputs' shapes, or export the model with fixed ones."
            )
        return self.tensors[name]


@dataclass(frozen=True)
class Cut:
    """A place to cut: what crosses it, and how many operators lie before it. Its name is its last tensor's."""

    name: str
    tensors: tuple[Tensor, ...]
    position: int


def open_graph(
    path: Path,
    limits: EdgeLimits = EdgeLimits(),
    *,
    primary: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    image: Image | None = None,
) -> Graph:
    """The checked graph in `path`; its external weights stay unread.

    `primary` names the input from which data flows (default: the first). `shapes` fixes the shapes of inputs; it is
    the one way to cut a model that has free extents beside the batch. With `image` the primary input becomes the
    picture itself. Raises ModelError.
    """
    model = read_skeleton(path, limits)
    tidy(model)
    names = [value.name for value in model.graph.input]
    if primary is not None and primary not in names:
        raise ModelError(f"The model has no input {primary!r}; it has {', '.join(names)}.")
    primary = primary or names[0]
    fix(model, shapes or {})
    if image is not None:
        primary = prepend(model, primary, image)
    _name_batch(model, primary)
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(f"The shapes of the model contradict each other ({one_line(error)}); mend it.") from None
    values = {value.name: value for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]}
    batch = _symbol(values[primary])
    rows = same_batch(model, values, batch) if batch else ()
    batched = frozenset(name for name, value in values.items() if _symbol(value) in rows)
    tensors = {name: tensor for name, value in values.items() if (tensor := _tensor(value, name in batched))}
    fold_shapes(model, tensors, batched, primary)
    nodes = tuple(_node(index, proto) for index, proto in enumerate(model.graph.node))
    return Graph(model, path.parent, primary, nodes, tensors, batched)


def cuts(graph: Graph, most: int = 2, *, exits: Sequence[str] = (), inside: bool = False) -> list[Cut]:
    """All places where at most `most` tensors cross, in O(operators + tensors), in the order of the operators.

    `exits` are logits that are no reason to keep a tensor alive. `inside` offers places within fused groups too. A
    tail that still asks for the shape of the primary input, and cannot take it from what crosses, gets that input as
    one more tensor of the cut, beyond `most`.
    """
    way = line(graph.nodes, graph.primary, [name for name in graph.outputs if name not in exits])
    grouped = set() if inside else fused(way.order, way.data)
    root = {} if inside else roots(way.order, way.data)
    found: dict[str, Cut] = {}
    for position, names in _crossing(way, graph.primary, most):
        if not names or graph.primary in names or not grouped.isdisjoint(names):
            continue
        if len({root.get(name, name) for name in names}) < len(names):
            continue
        crossing = names + _shape_source(graph, way, position, names)
        name = names[-1]
        taken = name in (INPUT, OUTPUT) or (name in found and len(found[name].tensors) <= len(crossing))
        if not taken and all(each in graph.tensors for each in crossing):
            found[name] = Cut(name, tuple(graph.tensors[each] for each in crossing), position)
    return sorted(found.values(), key=lambda cut: cut.position)


def cut_at(graph: Graph, name: str, most: int = 2, *, exits: Sequence[str] = ()) -> Cut:
    """The cut whose newest tensor is `name`, inside a fused group or not. Raises CannotCut with the reason."""
    found = {cut.name: cut for cut in cuts(graph, most, exits=exits, inside=True)}
    if name in found:
        return found[name]
    maker = {each: node for node in graph.nodes for each in node.outputs}
    way = line(graph.nodes, graph.primary, [each for each in graph.outputs if each not in exits])
    if name not in maker:
        raise CannotCut(
            f"The graph makes no tensor {name!r} outside the bodies of If, Loop and Scan; name another cut."
        )
    if name not in way.data or name not in way.uses:
        raise CannotCut(
            f"The tensor {name!r} is not on the way from {graph.primary!r} to the output; name another cut."
        )
    if name in (INPUT, OUTPUT):
        raise CannotCut(f"A cut cannot be named {name!r}, which is an end of the model; rename the tensor.")
    graph.tensor(name)
    crossing = [names for _, names in _crossing(way, graph.primary, len(way.data)) if names and names[-1] == name]
    if not crossing:
        raise CannotCut(f"No place has {name!r} as its newest tensor, as others are made with it; name one after it.")
    fewest = min(crossing, key=len)
    if graph.primary in fewest:
        raise CannotCut(f"The input {graph.primary!r} itself is still needed after {name!r}; name a later cut.")
    for each in fewest:
        graph.tensor(each)
    raise CannotCut(f"{len(fewest)} tensors cross at {name!r}, {most} are allowed; name another cut.")


def _crossing(way: Line, primary: str, most: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """For each position with at most `most` of them, the tensors made before it and read after it, the newest last."""
    left, live = dict(way.uses), {primary: None}
    for position, node in enumerate(way.order, 1):
        for name in dict.fromkeys(node.inputs):
            if name in live:
                left[name] -= 1
                if not left[name]:
                    del live[name]
        live |= dict.fromkeys(name for name in node.outputs if left.get(name))
        if len(live) <= most:
            yield position, tuple(live)


def _shape_source(graph: Graph, way: Line, position: int, names: Sequence[str]) -> tuple[str, ...]:
    """The primary input, where the tail after this position needs it to know shapes."""
    told = not graph.batched.isdisjoint(names)
    return (graph.primary,) if way.whole > position or (way.batch > position and not told) else ()


def _node(index: int, node: NodeProto) -> Node:
    inner = sorted(set().union(*(captured(body) for body in graphs_in(node))))
    span = {attribute.name: attribute.i for attribute in node.attribute} if node.op_type == "Shape" else {}
    inputs = tuple(name for name in [*node.input, *inner] if name)
    batch = span.get("start", 0) == 0 and span.get("end") == 1
    return Node(index, node.op_type, inputs, tuple(name for name in node.output if name), batch)


def _name_batch(model: ModelProto, primary: str) -> None:
    """Give a free first extent of the primary input a name where it has none, so that it is known again further on.

    Other names, which an exporter gave to what follows from the inputs, go: what is the batch is inferred anew.
    """
    batch = ""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name == primary and dims:
            if not dims[0].WhichOneof("value"):
                dims[0].dim_param = "primary batch"
            batch = dims[0].dim_param
    for value in [*model.graph.value_info, *model.graph.output]:
        if _symbol(value) not in ("", batch):
            value.type.tensor_type.shape.dim[0].ClearField("dim_param")


def _symbol(value: ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return dims[0].dim_param if dims else ""


def _tensor(value: ValueInfoProto, batched: bool) -> Tensor | None:
    """Type and shape where both are known; a free first extent is -1 if it is the batch, else -2."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.elem_type:
        return None
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    if -1 in shape[1:] or kind.elem_type == TensorProto.STRING:
        return None
    shape = shape if batched or shape[:1] != (-1,) else (-2, *shape[1:])
    return Tensor(value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape)
