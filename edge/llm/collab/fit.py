"""The training of exits: what they say is drawn towards what the model says at its end (distillation).

Nearly all of the work is the product with the vocabulary. So a step looks at the tokens that the model likes most on
this text, and at a few of all others drawn by chance, which stand for the rest: their logits are raised by ln(how many
others there are / how many were drawn), so that their sum is right on average (sampled softmax, Jean et al., ACL 2015).
Owns the only import of torch of the collaborative mode. Must never touch a file.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import cos, log, pi

import numpy as np
import torch
from torch.nn.functional import log_softmax, silu, softmax

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.core.random import derive
from fedge.edge.llm.collab.exits import Exit

FREQUENT, DRAWN = 2048, 512  # tokens of the vocabulary in a step
COUNTED = 4096  # positions on which the model's taste is looked at
RATE, WARM_UP = 1e-3, 20  # of Adam; steps
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to train: `steps`, or as many as `seconds` allow; `tokens` positions each. More than one thread
    pays only where nobody else wants the cores.
    """

    steps: int = 600
    seconds: float | None = None
    tokens: int = 512
    threads: int = 1

    def done(self, step: int, elapsed_s: float) -> float:
        """The share of the effort that is spent; 1 is the end."""
        return min(1.0, step / self.steps if self.seconds is None else elapsed_s / self.seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """`states` [n, hidden] of each exit, and `final` [n, hidden], all of the same positions; the model's final `norm`
    [hidden] has been applied to the latter. `head` [vocab, hidden].
    """

    states: Sequence[Array]
    final: Array
    head: Array
    eps: float


def fit(
    exits: Sequence[Exit], lesson: Lesson, effort: Effort, seed: int, progress: Callable[[float], None] | None = None
) -> tuple[Exit, ...]:
    """The exits, trained from where they stand, all together. With `steps` the same seed gives the same exits.

    Raises ModelError where training leads to numbers that are not finite.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(effort.threads)
    try:
        return _fit(exits, lesson, effort, seed, progress or (lambda _: None))
    finally:
        torch.set_num_threads(threads)


def _fit(
    exits: Sequence[Exit], lesson: Lesson, effort: Effort, seed: int, progress: Callable[[float], None]
) -> tuple[Exit, ...]:
    generator = torch.Generator().manual_seed(derive(seed, "exits") >> 1)
    states, final = [torch.from_numpy(one) for one in lesson.states], torch.from_numpy(lesson.final)
    vocabulary = Vocabulary(torch.from_numpy(lesson.head), final, generator)
    learned = [_tensors(one) for one in exits]
    adam = torch.optim.Adam([tensor for one in learned for tensor in one.values()], lr=RATE)
    started, step, done = time.monotonic(), 0, 0.0
    while done < 1.0:
        for group in adam.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * (1 + cos(pi * done)) / 2
        rows = torch.randint(len(final), (effort.tokens,), generator=generator)
        head, raised = vocabulary.draw(generator)
        wanted = softmax(final[rows] @ head.T + raised, 1)
        adam.zero_grad()
        for one, state in zip(learned, states, strict=True):
            said = log_softmax(_features(one, state[rows], lesson.eps) @ head.T + raised, 1)
            (-(wanted * said).sum(1).mean()).backward()  # type: ignore[no-untyped-call]
        adam.step()
        step += 1
        done = effort.done(step, time.monotonic() - started)
        progress(done)
    return tuple(_exit(one, tensors) for one, tensors in zip(exits, learned, strict=True))


class Vocabulary:
    """The rows of the head that a step looks at."""

    def __init__(self, head: torch.Tensor, final: torch.Tensor, generator: torch.Generator) -> None:
        self._head = head
        if len(head) <= FREQUENT + DRAWN:
            self._liked, self._others = head, head[:0]
            return
        mass = torch.zeros(len(head))
        sample = torch.randperm(len(final), generator=generator)[:COUNTED]
        for at in range(0, len(sample), 512):
            mass += softmax(final[sample[at : at + 512]] @ head.T, 1).sum(0)
        order = mass.argsort(descending=True, stable=True)
        self._liked, self._others = head[order[:FREQUENT]], order[FREQUENT:]

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [m, hidden] of the head, and by how much their logits are raised, [m]."""
        if not len(self._others):
            return self._liked, torch.zeros(len(self._liked))
        drawn = self._others[torch.randint(len(self._others), (DRAWN,), generator=generator)]
        raised = torch.zeros(FREQUENT + DRAWN)
        raised[FREQUENT:] = log(len(self._others) / DRAWN)
        return torch.cat([self._liked, self._head[drawn]]), raised


_NAMES = ("feed_norm", "gate_up", "down", "norm")


def _tensors(one: Exit) -> Tensors:
    return {name: torch.from_numpy(np.array(getattr(one, name))).requires_grad_() for name in _NAMES}


def _exit(one: Exit, tensors: Tensors) -> Exit:
    feed_norm, gate_up, down, norm = (tensors[name].detach().numpy() for name in _NAMES)
    if not all(np.isfinite(array).all() for array in (feed_norm, gate_up, down, norm)):
        raise ModelError(f"The exit after layer {one.layer} cannot be trained: numbers grew beyond all bounds.")
    return replace(one, feed_norm=feed_norm, gate_up=gate_up, down=down, norm=norm)


def _features(one: Tensors, x: torch.Tensor, eps: float) -> torch.Tensor:
    """What the head is given, as `exits.logits` computes it."""
    gate, up = (_rms(x, one["feed_norm"], eps) @ one["gate_up"].T).chunk(2, -1)
    return _rms(x + (silu(gate) * up) @ one["down"].T, one["norm"], eps)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight
