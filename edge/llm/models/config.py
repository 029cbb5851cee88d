"""What a model of the Llama family is: its sizes, and the few ways in which the families differ.

Owns the reading of `config.json`, and the refusal of what fedge cannot compute. Must never read weights.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from fedge.core.errors import ExperimentError, ModelError
from fedge.core.limits import LlmLimits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
T = TypeVar("T")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
MOST_FACTOR = 1e6  # of a Rope; the least is 1 / MOST_FACTOR


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (RoFormer, arXiv 2104.09864). `kind` is "default", "linear", "llama3" or "yarn"; the other
    fields are those of `rope_scaling` in config.json, with 0 where the kind has none.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context: int = 0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Config:
    """One model. Sizes are counts; `window` is how many positions a query sees, its own among them, 0 for all."""

    family: str  # model_type: llama, mistral, qwen2, qwen3
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eps: float
    rope: Rope
    tied: bool  # the head is the embedding
    qkv_bias: bool
    o_bias: bool
    ffn_bias: bool
    qk_norm: bool  # RMSNorm over every head of queries and keys (Qwen3)
    window: int  # a query at position p sees p - window + 1 to p
    bos: int | None
    eos: tuple[int, ...]

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def room(self, asked: int | None) -> int:
        """Tokens of a prompt and its answer: as `asked`, None for as many as the model can.

        Raises ExperimentError for more than those, and for none.
        """
        if asked is None:
            return self.context
        if not 1 <= asked <= self.context:
            has = self.context
            raise ExperimentError(f"{asked} tokens do not fit the model's context of {has}; ask for 1 to {has}.")
        return asked


_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Ids = _Id | tuple[_Id, ...] | None


class _File(msgspec.Struct, frozen=True):
    """What is used of config.json; a value of None stands for a field that is not there."""

    model_type: str
    num_hidden_layers: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_attention_heads: _Count
    vocab_size: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    max_position_embeddings: _Count = 2048
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: _Count | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    layer_types: tuple[str, ...] | None = None
    partial_rotary_factor: float | None = None
    quantization_config: Any = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    bos_token_id: _Ids = None
    eos_token_id: _Ids = None


class _Scaling(msgspec.Struct, frozen=True):
    """`rope_scaling` or `rope_parameters`; of the latter the base is part."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: Annotated[float, msgspec.Meta(ge=1, le=1e6)] | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Count | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None
    mscale_all_dim: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None
    truncate: bool | None = None
    partial_rotary_factor: float | None = None


class _Generation(msgspec.Struct, frozen=True):
    """What is used of generation_config.json."""

    eos_token_id: _Ids = None


def read(folder: Path, limits: LlmLimits = LlmLimits()) -> Config:
    """The model in a folder of Hugging Face's form. The ids that end a text are those of config.json together with
    those of generation_config.json. Raises ModelError where a file is broken or names what fedge cannot compute.
    """
    path = folder / "config.json"
    file = _decode(path, _File, limits)
    generation = folder / "generation_config.json"
    more = _ids(_decode(generation, _Generation, limits).eos_token_id) if generation.exists() else ()
    _judge(path, file, limits)
    if any(token >= file.vocab_size for token in more):
        raise ModelError(f"{generation} has an eos_token_id that is not below vocab_size {file.vocab_size}; mend it.")
    qwen2 = file.model_type == "qwen2"
    bias = file.model_type in ("llama", "qwen3") and bool(file.attention_bias)
    bos = _ids(file.bos_token_id)
    return Config(
        family=file.model_type,
        layers=file.num_hidden_layers,
        hidden=file.hidden_size,
        ffn=file.intermediate_size,
        heads=file.num_attention_heads,
        kv_heads=file.num_key_value_heads or file.num_attention_heads,
        head_dim=_head_dim(file),
        vocab=file.vocab_size,
        context=file.max_position_embeddings,
        eps=file.rms_norm_eps,
        rope=_rope(path, file),
        tied=bool(file.tie_word_embeddings),
        qkv_bias=qwen2 or bias,
        o_bias=bias,
        ffn_bias=file.model_type == "llama" and bool(file.mlp_bias),
        qk_norm=file.model_type == "qwen3",
        window=_window(path, file),
        bos=bos[0] if bos else None,
        eos=tuple(dict.fromkeys(_ids(file.eos_token_id) + more)),
    )


def _decode(path: Path, kind: type[T], limits: LlmLimits) -> T:
    """The JSON file as `kind`."""
    try:
        if not path.is_file():  # a pipe would hang
            raise ModelError(f"{path} is missing; name a folder in Hugging Face's form (config.json, *.safetensors).")
        if path.stat().st_size > limits.max_config_bytes:
            raise ModelError(f"{path} is larger than {limits.max_config_bytes} bytes; is it what its name says?")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be used ({error!s:.200}); fetch it again.") from error


def _head_dim(file: _File) -> int:
    """0 where it follows from nothing."""
    if file.head_dim or file.model_type == "qwen3":
        return file.head_dim or 128  # transformers' default
    return 0 if file.hidden_size % file.num_attention_heads else file.hidden_size // file.num_attention_heads


def _ids(value: _Ids) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else value


