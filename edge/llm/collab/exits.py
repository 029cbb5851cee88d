"""Exits: what turns a state between two layers into logits early, and the file that holds them.

    y = x + FFN(rms_norm(x, feed_norm))       a gated feed-forward network, as a layer of the model has
    logits = head(rms_norm(y, norm)) / temperature

The head is the model's own and frozen, so that an exit costs little memory (CE-CoLLM, arXiv 2411.02829, section III).
The network before it is the half of AI Flow's decoder layer (arXiv 2506.12479) that needs no keys and values. A file
may come from a stranger: it is used only where everything in it fits together. Owns the arithmetic, the format and its
judgement. Must never train, nor read a weight of the model but to start untrained exits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save as serialise

from fedge.core.errors import DataError, ExperimentError, ModelError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.exits.calibrate import COLDEST, HOTTEST
from fedge.edge.files import replacing
from fedge.edge.llm.models.config import Config
from fedge.edge.llm.models.folder import NORM, Folder
from fedge.edge.llm.models.mapped import Mapped
from fedge.edge.llm.ranks.pointwise import gate, rms_norm
from fedge.edge.llm.shards.about import MAX_SIZE
from fedge.edge.llm.shards.export import METADATA

FORMAT = 1
_AGAIN = "train the exits again"


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an exit was seen to do on held-out positions. ECE: expected calibration error, before and after the
    temperature. `agreement`: how often its token is the full model's, if it answers all.
    """

    ece_before: float = 0.0
    ece: float = 0.0
    agreement: float = 0.0


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What thresholds led to on held-out positions: the share of tokens each exit answered, and how many of those were
    the full model's; the share that is left to the cloud; and the agreement of all tokens with the full model.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    agreements: tuple[float, ...]  # 1 where an exit answered none
    cloud: float
    agreement: float


@dataclass(frozen=True, slots=True, eq=False)
class Exit:
    """An exit after `layer` layers. feed_norm, norm [hidden]; gate_up [2 f, hidden], gate above up; down [hidden, f].

    `threshold` is the confidence from which it answers; at 1 it never does.
    """

    layer: int
    feed_norm: Array
    gate_up: Array
    down: Array
    norm: Array
    temperature: float = 1.0
    threshold: float = 1.0
    figures: Figures = Figures()


