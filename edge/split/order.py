"""The order in which a graph's operators are cut, and which of them vary with the primary input.

Owns the walks over nodes: forwards for what depends on the input, backwards for what outputs need, and one order of
the operators in which branches to side outputs run as soon as they can. Must know nothing of ONNX files.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """An operator: its place in the file, kind, the tensors it reads (in its bodies too) and makes.

    `batch` marks a Shape that reads nothing but the first extent.
    """

    index: int
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch: bool = False

    def probes(self, primary: str) -> bool:
        """Whether it only asks how large the primary input is."""
        return self.op in ("Shape", "Size") and self.inputs == (primary,)


@dataclass(frozen=True)
class Line:
    """The operators that vary with the primary input and are needed, in order; positions count them from 1.

    `data` are the tensors that vary, `uses` says how many operators read each. Beyond the positions `whole` and
    `batch` no operator asks for the primary input's shape, and for its first extent alone.
    """

    order: tuple[Node, ...]
    data: frozenset[str]
    uses: Mapping[str, int]
    whole: int
    batch: int


def line(nodes: Sequence[Node], primary: str, outputs: Sequence[str]) -> Line:
    """The line from `primary` to `outputs`; what none of them needs is left out."""
    maker = {name: node for node in nodes for name in node.outputs}
    living = needed(maker, outputs)
    data = {primary}
    for node in nodes:
        if node.index in living and not node.probes(primary) and not data.isdisjoint(node.inputs):
            data |= set(node.outputs)
    varying = [node for node in nodes if node.index in living and not data.isdisjoint(node.outputs)]
    first = next((name for name in outputs if name in data), primary)
    order = _eager(varying, needed(maker, [first]))
    uses: dict[str, int] = {}
    for node in order:
        for name in set(node.inputs) & data:
            uses[name] = uses.get(name, 0) + 1
    constant = [node for node in nodes if node.index in living and data.isdisjoint(node.outputs)]
    whole, batch = _probed(constant, order, primary, outputs)
    return Line(tuple(order), frozenset(data), uses, whole, batch)


def needed(maker: Mapping[str, Node], outputs: Iterable[str], stop: Collection[str] = ()) -> set[int]:
    """The indices of the nodes that `outputs` need, walking back no further than the tensors in `stop`."""
    found: set[int] = set()
    stack = [name for name in outputs if name not in stop]
    while stack:
        node = maker.get(stack.pop())
        if node is not None and node.index not in found:
            found.add(node.index)
            stack += [name for name in node.inputs if name not in stop]
    return found


def _eager(varying: Sequence[Node], backbone: Collection[int]) -> list[Node]:
    """The nodes of the backbone as they stand in the file, all others as soon as what they read is there.

    Those that read the input alone come first: at the end of the file they would keep it alive across every cut.
    """
    makers = {name: node.index for node in varying for name in node.outputs}
    missing = {node.index: {makers[name] for name in node.inputs if name in makers} for node in varying}
    readers: dict[int, list[Node]] = {}
    for node in varying:
        for index in missing[node.index]:
            readers.setdefault(index, []).append(node)
    order: list[Node] = []
    stack = [node for node in reversed(varying) if node.index in backbone]
    stack += [node for node in reversed(varying) if node.index not in backbone and not missing[node.index]]
    while stack:
        node = stack.pop()
        order.append(node)
        for reader in readers.get(node.index, ()):
            missing[reader.index].discard(node.index)
            if not missing[reader.index] and reader.index not in backbone:
                stack.append(reader)
    return order


def _probed(constant: Sequence[Node], order: Sequence[Node], primary: str, outputs: Sequence[str]) -> tuple[int, int]:
    """The last positions at which the shape of the primary input is asked for: in whole, and its first extent alone."""
    asks: dict[bool, set[str]] = {True: set(), False: set()}  # batch alone or not: the tensors that come of it
    for node in constant:
        for alone, names in asks.items():
            if (node.probes(primary) and node.batch == alone) or not names.isdisjoint(node.inputs):
                names |= set(node.outputs)
    last = []
    for alone in (False, True):
        places = [position for position, node in enumerate(order, 1) if not asks[alone].isdisjoint(node.inputs)]
        last.append(len(order) + 1 if not asks[alone].isdisjoint(outputs) else max(places, default=0))
    return last[0], last[1]
