"""Plain data back to TOML text, so that a run folder can hold the experiment as it was resolved.

Owns the emitting half that the standard library leaves out: strings, booleans, numbers, lists and tables; `None` is a
key left out. Must never know what the keys mean. Follows TOML 1.0; what is written reads back equal.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from fedge.core.errors import ExperimentError

BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(data: Mapping[str, Any]) -> str:
    """TOML text. Raises ExperimentError where a value has no TOML form."""
    return "\n".join(_table(data, ())).strip() + "\n"


def _table(data: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {key: value for key, value in data.items() if not isinstance(value, Mapping) and value is not None}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    if path and (lines or not any(isinstance(value, Mapping) for value in data.values())):
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for key, value in data.items():
        if isinstance(value, Mapping):
            lines += _table(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        pairs = [f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    raise ExperimentError(f"{value!r} has no place in an experiment file; use text, numbers, lists and tables.")
