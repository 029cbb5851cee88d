"""Components by name: `kind = "compass"` in a file finds the class, `kind = "package.module:name"` the user's own.

Owns look-up, instantiation from plain settings, and the sentence a user reads when a name or a setting is wrong.
Must never import the components it names before one is asked for: entries are dotted paths.
"""

import dataclasses
import difflib
import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args, get_type_hints

import msgspec

from fedge.core.errors import ExperimentError, FedgeError

_KINDS = {  # as a user of TOML knows them
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that names the closest known word, or lists all."""
    known = list(known)
    if not known:
        return "it has none."
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}."


def explained(error: msgspec.ValidationError) -> tuple[str, str]:
    """(the dotted key, what is wrong with its value in plain words) of "Expected `int`, got `str` - at `$.a.b`"."""
    message, _, path = str(error).partition(" - at `$")
    path = path.strip("`").lstrip(".")
    if missing := re.fullmatch("Object missing required field `(.*)`", message):
        return f"{path}.{missing[1]}".lstrip("."), "is needed, and was left out"
    words = re.sub("`([^`]*)`", lambda found: _named(found[1].split(" | ")), message)
    return path, words[0].lower() + words[1:]


def _named(kinds: list[str]) -> str:
    """As TOML has them, which has no null: a key may be left out, but not be nothing."""
    given = [kind for kind in kinds if kind != "null"] or kinds
    return " or ".join(_KINDS.get(kind, f"`{kind}`") for kind in given)


def _one_of(literal: Any, value: Any) -> str:
    """That this value is none of those of a Literal."""
    known = ", ".join(map(repr, get_args(literal)))
    return f"must be one of {known}, not {value!r}"


def load(path: str, where: str) -> Any:
    """The object at "package.module:name". Raises ExperimentError; `where` names the setting in the sentence."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ExperimentError(f"{where}: {path!r} is not of the form 'package.module:name'.")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ExperimentError(f"{where}: cannot import {module!r} ({error}); install it or mend the path.") from error
    except AttributeError:
        raise ExperimentError(f"{where}: module {module!r} has no {name!r}.") from None
    except FedgeError:
        raise
    except Exception as error:  # a plug-in boundary: importing runs the user's code
        raise ExperimentError(f"{where}: importing {module!r} raised {error!r}; mend that module.") from error


@dataclasses.dataclass(frozen=True)
class Registry:
    """The components of one slot. `entries` maps a kind to "package.module:Class".

    `presets` are more kinds, which the slot's own builder replaces before it asks here. Where a slot holds a list
    (`several`), a sentence about a setting names the kind it belongs to.
    """

    slot: str
    entries: Mapping[str, str]
    presets: Collection[str] = ()
    several: bool = False

    def find(self, kind: str) -> Any:
        """The class or function for `kind`. Raises ExperimentError with the nearest known kind."""
        if ":" in kind:
            return load(kind, self.slot)
        if kind not in self.entries:
            raise ExperimentError(f"{self.slot}: no kind {kind!r}; {nearest(kind, (*self.entries, *self.presets))}")
        return load(self.entries[kind], self.slot)

    def build(self, settings: Mapping[str, Any], around: Collection[str] = (), called: str = "") -> Any:
        """An instance from {"kind": ..., **fields}; unknown fields and wrong types are refused by name, with the
        nearest of its own and of those `around` it, which somebody else reads. `called` is the kind as the user knows
        it. Raises ExperimentError.
        """
        values = dict(settings)
        kind = values.pop("kind", None)
        if not isinstance(kind, str):
            known = ", ".join(sorted((*self.entries, *self.presets)))
            raise ExperimentError(f"{self.slot}: needs kind = one of {known}.")
        cls = self.find(kind)
        if not dataclasses.is_dataclass(cls):
            raise ExperimentError(f"{self.slot}: {kind!r} is not a dataclass of settings.")
        where, called = f"{self.slot}.{kind}" if self.several else self.slot, called or kind
        fields = [item.name for item in dataclasses.fields(cls) if item.init]
        for name in values:
            if name not in fields:
                raise ExperimentError(
                    f"{where}.{name}: {called!r} has no such setting; {nearest(name, (*fields, *around))}"
                )
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            path, what = explained(error)
            if what.startswith("invalid enum value") and path in values:
                what = _one_of(get_type_hints(cls)[path], values[path])
            raise ExperimentError(f"{where}.{path}: {what}." if path else f"{where} ({called}): {what}.") from None
