"""Graph surgery: small trained networks inside an ONNX model, as a bottleneck on its line or as a branch beside it.

What comes out is one model again, with new tensors that `fedge.edge.split.graph` finds as cuts and `export` as exits.
Owns the translation of a handful of torch layers to ONNX operators that mean the same in every opset since 11. Must
never train, and never change what the model computed before the place.
"""

from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from fedge.core.errors import CannotCut
from fedge.edge.split.skeleton import captured, graphs_in


def bottleneck(
    model: ModelProto,
    source: str,
    target: str,
    encoder: nn.Sequential,
    decoder: nn.Sequential,
    name: str = "bottleneck",
) -> ModelProto:
    """`model` with the tensor `target` computed as decoder(encoder(`source`)), a new cut at the tensor `name` between.

    `source` comes before `target`, whose own operators then fall away, or is `target`. Weights are inside the model.
    Raises CannotCut where there is no such tensor, or one that cannot be replaced.
    """
    copy = _copy(model, name)
    place = _maker(copy, source if source == target else target)
    if source != target and _position(copy, source) >= place:
        raise CannotCut(f"{source!r} is not computed before {target!r}; name the earlier tensor first.")
    if target in {value.name for value in copy.graph.output} or any(target in _inner(node) for node in copy.graph.node):
        raise CannotCut(
            f"{target!r} is an output, or is read in a loop or branch, and cannot be replaced; name another."
        )
    restored = f"{name}/restored"
    for node in list(copy.graph.node)[place + 1 :]:
        for index, read in enumerate(node.input):
            if read == target:
                node.input[index] = restored
    nodes = _translate(copy, encoder, source, name) + _translate(copy, decoder, name, restored)
    _insert(copy, place + 1, nodes)
    _drop_dead(copy)
    onnx.checker.check_model(copy)
    return copy


def branch(model: ModelProto, source: str, network: nn.Sequential, name: str) -> ModelProto:
    """`model` with one more output, `name` [N, classes]: the network's logits from the tensor `source`.

    Raises CannotCut where the model has no such tensor.
    """
    copy = _copy(model, name)
    place = _position(copy, source)
    _insert(copy, place + 1, _translate(copy, network, source, name))
    classes = next(layer.out_features for layer in reversed(network) if isinstance(layer, nn.Linear))
    copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", classes]))
    onnx.checker.check_model(copy)
    return copy


def bits(network: nn.Module) -> int:
    """Encoder size as Matsubara et al. count it: bits of the parameters, which the device must hold beside the head."""
    return sum(parameter.numel() * parameter.element_size() * 8 for parameter in network.parameters())


def _copy(model: ModelProto, name: str) -> ModelProto:
    """A copy without the recorded shapes of tensors, which would be wrong behind the surgery."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    known = {tensor for node in copy.graph.node for tensor in (*node.input, *node.output)}
    if name in known or f"{name}/restored" in known:
        raise CannotCut(f"The model has a tensor {name!r} already; give the new one another name.")
    return copy


def _maker(model: ModelProto, tensor: str) -> int:
    for index, node in enumerate(model.graph.node):
        if tensor in node.output:
            return index
    raise CannotCut(f"No operator of the model computes {tensor!r}; take one from `fedge edge plan MODEL`.")


def _position(model: ModelProto, tensor: str) -> int:
    return -1 if tensor in {value.name for value in model.graph.input} else _maker(model, tensor)


def _inner(node: NodeProto) -> set[str]:
    return {name for graph in graphs_in(node) for name in captured(graph)}


def _insert(model: ModelProto, place: int, nodes: list[NodeProto]) -> None:
    after = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*after[:place], *nodes, *after[place:]])


def _drop_dead(model: ModelProto) -> None:
    """Remove operators and weights that no output needs any more."""
    needed = {value.name for value in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input, _inner(node))
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(weights)


def _translate(model: ModelProto, network: nn.Sequential, start: str, end: str) -> list[NodeProto]:
    """Operators for the layers, from the tensor `start` to `end`; their weights go into the model."""
    nodes: list[NodeProto] = []
    read = start
    for index, layer in enumerate(network):
        write = end if index == len(network) - 1 else f"{end}/{index}"
        weights = [(f"{end}/{index}.{key}", value.detach().cpu()) for key, value in layer.named_parameters()]
        model.graph.initializer.extend(_tensor(key, value) for key, value in weights)
        operator, settings = _operator(layer)
        nodes.append(helper.make_node(operator, [read, *(key for key, _ in weights)], [write], name=write, **settings))
        read = write
    return nodes


def _tensor(name: str, value: torch.Tensor) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name)


def _operator(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    """The ONNX operator and its attributes. Raises CannotCut for a layer that has none here."""
    match layer:
        case nn.Conv2d() | nn.ConvTranspose2d() if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            settings = {
                "kernel_shape": list(layer.kernel_size),
                "strides": list(layer.stride),
                "pads": [*map(int, layer.padding), *map(int, layer.padding)],
                "dilations": list(layer.dilation),
                "group": layer.groups,
            }
            if isinstance(layer, nn.Conv2d):
                return "Conv", settings
            return "ConvTranspose", {**settings, "output_padding": list(layer.output_padding)}
        case nn.ReLU():
            return "Relu", {}
        case nn.AdaptiveMaxPool2d(output_size=1):
            return "GlobalMaxPool", {}
        case nn.Flatten(start_dim=1, end_dim=-1):
            return "Flatten", {"axis": 1}
        case nn.Linear():
            return "Gemm", {"transB": 1}
    raise CannotCut(f"The layer {layer} has no translation; build the network of the layers named in `inject`.")
