"""What a body of OpenAI's API asks for: parsed, checked, and turned into requests to the engine.

Owns which fields are understood, which change nothing and are ignored, and which are refused because an answer without
them would not be what was asked. A null is a field that is not there. Must never run a model or touch a socket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from fedge.core.errors import TheirFault
from fedge.core.limits import LlmLimits
from fedge.edge.llm.api.openai_errors import ApiError, bad
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling

IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# What would change the answer and is not there, with the values that ask for nothing.
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": ("Tools are not supported", ([],)),
    "tool_choice": ("Tools are not supported", ("none", "auto")),
    "functions": ("Functions are not supported", ([],)),
    "function_call": ("Functions are not supported", ("none", "auto")),
    "response_format": ("Only text is supported as an answer's form", ({"type": "text"},)),
    "modalities": ("Only text is supported", (["text"],)),
    "echo": ("The prompt cannot be echoed", (False,)),
    "suffix": ("Text cannot be inserted before a suffix", ("",)),
    "best_of": ("Only one answer per choice is computed", (1,)),
}
MAX_BIASES = 1024

_Float2 = Annotated[float, Meta(ge=-2, le=2)]
_Count = Annotated[int, Meta(ge=1)]
_Top = Annotated[int, Meta(ge=0, le=20)]
_Token = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]  # no vocabulary is larger, and a cloud takes so many digits


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class _Common(msgspec.Struct, kw_only=True):
    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: _Count = 1
    stop: str | list[str] = []
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: _Float2 = 0.0
    frequency_penalty: _Float2 = 0.0
    logit_bias: Annotated[dict[_Token, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] = {}


class _Chat(_Common, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: _Top | None = None


class _Completion(_Common, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: _Top | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One body. Of a chat the `messages`, else the `prompts`: texts, or tokens. `choices` answers to each prompt."""

    model: str
    messages: tuple[dict[str, str], ...]
    prompts: tuple[str | tuple[int, ...], ...]
    choices: int
    stream: bool
    include_usage: bool
    template: Request

    @property
    def chat(self) -> bool:
        """Whether it came as a chat."""
        return bool(self.messages)

    def requests(self, prompts: Sequence[Sequence[int]]) -> list[Request]:
        """All choices of the first prompt [tokens], then those of the next. A seed grows by one per choice."""
        return [
            replace(self.template, tokens=tuple(tokens), sampling=_seeded(self.template.sampling, choice))
            for tokens in prompts
            for choice in range(self.choices)
        ]


