"""The whole model as the teacher of its exits: what it writes by itself, and its states at the exits and at the end.

Runs through the ranks of the runtime, in float32, so that exits learn from the very states they will see. Owns the
shards it works on, in a folder that is gone afterwards. Must never learn.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.core.random import derive
from fedge.edge.llm.compute.kernels import named
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.engine.engine import Engine
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.models.folder import Folder
from fedge.edge.llm.ranks.head import Head
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.shard import export, open_shard
from fedge.edge.llm.shards.shares import even

SPAN = 256  # tokens of one sequence, at most
SLOTS = 16
Done = Callable[[int, int], None]


class Teacher:
    """The model in `folder`, cut behind the layers `cuts`; its files go to `scratch`."""

    def __init__(self, folder: Folder, cuts: Sequence[int], scratch: Path) -> None:
        self.config = config = folder.config
        self.span = min(SPAN, config.context)
        shares, self._ranks = even(config, 1), []
        kernel = named("numpy-float32", "float32")
        for layers in pairwise((0, *cuts, config.layers)):
            (path,) = export(folder, scratch, shares, "float32", layers=layers)
            shard = open_shard(path)
            blocks = Resident(shard, kernel)
            self._ranks.append(Rank(shard, blocks, Alone(), slots=SLOTS, context=self.span))
        self._embed, self._head = folder.embed, Head(shard, blocks)

    def states(self, step: Step, tokens: Array) -> list[Array]:
        """Rows [tokens, hidden] behind every cut, and last those behind the last layer."""
        found = [self._embed(tokens)]
        for rank in self._ranks:
            found.append(rank.forward(step, found[-1]))
        return found[1:]

    def run(self, step: Step, tokens: Array, rows: Array | None = None, /) -> Array:
        """As the engine asks for logits."""
        last = self.states(step, tokens)[-1]
        wanted = np.arange(len(tokens)) if rows is None else rows
        return self._head.logits(last[wanted])

    def write(self, count: int, seed: int, done: Done | None = None) -> list[list[int]]:
        """`count` sequences that begin as a text does and go on by chance at temperature 1, up to their end or `span`.

        Raises ExperimentError for a model that has no token for the beginning.
        """
        if self.config.bos is None:
            raise ExperimentError("The model has no token that begins a text, so it cannot write one; give a text.")
        start, found = (self.config.bos,), []
        engine = Engine(self, vocab=self.config.vocab, slots=SLOTS, context=self.span, speculate=False)
        try:
            for first in range(0, count, SLOTS):
                numbers = range(first, min(first + SLOTS, count))
                handles = [
                    engine.submit(Request(start, self.span - 1, _by_chance(seed, at), stop_tokens=self.config.eos))
                    for at in numbers
                ]
                for handle in handles:
                    pieces = list(handle)
                    found.append([*start, *(piece.token for piece in pieces if piece.token is not None)])
                if done:
                    done(len(found), count)
        finally:
            engine.close()
        return found

    def states_of(self, sequences: Sequence[Sequence[int]], done: Done | None = None) -> list[Array]:
        """As `states`, for the positions of all sequences one after the other."""
        found = []
        for at, sequence in enumerate(sequences):
            step = Step((Part(0, 0, len(sequence)),), free=(0,))
            found.append(self.states(step, np.asarray(sequence, np.int64)))
            if done:
                done(at + 1, len(sequences))
        return [np.concatenate(rows) for rows in zip(*found, strict=True)]

    def close(self) -> None:
        """Give all memory back."""
        for rank in self._ranks:
            rank.close()


def _by_chance(seed: int, at: int) -> Sampling:
    return Sampling(temperature=1.0, seed=derive(seed, "write", at) >> 1)


@contextmanager
def teacher(folder: Folder, cuts: Sequence[int]) -> Iterator[Teacher]:
    """A teacher and its scratch folder."""
    with TemporaryDirectory(prefix="fedge-teacher-") as scratch:
        one = Teacher(folder, cuts, Path(scratch))
        try:
            yield one
        finally:
            one.close()


def pieces(ids: Sequence[int], bos: int | None, span: int) -> list[list[int]]:
    """A long text as sequences of `span` tokens that begin as a text does; what is left over is dropped."""
    start = [] if bos is None else [bos]
    size = span - len(start)
    return [[*start, *ids[at : at + size]] for at in range(0, len(ids) - size + 1, size)]
