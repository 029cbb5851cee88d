"""A model's chat template: messages become the text it was trained on.

Owns the sandbox in which the template runs, with the names that Hugging Face's templates expect, and its limits. A
template is code of whoever made the model. It reaches no file and no attribute that begins with an underscore; its
size, the passes of its loops, its calls and the length of its text are bounded. What one expression builds is not: a
string times a large number costs its memory. Must never see anything but plain data.
"""

import datetime
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedge.core.errors import DataError, ModelError
from fedge.core.limits import LlmLimits

Messages = Sequence[Mapping[str, Any]]
_PASSES = "fedge_passes"


class Template:
    """One template, compiled. Raises ModelError where it cannot be. Any number of threads may use it, in turn."""

    def __init__(self, source: str, limits: LlmLimits = LlmLimits()) -> None:
        if len(source) > limits.max_template_text:
            raise ModelError(f"The chat template is above {limits.max_template_text} characters; use completions.")
        self._limits = limits
        self._lock = threading.Lock()  # of the passes that are left
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # the parser, the compiler and Python's own compiler each have theirs
            raise ModelError(f"The chat template is broken ({error!s:.200}); mend it, or use completions.") from error

    def render(self, messages: Messages, special: Mapping[str, str]) -> str:
        """The text up to where the assistant's answer begins. `special` are bos_token, eos_token and their like.

        Raises DataError where the template refuses the messages, ModelError where it fails or exceeds the limits.
        """
        names = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        with self._lock:
            self._environment.left = self._limits.max_template_passes
            try:
                return self._text({**names, **special})
            except (DataError, ModelError):
                raise
            except Exception as error:  # it is a program: it can fail in every way
                raise ModelError(f"The chat template failed ({error!s:.200}); mend it, or use completions.") from error

    def _text(self, names: Mapping[str, Any]) -> str:
        pieces, room = [], self._limits.max_template_text
        for piece in self._template.generate(names):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise ModelError("The chat template writes too much; shorten the messages, or use completions.")
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which every pass of a loop and every call counts: nothing else can go on without end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.left = 0
        self.filters |= {"tojson": _to_json, _PASSES: self._passes}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def call(self, context: Context, what: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Overrides the sandbox's."""
        self._count()
        return super().call(context, what, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:  # what is handed to its `loop()` would pass uncounted
                raise TemplateSyntaxError("a recursive loop is not supported", loop.lineno)
            loop.iter = nodes.Filter(loop.iter, _PASSES, [], [], None, None)
        return tree

    def _passes(self, items: Iterable[Any]) -> Iterator[Any]:
        """All items of a loop, counted."""
        for item in items:
            self._count()
            yield item

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ModelError("The chat template loops too often; shorten the messages, or use completions.")


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as Hugging Face's templates want it; jinja's own filter writes for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _now(form: str) -> str:
    """The date: Llama 3's template writes it. The clock is the caller's, as in transformers."""
    return datetime.datetime.now().astimezone().strftime(form)


def _refuse(message: object) -> NoReturn:
    raise DataError(f"The model's chat template refuses the messages ({message!s:.200}); change their roles or order.")
