"""Components by name: `kind = "compass"` in a file finds the class, `kind = "package.module:name"` the user's own.

Owns look-up, instantiation from plain settings, and the sentence a user reads when a name or a setting is wrong.
Must never import the components it names before one is asked for: entries are dotted paths.
"""

import dataclasses
import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

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
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}."


def explained(error: msgspec.ValidationError) -> tuple[str, str]:
    """(the dotted key, what is wrong with its value in plain words) of "Expected `int`, got `str` - at `$.a.b`"."""
    message, _, path = str(error).partition(" - at `$")
    words = re.sub("`([^`]*)`", lambda found: " or ".join(map(_named, found[1].split(" | "))), message)
    return path.strip("`").lstrip("."), words[0].lower() + words[1:]


def _named(kind: str) -> str:
    return _KINDS.get(kind, f"`{kind}`")


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
    """The components of one slot. `entries` maps a kind to "package.module:Class"."""

    slot: str
    entries: Mapping[str, str]

    def find(self, kind: str) -> Any:
        """The class or function for `kind`. Raises ExperimentError with the nearest known kind."""
        if ":" in kind:
            return load(kind, self.slot)
        if kind not in self.entries:
            raise ExperimentError(f"{self.slot}: no kind {kind!r}; {nearest(kind, self.entries)}")
        return load(self.entries[kind], self.slot)

    def build(self, settings: Mapping[str, Any]) -> Any:
        """An instance from {"kind": ..., **fields}; unknown fields and wrong types are refused by name."""
        values = dict(settings)
        kind = values.pop("kind", None)
        if not isinstance(kind, str):
            raise ExperimentError(f"{self.slot}: needs kind = one of {', '.join(sorted(self.entries))}.")
        cls = self.find(kind)
        if not dataclasses.is_dataclass(cls):
            raise ExperimentError(f"{self.slot}: {kind!r} is not a dataclass of settings.")
        fields = [item.name for item in dataclasses.fields(cls) if item.init]
        for name in values:
            if name not in fields:
                raise ExperimentError(f"{self.slot}.{name}: {kind!r} has no such setting; {nearest(name, fields)}")
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            path, what = explained(error)
            where = f"{self.slot}.{path}" if path else f"{self.slot} ({kind})"
            raise ExperimentError(f"{where}: {what}.") from None