def _judge(path: Path, file: _File, limits: LlmLimits) -> None:
    """Raises ModelError at the first field that fedge cannot follow."""
    heads, kv_heads = file.num_attention_heads, file.num_key_value_heads or file.num_attention_heads
    head_dim = _head_dim(file)
    part = file.partial_rotary_factor
    faults = {
        f"model_type {file.model_type!r:.80}: fedge computes {', '.join(FAMILIES)}": file.model_type not in FAMILIES,
        "quantization_config: fedge reads float32, float16 and bfloat16, and quantises itself": file.quantization_config
        is not None,
        f"hidden_act {file.hidden_act!r:.80}: fedge computes silu": file.hidden_act not in ("silu", "swish"),
        f"partial_rotary_factor {part}: fedge turns whole heads": part not in (None, 1.0),
        f"num_hidden_layers {file.num_hidden_layers}: at most {limits.max_layers}": file.num_hidden_layers
        > limits.max_layers,
        f"num_key_value_heads {kv_heads}: it has to divide num_attention_heads {heads}": heads % kv_heads != 0,
        f"head_dim {head_dim}: it has to be even, and hidden_size / num_attention_heads if not given": head_dim < 2
        or head_dim % 2 != 0,
        f"vocab_size {file.vocab_size}: bos_token_id and eos_token_id have to be below it": any(
            token >= file.vocab_size for token in _ids(file.bos_token_id) + _ids(file.eos_token_id)
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ModelError(f"{path} has {fault}; choose another model.")


def _window(path: Path, file: _File) -> int:
    """Positions that a query sees, 0 for all. One answer for all layers: a mix of kinds is refused."""
    size = 4096 if file.sliding_window is msgspec.UNSET else file.sliding_window  # transformers' default
    allowed = file.model_type == "mistral" or (file.model_type.startswith("qwen") and bool(file.use_sliding_window))
    window = size if allowed and size and size < file.max_position_embeddings else 0
    kinds = _layer_kinds(file)
    if not window:
        kinds.discard("sliding_attention")  # as good as full
    if len(kinds) > 1 or not kinds <= {"full_attention", "sliding_attention"}:
        remedy = "fedge computes one kind of attention in all layers; choose another model"
        raise ModelError(f"{path} has layer_types (or max_window_layers) of {sorted(kinds)!r:.120}: {remedy}.")
    return window if kinds == {"sliding_attention"} else 0


def _layer_kinds(file: _File) -> set[str]:
    """The kinds of attention among the layers; `layer_types` may say them, Mistral's code does not read it."""
    said = set(file.layer_types or ())
    if file.model_type == "mistral":
        return said | {"sliding_attention"}
    if said:
        return said
    full = 28 if file.max_window_layers is None else file.max_window_layers  # transformers' default
    return {"sliding_attention" if layer >= full else "full_attention" for layer in range(file.num_hidden_layers)}


def _rope(path: Path, file: _File) -> Rope:
    """The positions, from the old fields or the new one."""
    given = file.rope_scaling or file.rope_parameters or {}
    try:
        scaling = msgspec.convert(given, _Scaling)
        kind = scaling.rope_type or scaling.type or "default"
        theta = scaling.rope_theta or file.rope_theta or 10000.0
        nested = any(isinstance(value, dict) for value in given.values())
        if kind in ROPE_KINDS and not nested and _whole(scaling):
            found = _stretch(kind, theta, scaling, file.max_position_embeddings)
            if computable(found):
                return found
    except msgspec.ValidationError as error:
        raise ModelError(f"{path} has unusable rope parameters ({error!s:.200}); choose another model.") from error
    known = f"fedge computes {', '.join(ROPE_KINDS)}, truncated, of whole heads and alike in all layers"
    raise ModelError(f"{path} has rope parameters {given!r:.200}: {known}; choose another model.")


def computable(rope: Rope) -> bool:
    """Whether angles follow from these numbers, which may be a stranger's: none is so large or small that it, or what
    it divides, is lost.
    """
    factors = [rope.factor, rope.attention_factor]
    if rope.kind == "yarn":
        factors += [rope.beta_fast, rope.beta_slow]
    if rope.kind == "llama3":
        factors += [rope.low_freq_factor, rope.high_freq_factor]
    if not all(1 / MOST_FACTOR <= factor <= MOST_FACTOR for factor in factors) or rope.factor < 1:
        return False
    trained = rope.original_context >= 1 or rope.kind in ("default", "linear")
    apart = rope.low_freq_factor < rope.high_freq_factor or rope.kind != "llama3"
    return 1 < rope.theta < math.inf and trained and apart


def _whole(scaling: _Scaling) -> bool:
    return scaling.partial_rotary_factor in (None, 1.0) and scaling.truncate is not False


def _stretch(kind: str, theta: float, scaling: _Scaling, context: int) -> Rope:
    """The Rope of a kind; raises ValidationError where a field that it needs is missing."""
    if kind == "default":
        return Rope(theta)
    original = scaling.original_max_position_embeddings or context
    factor = scaling.factor or (max(context / original, 1.0) if kind == "yarn" else None)
    if factor is None:
        raise msgspec.ValidationError("`factor` is missing")
    if kind == "linear":
        return Rope(theta, kind, factor)
    if kind == "llama3":
        low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0
        if not 0 < low < high:
            raise msgspec.ValidationError("`low_freq_factor` has to be below `high_freq_factor`")
        return Rope(theta, kind, factor, low, high, original)
    fast, slow = scaling.beta_fast or 32.0, scaling.beta_slow or 1.0
    return Rope(theta, kind, factor, 0.0, 0.0, original, fast, slow, _attention_factor(scaling, factor))


def _attention_factor(scaling: _Scaling, factor: float) -> float:
    """How much YaRN sharpens the attention (arXiv 2309.00071, section 3.3): cosine and sine are multiplied by it."""

    def sharpen(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpen(scaling.mscale) / sharpen(scaling.mscale_all_dim)
    return sharpen(1.0)
