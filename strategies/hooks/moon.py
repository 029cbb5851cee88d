"""MOON, model-contrastive learning (Li et al. 2021, arXiv 2103.16257): representations near the global model's, away
from those of the client's own previous model.

    loss + mu mean(-log(exp(cos(z, z_global) / t) / (exp(cos(z, z_global) / t) + exp(cos(z, z_previous) / t))))

z is `model.features(x)` where the model has it, else what goes into its last Linear layer. The previous local model
lasts in the client's state; a first task has none, and no term. Costs three more forward passes a batch.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedge.core.errors import ExperimentError, ModelError
from fedge.core.params import Array
from fedge.strategies.contracts import Work

if TYPE_CHECKING:  # an experiment with this hook is read where there is no torch, too
    import torch
    from torch import nn

_PREVIOUS = "previous"
_SCRATCH = "moon.previous"
_FROZEN = "moon.frozen"


def representation(model: "nn.Module", x: "torch.Tensor") -> "torch.Tensor":
    """z, [batch, features]. Raises ModelError where the model has neither `features` nor a Linear layer."""
    from torch import nn

    features = getattr(model, "features", None)
    if callable(features):
        z: torch.Tensor = features(x)
        return z.flatten(1)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ModelError("MOON needs a model with a method features(x) or a Linear layer; add features.")
    seen: list[torch.Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(x)
    finally:
        handle.remove()
    return seen[-1].flatten(1)


def _frozen(model: "nn.Module", vector: "torch.Tensor") -> "nn.Module":
    """A copy of the model for evaluation only, whose trained parameters are `vector` [trainable]."""
    from torch import nn

    twin = copy.deepcopy(model).eval()
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    nn.utils.vector_to_parameters(vector, trained)
    return twin.requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Moon:
    """`mu` scales the term (the paper tries 0.1 to 10); `temperature` is t, above 0."""

    mu: float = 1.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf") or not 0 < self.temperature < float("inf"):
            raise ExperimentError("client.hooks: mu must be at least 0 and temperature above 0, both finite.")

    def begin(self, work: Work, state: dict[str, Array]) -> None:
        """Fetch the previous local model."""
        if _PREVIOUS in state:
            work.scratch[_SCRATCH] = work.start.new_tensor(state[_PREVIOUS])

    def penalty(self, work: Work, model: "nn.Module", batch: Any, output: Any) -> "torch.Tensor | None":
        """The contrastive term of one batch (x, y)."""
        import torch
        from torch.nn import functional

        if _SCRATCH not in work.scratch:
            return None
        if _FROZEN not in work.scratch:
            work.scratch[_FROZEN] = [_frozen(model, vector) for vector in (work.start, work.scratch[_SCRATCH])]
        z = representation(model, batch[0])
        with torch.no_grad():
            others = [representation(twin, batch[0]) for twin in work.scratch[_FROZEN]]
        likeness = torch.stack([functional.cosine_similarity(z, other) for other in others], dim=1)
        nearest = torch.zeros(len(z), dtype=torch.long)
        return self.mu * functional.cross_entropy(likeness / self.temperature, nearest)

    def adjust(self, work: Work) -> None:
        """Nothing: the term is in the loss."""

    def finish(self, work: Work, state: dict[str, Array]) -> Mapping[str, Array]:
        """Keep the local model [trainable]; nothing to send."""
        state[_PREVIOUS] = work.params.clone().numpy()
        return {}
