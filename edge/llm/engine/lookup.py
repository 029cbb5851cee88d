"""Guesses at the next tokens from the sequence itself: prompt-lookup decoding, a draft without a draft model.

A text often repeats what stands before: names, code, quotes. Where the last few tokens stood earlier, what followed
them then is tried as a draft, and one pass through the model checks all of it (speculative decoding, arXiv 2211.17192;
the accepted tokens are exactly those that would have been chosen one by one). Must never choose a token.
"""

from dataclasses import dataclass, field

NGRAM = 3  # tokens that must agree before their continuation is worth a try


@dataclass(slots=True)
class Lookup:
    """Where every run of NGRAM tokens of one growing sequence ended last. `seen` tokens are in the index; `width` is
    how many tokens the next draft may have: one more than were right the last time.
    """

    max_width: int
    width: int = 2
    seen: int = NGRAM - 1
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)

    def draft(self, tokens: list[int], most: int) -> tuple[int, ...]:
        """At most `most` tokens that may follow `tokens`; empty where their end is new."""
        # The run that ends the sequence is looked for, not indexed yet: it would find itself.
        for end in range(self.seen + 1, len(tokens)):
            self.ends[tuple(tokens[end - NGRAM : end])] = end
        self.seen = max(self.seen, len(tokens) - 1)
        found = self.ends.get(tuple(tokens[-NGRAM:]))
        if found is None:
            return ()
        return tuple(tokens[found : found + min(self.width, self.max_width, most)])

    def learn(self, accepted: int) -> None:
        """How many tokens of the last draft were right."""
        self.width = accepted + 1
