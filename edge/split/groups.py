"""Which tensors lie inside a group of operators that a runtime fuses into one; a cut there would only cost time.

Owns the patterns: activations and constants applied in place (also those written as several operators, as Gelu and
Swish often are), BatchNormalization or a bias after a convolution or a product, and the sum that closes a residual
block of convolutions. Must know nothing of cuts or files.
"""

from collections.abc import Container, Sequence

from fedge.edge.split.order import Node

_CONVOLUTIONS = {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv"}
_UNARY = {"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Tanh"}
_UNARY |= {"Softplus", "Softsign", "Mish", "Swish", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Neg"}
_BINARY = {"Add", "Sub", "Mul", "Div", "Pow", "Sum"}


def roots(order: Sequence[Node], data: Container[str]) -> dict[str, str]:
    """For each tensor made in `order`, the one of which it is an elementwise function (itself where of none).

    `data` are the tensors that vary with the model's input; all others count as constants.
    """
    root: dict[str, str] = {}
    maker: dict[str, str] = {}
    for node in order:
        sources = {root.get(name, name) for name in node.inputs if name in data}
        source = sources.pop()
        in_place = not sources and _in_place(node.op, maker.get(source, ""))
        for name in node.outputs:
            root[name] = source if in_place else name
            maker[name] = node.op
    return root


def fused(order: Sequence[Node], data: Container[str]) -> set[str]:
    """The tensors that a fused group makes on its way: all operators that use them belong to the same group."""
    root = roots(order, data)
    maker = {name: node.op for node in order for name in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in order:
        for name in dict.fromkeys(node.inputs):
            if name in maker:
                readers.setdefault(name, []).append(node)
    return {
        name
        for name, users in readers.items()
        if all(root[user.outputs[0]] == root[name] for user in users)
        or (len(users) == 1 and users[0].op in ("Add", "Sum") and _linear(name, root[name], maker))
    }


def _in_place(op: str, source: str) -> bool:
    return op in _UNARY | _BINARY or (op == "BatchNormalization" and source in _CONVOLUTIONS | {"Gemm", "MatMul"})


def _linear(name: str, root: str, maker: dict[str, str]) -> bool:
    """A convolution's own output, or that of the BatchNormalization after it."""
    return maker.get(root, "") in _CONVOLUTIONS and maker[name] in _CONVOLUTIONS | {"BatchNormalization"}
