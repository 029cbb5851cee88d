"""Text to token ids and back: `tokenizer.json`, `tokenizer_config.json` and the chat template of a model's folder.

Owns the bytes of each token, and the stream of text that never holds half a character. Must never compute with a model.
"""

import codecs
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from fedge.core.errors import DataError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.models.config import read
from fedge.edge.llm.models.template import Messages, Template

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPACE = "\u2581"  # how sentencepiece writes a space
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # and a byte for which it has no token


class Tokenizer:
    """The tokenizer of a folder. `eos` are the ids that end a text, `vocab` is how many ids the model knows.

    Raises ModelError where a file is missing or broken. Any number of threads may use it.
    """

    def __init__(self, folder: Path, limits: LlmLimits = LlmLimits()) -> None:
        config = read(folder, limits)
        self._limits, self._folder = limits, folder
        source = _text(folder / "tokenizer.json", limits)
        if not source:
            remedy = "save it with AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers"
            raise ModelError(f"{folder} has no tokenizer.json; {remedy}.")
        try:
            self._inner = tokenizers.Tokenizer.from_str(source)
            self._inner.no_truncation()
            self._inner.no_padding()
            self._pieces = _Pieces(self._inner)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises Exception itself, and its panics are not even that
            raise ModelError(f"{folder / 'tokenizer.json'} cannot be used ({error!s:.200}); fetch it again.") from error
        self._settings = _json(folder / "tokenizer_config.json", limits)
        more = _json(folder / "special_tokens_map.json", limits)
        self.special = {name: _content(self._settings.get(name) or more.get(name)) for name in _SPECIAL}
        self.special = {name: token for name, token in self.special.items() if token}
        ends = self._inner.token_to_id(self.special.get("eos_token", ""))
        self.vocab = config.vocab
        self.eos = tuple(dict.fromkeys((*config.eos, *(() if ends is None else (ends,)))))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; with `special` those that the model wants around a text are added. What `chat` gives has them
        already. Other threads run meanwhile. Raises DataError for text that is no Unicode, or has a token that the
        model does not know.
        """
        try:
            # A batch of one: the library's `encode` keeps the interpreter's lock until it is done.
            ids: list[int] = self._inner.encode_batch([text], add_special_tokens=special)[0].ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # lone surrogates; as above
            raise DataError(f"The text cannot be turned into tokens ({error!s:.200}); send valid Unicode.") from error
        if max(ids, default=0) >= self.vocab:
            raise DataError("The text holds a token that the tokenizer has and the model has not; leave it out.")
        return ids

    def bytes_of(self, token: int) -> bytes:
        """What a token writes, be it half a character; nothing for special tokens."""
        return self._pieces.of(token)

    def stream(self, start: bool = False) -> "Detokenizer":
        """Text as tokens come. `start`: a text begins here, so that the space that sentencepiece puts before a text
        is dropped; else the ids go on where a prompt ended, and the space stays.
        """
        return Detokenizer(self._pieces, start)

    def chat(self, messages: Messages) -> str:
        """The text of a conversation, up to where the answer begins; encode it with `special=False`.

        Raises ModelError where the model has no template, or one that fails; DataError where it refuses the messages.
        """
        return self._template.render(messages, self.special)

    @cached_property
    def _template(self) -> Template:
        source = _text(self._folder / "chat_template.jinja", self._limits) or self._settings.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {str(one.get("name")): one.get("template") for one in source if isinstance(one, dict)}
            source = named.get("default")
        if not isinstance(source, str) or not source:
            raise ModelError(f"{self._folder} has no chat template, as it is no chat model; use completions.")
        return Template(source, self._limits)


class Detokenizer:
    """One stream of text. A character is given out when its last byte has come."""

    def __init__(self, pieces: "_Pieces", start: bool) -> None:
        self._pieces, self._first = pieces, start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        data = self._pieces.of(token)
        if data and self._first:
            self._first = False
            data = data[self._pieces.strip and data.startswith(b" ") :]
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left when the text ends: U+FFFD for half a character."""
        return self._decoder.decode(b"", final=True)


class _Pieces:
    """The bytes of every token. Two kinds are known: byte-level BPE (GPT-2 and most since), and sentencepiece."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        decoder = json.loads(inner.to_str()).get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        kinds = {step.get("type") for step in steps}
        self._inner = inner
        self._bytes = _byte_letters() if "ByteLevel" in kinds else None
        if self._bytes is None and not kinds & {"ByteFallback", "Metaspace"}:
            raise ModelError(f"its decoder is {sorted(map(str, kinds))}; fedge knows byte-level BPE and sentencepiece")
        self.strip = self._bytes is None and any(map(_strips, steps))
        self._hidden = {at for at, token in inner.get_added_tokens_decoder().items() if token.special}
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """What the token writes; nothing for special tokens and for ids that no token has."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._find(token)
        return known

    def _find(self, token: int) -> bytes:
        piece = None if token in self._hidden or token < 0 else self._inner.id_to_token(token)
        if piece is None:
            return b""
        if self._bytes is not None:
            known = [self._bytes.get(letter) for letter in piece]
            return bytes(one for one in known if one is not None) if None not in known else piece.encode()
        if byte := _BYTE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ").encode()


def _byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE writes each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


def _strips(step: dict[str, Any]) -> bool:
    """Whether a step of the decoder drops the space before a text."""
    strip = step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0
    return strip or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")


def _content(token: object) -> str:
    """A special token as a text: it is written as one, or as an object with its `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _text(path: Path, limits: LlmLimits) -> str:
    """The file as text, empty where there is none."""
    try:
        if not path.exists():
            return ""
        if not path.is_file() or path.stat().st_size > limits.max_tokenizer_bytes:  # a pipe would hang
            raise ModelError(f"{path} is no file, or above {limits.max_tokenizer_bytes} bytes; fetch it again.")
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({error!s:.200}); fetch it again.") from error


def _json(path: Path, limits: LlmLimits) -> dict[str, Any]:
    """The object in a file, empty where there is none."""
    try:
        return msgspec.json.decode(_text(path, limits) or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ModelError(f"{path} cannot be used ({error!s:.200}); fetch it again.") from error
