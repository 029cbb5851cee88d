"""A PyTorch module whose parameters are views of one flat tensor, and whose gradients are views of another.

Trained parameters come first, then what is only carried along (frozen parameters, float buffers): the order of the
`Layout`. Counters (buffers that are not float) go back to what the factory made them at each load. Must never let
torch replace a gradient: it is zeroed in place.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fedge.core import random
from fedge.core.errors import ModelError
from fedge.core.params import Layout, Vector


class FlatModel:
    """A module, its `vector` [d] and `grad` [trainable]; `array` and `params` are the same memory as `vector`.

    Raises ModelError where the factory fails or its module cannot be used so.
    """

    def __init__(self, factory: Callable[[], nn.Module], seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random.derive(seed, "model"))
            try:
                self.module = factory()
            except Exception as error:  # a plug-in boundary: the user's factory
                raise ModelError(f"The model factory raised {error!r}; mend the factory.") from error
        if not isinstance(self.module, nn.Module):
            raise ModelError(
                f"The model factory returned {type(self.module).__name__}; it must return a torch.nn.Module."
            )
        trained, carried, counters = _tensors(self.module)
        self._counters = {name: (tensor, tensor.clone()) for name, tensor in counters.items()}
        everything = {**trained, **carried}
        self.layout = Layout(
            tuple(everything),
            tuple(tuple(tensor.shape) for tensor in everything.values()),
            sum(tensor.numel() for tensor in trained.values()),
            {name: tensor.numpy().copy() for name, tensor in counters.items()},
        )
        self.vector = torch.cat([tensor.detach().reshape(-1) for tensor in everything.values()])
        self.array: Vector = self.vector.numpy()  # the same memory
        self.params = self.vector[: self.layout.trainable]
        self.grad = torch.zeros_like(self.params)
        for tensor, start, end in zip(everything.values(), self.layout.offsets, self.layout.offsets[1:]):
            tensor.data = self.vector[start:end].view(tensor.shape)
            if end <= self.layout.trainable:
                tensor.grad = self.grad[start:end].view(tensor.shape)

    def load(self, vector: Vector) -> None:
        """Take these parameters, float32 [d]. Raises ModelError where the length differs."""
        if vector.shape != self.array.shape:
            raise ModelError(
                f"The model has {self.array.size} parameters, not {vector.shape}; use the same model code."
            )
        np.copyto(self.array, vector)
        for tensor, value in self._counters.values():
            tensor.copy_(value)


def _tensors(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trained parameters, other float tensors, and counters (buffers that are not float), by name."""
    saved = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters())
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    trained: dict[str, torch.Tensor] = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    floats = {name: tensor for name, tensor in {**parameters, **buffers}.items() if tensor.is_floating_point()}
    for name, tensor in {**parameters, **floats}.items():
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name!r} has no shape yet; give the layer its sizes, or run a batch in the factory.")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ModelError(
                f"{name!r} is {tensor.dtype} on {tensor.device}; return model.float().cpu() from the factory."
            )
    if not trained:
        raise ModelError("The model has no parameter that requires a gradient, so there is nothing to train.")
    carried = {name: tensor for name, tensor in floats.items() if name not in trained}
    return trained, carried, {name: tensor for name, tensor in buffers.items() if name not in floats}
