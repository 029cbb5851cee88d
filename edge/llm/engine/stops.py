"""Where a text ends: stop strings, found across token boundaries.

Owns the characters that may turn out to be the beginning of a stop string. Must never look at tokens.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class StopText:
    """The end of one text as it grows. `held` is what has not been given out yet."""

    stops: tuple[str, ...]
    held: str = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be given out now, and whether a stop string has come: it and all behind it are dropped."""
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            out, self.held = self.held[: min(found)], ""
            return out, True
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        out, self.held = self.held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