@dataclass(frozen=True, slots=True, eq=False)
class Exits:
    """All exits of one model, from the first layer up. `model` is the digest of its folder, `table` what the exits
    were seen to do together.
    """

    model: str
    eps: float
    exits: tuple[Exit, ...]
    table: tuple[Row, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """After how many layers each stands; the device computes as many as the last."""
        return tuple(one.layer for one in self.exits)


def logits(one: Exit, x: Array, head: Callable[[Array], Array], eps: float) -> Array:
    """[n, vocab] float32 for states x [n, hidden] behind the exit's layer; divided by the temperature.

    The largest probability of their softmax is the confidence. The temperature is fitted to that, and to the likeliest
    token; to draw a token by chance, multiply by it again, which gives the distribution that training aimed at.
    `head` is the product with the vocabulary matrix alone: it is given rows that are normalised.
    """
    y = x + gate(rms_norm(x, one.feed_norm, eps) @ one.gate_up.T) @ one.down.T
    divided: Array = head(rms_norm(y, one.norm, eps)) / np.float32(one.temperature)
    return divided


def check_layers(config: Config, layers: tuple[int, ...]) -> None:
    """Raises ExperimentError where exits cannot stand after these numbers of layers."""
    rising = all(low < high for low, high in pairwise(layers))
    if not layers or not rising or not 0 < layers[0] <= layers[-1] < config.layers:
        raise ExperimentError(
            f"Exits cannot stand after the layers {list(layers)}; name rising numbers from 1 to {config.layers - 1}."
        )


def untrained(folder: Folder, layers: tuple[int, ...]) -> Exits:
    """Where training starts: the next layer's feed-forward network and the final norm. They never answer.

    Biases of the network are left out. Raises ExperimentError.
    """
    check_layers(folder.config, layers)
    return Exits(folder.digest, folder.config.eps, tuple(_start(folder, layer) for layer in layers))


def _start(folder: Folder, layer: int) -> Exit:
    name = f"model.layers.{layer}."
    return Exit(
        layer,
        folder.tensor(f"{name}post_attention_layernorm.weight"),
        np.concatenate([folder.tensor(f"{name}mlp.{part}_proj.weight") for part in ("gate", "up")]),
        folder.tensor(f"{name}mlp.down_proj.weight"),
        folder.tensor(NORM),
    )


class _Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file says of one exit besides its tensors."""

    layer: int
    temperature: float
    threshold: float
    figures: Figures


class _Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    eps: float
    exits: tuple[_Fact, ...]
    table: tuple[Row, ...]
    format: int = FORMAT


class _Header(msgspec.Struct, frozen=True):
    """The header's own entry; the tensors are judged apart."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__")


_TENSORS = ("feed_norm", "gate_up", "down", "norm")


def save(path: Path, found: Exits) -> None:
    """Write the exits as one safetensors file, in place of what was there. Raises ModelError."""
    facts = tuple(_Fact(one.layer, one.temperature, one.threshold, one.figures) for one in found.exits)
    about = msgspec.json.encode(_Facts(found.model, found.eps, facts, found.table)).decode()
    tensors = {
        f"{one.layer}.{name}": np.ascontiguousarray(getattr(one, name), "<f4")
        for one in found.exits
        for name in _TENSORS
    }
    with replacing(path) as file:
        file.write(serialise(tensors, {METADATA: about}))


def load(path: Path, limits: LlmLimits = LlmLimits()) -> Exits:
    """The exits of a file; their tensors are copies. Raises ModelError where it holds none that can be used."""
    file = Mapped(path, limits)
    try:
        text = msgspec.json.decode(file.header, type=_Header).metadata[METADATA]
        facts = msgspec.json.decode(text, type=_Facts)
        _judge(facts, file, limits)
        exits = tuple(_exit(fact, file) for fact in facts.exits)
    except (msgspec.MsgspecError, KeyError, UnicodeError, RecursionError, DataError) as error:
        raise ModelError(f"{path} holds no exits that can be used ({error!s:.200}); {_AGAIN}.") from error
    finally:
        file.close()
    return Exits(facts.model, facts.eps, exits, facts.table)


def _exit(fact: _Fact, file: Mapped) -> Exit:
    feed_norm, gate_up, down, norm = (np.array(file.view(f"{fact.layer}.{name}"), np.float32) for name in _TENSORS)
    if not all(np.isfinite(one).all() for one in (feed_norm, gate_up, down, norm)):
        raise DataError(f"exit {fact.layer} has weights that are not finite")
    return Exit(fact.layer, feed_norm, gate_up, down, norm, fact.temperature, fact.threshold, fact.figures)


def _judge(facts: _Facts, file: Mapped, limits: LlmLimits) -> None:
    """Raises DataError, or KeyError for a missing tensor, where the file contradicts itself or this version."""
    layers = [fact.layer for fact in facts.exits]
    if facts.format != FORMAT or len(facts.model) != 64 or not 0 < facts.eps < 1:
        raise DataError(f"it is of format {facts.format}, this is {FORMAT}; or its eps or its model is none")
    if not layers or layers != sorted(set(layers)) or not 0 < layers[0] <= layers[-1] < limits.max_layers:
        raise DataError(f"its layers {layers!s:.80} do not rise from 1 on")
    if len(file.entries) != len(_TENSORS) * len(layers):
        raise DataError("it has more tensors than belong to it")
    hidden = math.prod(file.entries[f"{layers[0]}.norm"].shape)
    for fact in facts.exits:
        if not COLDEST <= fact.temperature <= HOTTEST or not 0.0 <= fact.threshold <= 1.0:
            raise DataError(f"exit {fact.layer} has temperature {fact.temperature} and threshold {fact.threshold}")
        entries = {name: file.entries[f"{fact.layer}.{name}"] for name in _TENSORS}
        width = entries["down"].shape[-1] if entries["down"].shape else 0
        shapes = {"feed_norm": (hidden,), "gate_up": (2 * width, hidden), "down": (hidden, width), "norm": (hidden,)}
        if not 1 <= hidden <= MAX_SIZE or not 1 <= width <= MAX_SIZE:
            raise DataError(f"exit {fact.layer} has sizes outside 1 to {MAX_SIZE}")
        if any(entry.dtype != "F32" or entry.shape != shapes[name] for name, entry in entries.items()):
            raise DataError(f"exit {fact.layer} has tensors of other types or shapes")
