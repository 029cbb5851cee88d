"""How many devices, and which share each, answer soonest: a prediction for every number of them.

All ranks wait for each other twice in every layer. So a token takes, over the layers, the slowest rank's attention plus
the slowest rank's feed-forward network, plus the exchanges, plus the head on rank 0 (TPI-LLM, arXiv 2410.00531, section
3.3, with unequal shares). Weights that do not fit in memory come from the disk at every token while the ranks compute;
where the disk needs longer than that, it sets the pace (the loose steady state, Proposition 3).
Owns the formula and the choice. Must never measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedge.core.errors import ModelError
from fedge.edge.llm.compute.window import pinned
from fedge.edge.llm.mesh import collectives
from fedge.edge.llm.models.config import Config
from fedge.edge.llm.shards.layout import block_sizes, bytes_of
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shares import Share, balanced, cost_of_head, costs, proportional
from fedge.edge.plan.link import Link

FLOAT_BYTES = 4
ROUNDS = 60  # of bisection: a double has no more digits


@dataclass(frozen=True, slots=True)
class Device:
    """`weights_per_s` are multiplied one token at a time; `memory_bytes` hold weights, keys and values;
    `disk_bytes_per_s` is how fast weights come from the disk; `layer_s` goes into a layer's other work.
    """

    name: str
    weights_per_s: float
    memory_bytes: int
    disk_bytes_per_s: float = 1e9
    layer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rank:
    """One device's part. `compute_s` and `stream_s` are per token; `steady` says that the disk keeps up."""

    device: Device
    share: Share
    bytes: int
    streamed_bytes: int
    compute_s: float
    stream_s: float
    steady: bool


@dataclass(frozen=True, slots=True)
class Option:
    """So many ranks, the first of which holds the prompt."""

    ranks: tuple[Rank, ...]
    collective: str
    exchange_s: float  # per token
    token_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """`options` by number of ranks; `choice` is one of them."""

    choice: Option
    options: tuple[Option, ...]


def plan(config: Config, kind: Kind, devices: Sequence[Device], link: Link, *, kv_tokens: int) -> Plan:
    """The number of ranks that is predicted to need the least time per token.

    `devices[0]` holds the prompt and is always in; the others join in order of speed. `kv_tokens` is how many tokens of
    all sequences together are kept. Raises ModelError where no number of ranks can run with the memory there is.
    """
    order = [devices[0], *sorted(devices[1:], key=lambda one: -one.weights_per_s)]
    options = [
        option
        for count in range(1, len(order) + 1)
        if (option := _best(config, kind, order[:count], link, kv_tokens)) is not None
    ]
    if not options:
        raise _no_room(config, kind, order[:1], kv_tokens)
    return Plan(min(options, key=lambda option: option.token_s), tuple(options))


def _no_room(config: Config, kind: Kind, head: Sequence[Device], kv_tokens: int) -> ModelError:
    """With the megabytes that weigh on one device alone."""
    whole = Share((0, config.kv_heads), (0, config.ffn))
    weights, kept = bytes_of(config, whole, kind, rank0=True), kv_bytes(config, whole, kv_tokens)
    return ModelError(
        f"The devices have not the memory ({head[0].memory_bytes >> 20} MB on the first): all weights take "
        f"{weights >> 20} MB, of which two blocks must fit, and keys and values of {kv_tokens} tokens {kept >> 20} MB; "
        "allow more, fewer slots or a shorter context."
    )


def _best(config: Config, kind: Kind, devices: Sequence[Device], link: Link, kv_tokens: int) -> Option | None:
    """The better of two ways to divide the layers: for ranks that compute all the time, and for those that read."""
    pace = _pace(config, kind, devices, kv_tokens)
    speeds = [device.weights_per_s for device in devices]
    tried = [balanced(config, speeds), balanced(config, pace), proportional(config, pace, cost_of_head(kind))]
    options = [_option(config, kind, devices, held, link, kv_tokens) for held in tried]
    return min((option for option in options if option), key=lambda option: option.token_s, default=None)