def chat(body: bytes, limits: LlmLimits = LlmLimits()) -> Asked:
    """A body of /v1/chat/completions. Raises ApiError."""
    asked = _fields(body, _Chat)
    most, limit = asked.max_completion_tokens, asked.max_tokens
    if most is not None and limit is not None and most != limit:
        raise bad("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad("top_logprobs needs logprobs to be true; set it, or leave both out.", "top_logprobs")
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    messages = tuple(_message(one, at) for at, one in enumerate(asked.messages))
    return _asked(asked, messages, (), limit if most is None else most, top, limits)


def completion(body: bytes, limits: LlmLimits = LlmLimits()) -> Asked:
    """A body of /v1/completions; without max_tokens 16 are computed, as OpenAI does. Raises ApiError."""
    asked = _fields(body, _Completion)
    return _asked(asked, (), _prompts(asked.prompt), asked.max_tokens or 16, asked.logprobs, limits)


def _asked(
    asked: _Common,
    messages: tuple[dict[str, str], ...],
    prompts: tuple[str | tuple[int, ...], ...],
    max_tokens: int | None,
    top_logprobs: int | None,
    limits: LlmLimits,
) -> Asked:
    """What both forms have in common."""
    if asked.stream_options is not None and not asked.stream:
        raise bad("stream_options are for streams; set stream to true, or leave them out.", "stream_options")
    answers = asked.n * max(1, len(prompts))
    if answers > limits.max_choices:
        raise bad(f"{answers} answers are more than the {limits.max_choices} of one request; ask for fewer.", "n")
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias")
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    try:
        sampling = Sampling(**{name: getattr(asked, name) for name in names})
        template = Request((), max_tokens, sampling, stop, top_logprobs=top_logprobs)
    except TheirFault as error:
        raise bad(str(error)) from error
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    return Asked(asked.model, messages, prompts, asked.n, asked.stream, usage, template)


def _seeded(sampling: Sampling, choice: int) -> Sampling:
    """The settings of one of several choices: with the same seed all would be the same."""
    if sampling.seed is None or not choice:
        return sampling
    seed = (sampling.seed + choice) % (1 << 64)
    return replace(sampling, seed=seed - (1 << 64) if seed >= 1 << 63 else seed)


def _message(message: _Message, at: int) -> dict[str, str]:
    """As a chat template takes it: the content is one text."""
    where, role = f"messages[{at}]", message.role
    if role not in ("system", "developer", "user", "assistant"):
        raise bad(f"The role {role[:50]!r} is not supported; use system, user or assistant.", f"{where}.role")
    for calls in ("tool_calls", "function_call"):
        if getattr(message, calls):
            raise bad("Calls of tools are not supported; leave them out.", f"{where}.{calls}")
    if message.content is None:
        raise bad("A message has no content; send a text.", f"{where}.content")
    parts = [_Part("text", message.content)] if isinstance(message.content, str) else message.content
    for part in parts:
        if part.type != "text":
            raise bad(f"Content of type {part.type[:50]!r} is not supported; send text.", f"{where}.content")
    # Models know no developers; OpenAI's own older ones take them for the system.
    found = {"role": "system" if role == "developer" else role, "content": "\n".join(part.text for part in parts)}
    return found | ({"name": message.name} if message.name else {})


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """A text, several, the tokens of one, or of several."""
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(isinstance(one, int) for one in prompt):
        return (tuple(one for one in prompt if isinstance(one, int)),)
    if prompt and all(isinstance(one, str) for one in prompt):
        return tuple(one for one in prompt if isinstance(one, str))
    if prompt and all(isinstance(one, list) for one in prompt):
        return tuple(tuple(one) for one in prompt if isinstance(one, list))
    raise bad("The prompt is empty or mixed; send a text, several, the tokens of one, or of several.", "prompt")


T = TypeVar("T", bound=_Common)


def _fields(body: bytes, kind: type[T]) -> T:
    """The body as a `kind`, each field by itself so that the one that is wrong can be named."""
    values = _decoded(body, dict[str, msgspec.Raw], None)
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    taken: dict[str, Any] = {}
    for name, raw in values.items():
        if bytes(raw).strip() == b"null" or name in IGNORED:
            continue
        if name in known:
            taken[name] = _decoded(raw, known[name].type, name)
        else:
            _refuse(name, raw)
    for name, field in known.items():
        if field.required and name not in taken:
            raise bad(f"{name} is missing; send it.", name)
    return kind(**taken)


def _refuse(name: str, raw: msgspec.Raw) -> None:
    """Raises ApiError unless the value of an unsupported field asks for nothing."""
    why, nothing = _REFUSED.get(name, (f"{name[:50]!r} is not known here and could change the answer", ()))
    if not nothing or _decoded(raw, Any, name) not in nothing:
        raise bad(f"{why}; leave {name[:50]} out.", name[:50], "unsupported_parameter")


def _decoded(data: bytes | msgspec.Raw, kind: Any, param: str | None) -> Any:
    what = param or "The body"
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError as error:
        raise bad(f"{what} is nested too deeply; send what OpenAI's API describes.", param) from error
    except ValueError as error:  # msgspec's own, and of text that is no UTF-8
        raise bad(f"{what} cannot be used ({error!s:.200}); send what OpenAI's API describes.", param) from error


def check_model(model: str, served: str) -> None:
    """Raises ApiError, status 404, for another model than the one that is served."""
    if model != served:
        raise ApiError(
            404,
            f"The model {model[:100]!r} is not served here; ask for {served!r}.",
            param="model",
            code="model_not_found",
        )
