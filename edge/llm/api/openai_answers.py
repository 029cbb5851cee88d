"""Answers in OpenAI's form: whole, or chunk by chunk, with log-probabilities and what they cost.

Owns the shape of what goes out. Pure: pieces of the engine in, plain data out. Must never wait or write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedge.edge.llm.engine.requests import Piece, Usage

LEAST_LOGPROB = -9999.0  # as OpenAI writes what has no probability at all; JSON knows no infinity


@dataclass(frozen=True, slots=True)
class Form:
    """How the answers to one request are written. `bytes_of` gives what a token writes, which may be
    nothing, or half a character; tokens in `ends` are not part of an answer.
    """

    chat: bool
    id: str
    created: int
    model: str
    logprobs: bool
    bytes_of: Callable[[int], bytes]
    ends: frozenset[int]

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chat's stream begins with the role; a text's with its first token."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None) if self.chat else None

    def chunk(self, index: int, piece: Piece, offset: int) -> dict[str, Any] | None:
        """What one piece adds to choice `index`, `offset` characters into its text; None where it shows nothing."""
        if not (piece.text or piece.finish or self.logprobs):
            return None
        content = {"content": piece.text} if piece.text else {}
        part: dict[str, Any] = {"delta": content} if self.chat else {"text": piece.text}
        return self._chunk(index, part, self._logprobs([piece], offset), piece.finish)

    def whole(self, answers: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """All choices at once."""
        choices = []
        for index, pieces in enumerate(answers):
            text = "".join(piece.text for piece in pieces)
            message = {"role": "assistant", "content": text, "refusal": None}
            part: dict[str, Any] = {"message": message} if self.chat else {"text": text}
            finish = pieces[-1].finish
            choices.append({"index": index, **part, "logprobs": self._logprobs(pieces, 0), "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage}

    def cost(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk behind the last one, with what all cost."""
        return self._head(self._stream_kind) | {"choices": [], "usage": usage}

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, part: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": finish}
        return self._head(self._stream_kind) | {"choices": [choice]}

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return self._of_chat(pieces) if self.chat else self._of_text(pieces, offset)

    def _of_chat(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        entries = []
        for piece in pieces:
            if piece.token is not None and piece.logprob is not None and piece.token not in self.ends:
                top = [self._entry(token, value) for token, value in piece.logprob.top]
                entries.append(self._entry(piece.token, piece.logprob.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        data = self.bytes_of(token)
        return {
            "token": self._spell(token),
            "logprob": max(value, LEAST_LOGPROB),
            "bytes": list(data) if data else None,
        }

    def _of_text(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        tokens, values, tops, offsets = [], [], [], []
        for piece in pieces:
            if piece.token is not None and piece.logprob is not None and piece.token not in self.ends:
                tokens.append(self._spell(piece.token))
                values.append(max(piece.logprob.logprob, LEAST_LOGPROB))
                top = piece.logprob.top
                tops.append({self._spell(token): max(value, LEAST_LOGPROB) for token, value in top})
                offsets.append(offset)
            offset += len(piece.text)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _spell(self, token: int) -> str:
        """A token's text, or its number where it has none of its own; several may stand side by side."""
        data = self.bytes_of(token)
        text = data.decode(errors="ignore")
        return text if text and text.encode() == data else f"token_id:{token}"


def usage(costs: Sequence[Usage], choices: int) -> dict[str, Any]:
    """What all answers cost; a prompt with several `choices` counts once."""
    prompt = sum(cost.prompt_tokens for cost in costs[::choices])
    completion = sum(cost.completion_tokens for cost in costs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cost.reused_tokens for cost in costs[::choices])},
    }