def _option(
    config: Config, kind: Kind, devices: Sequence[Device], held: Sequence[Share], link: Link, kv_tokens: int
) -> Option | None:
    placed: list[Rank] = []
    for number, (device, share) in enumerate(zip(devices, held)):
        rank = _rank(config, kind, device, share, kv_tokens, first=number == 0)
        if rank is None:
            return None
        placed.append(rank)
    size_bytes = config.hidden * FLOAT_BYTES
    seconds = collectives.seconds(len(placed), link.rtt_s, link.bandwidth_bps, size_bytes)
    name = min(seconds, key=lambda one: seconds[one])
    exchange_s = 2 * config.layers * seconds[name]
    head_s = costs(config, cost_of_head(kind))[0] / devices[0].weights_per_s
    busy_s = _layers_s(config, placed) + head_s + exchange_s
    token_s = max(busy_s, *(rank.stream_s for rank in placed))
    return Option(tuple(replace(rank, steady=rank.stream_s <= busy_s) for rank in placed), name, exchange_s, token_s)


def _pace(config: Config, kind: Kind, devices: Sequence[Device], kv_tokens: int) -> list[float]:
    """How many weights each device can do in the time that all of them together need for the whole model.

    In t seconds a device multiplies `weights_per_s` t weights, but not more than it holds and reads meanwhile.
    """
    whole = Share((0, config.kv_heads), (0, config.ffn))
    weights = costs(config, cost_of_head(kind))[0] + config.layers * _layer_weights(config, whole)
    per_weight = bytes_of(config, whole, kind, rank0=True) / weights
    kept = [max(0.0, device.memory_bytes - kv_bytes(config, whole, kv_tokens) / len(devices)) for device in devices]

    def done(seconds: float) -> list[float]:
        return [
            min(device.weights_per_s * seconds, (held + device.disk_bytes_per_s * seconds) / per_weight)
            for device, held in zip(devices, kept)
        ]

    low, high = 0.0, 1.0
    while sum(done(high)) < weights:
        high *= 2
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(done(middle)) >= weights else (middle, high)
    return done(high)


def _rank(config: Config, kind: Kind, device: Device, share: Share, kv_tokens: int, *, first: bool) -> Rank | None:
    """A device's part, or None where not even the buffers of a window have room."""
    sizes = block_sizes(config, share, kind, rank0=first)
    try:
        kept = pinned(sizes, device.memory_bytes - kv_bytes(config, share, kv_tokens))
    except ModelError:
        return None
    size = sum(sizes)
    streamed = size - sum(sizes[index] for index in kept)
    compute_s = config.layers * (_layer_weights(config, share) / device.weights_per_s + device.layer_s)
    return Rank(device, share, size, streamed, compute_s, streamed / device.disk_bytes_per_s, steady=True)


def _layers_s(config: Config, ranks: Sequence[Rank]) -> float:
    """Every rank waits after attention and after the feed-forward network for the slowest."""
    attention = max(_attention_weights(config, rank.share) / rank.device.weights_per_s for rank in ranks)
    ffn = max(_ffn_weights(config, rank.share) / rank.device.weights_per_s for rank in ranks)
    return config.layers * (attention + ffn + max(rank.device.layer_s for rank in ranks))


def kv_bytes(config: Config, share: Share, tokens: int) -> int:
    """What keys and values of so many tokens take on a rank."""
    heads = share.kv_heads[1] - share.kv_heads[0]
    return 2 * config.layers * tokens * heads * config.head_dim * FLOAT_BYTES


def _layer_weights(config: Config, share: Share) -> int:
    return _attention_weights(config, share) + _ffn_weights(config, share)


def _attention_weights(config: Config, share: Share) -> int:
    heads = share.kv_heads[1] - share.kv_heads[0]
    return 2 * heads * (config.group + 1) * config.head_dim * config.hidden


def _ffn_weights(config: Config, share: Share) -> int:
    return 3 * (share.ffn[1] - share.ffn[0]) * config.hidden
