"""What the collaborative benchmark runs on: a model, exits trained once, both halves, prompts, and what is right.

Training text is what the model itself writes; prompts are the beginnings of other texts of its own, drawn from another
seed. Exits are kept in the cache under a name with all settings and a digest of the code that trains them. Owns that
cache, and the judgement of exits and of texts against the whole model. Must never measure time.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import collm_cloud
from fedge.core.errors import ModelError
from fedge.core.limits import LlmLimits
from fedge.core.random import derive
from fedge.edge.llm.collab import exits as exit_files
from fedge.edge.llm.collab import fit, teacher, thresholds, train
from fedge.edge.llm.collab.decider import confidence
from fedge.edge.llm.collab.exits import Exits
from fedge.edge.llm.collab.halves import CLOUD, Halves, cut
from fedge.edge.llm.collab.segments import Segments
from fedge.edge.llm.collab.thresholds import Seen
from fedge.edge.llm.compute.choice import kernel_for
from fedge.edge.llm.compute.kernels import named
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.engine.sampler import Sampling, sample
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shard import export, open_shard
from fedge.edge.llm.shards.shares import even

CACHE = Path.home() / ".cache/fedge-data"
AGREEMENT = 0.98
_CODE = (exit_files, fit, teacher, thresholds, train)
_HELD_OUT = "held-out prompts"


@dataclass(frozen=True, slots=True)
class Plan:
    """A model and how much is done with it: `generate` sequences to learn from, `steps` of training; `prompts` of
    `prompt_tokens`, up to `tokens` greedy ones each; where a link delays, `few` of them, up to `few_tokens` each.
    `kind` is that of the weights at both ends. Of 8 bits, kernels may round the states to 8 bits too, which makes much
    of the least difference: then states in float16, and even a prompt computed at once, change a token in a hundred.
    """

    name: str
    exits: tuple[int, ...]
    generate: int
    steps: int
    prompts: int = 20
    prompt_tokens: int = 16
    tokens: int = 100
    few: int = 4
    few_tokens: int = 40
    kind: Kind = "float32"

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.prompt_tokens + self.tokens + 8


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured. `texts` are the whole model's greedy answers; `seen` what the exits say along them."""

    plan: Plan
    halves: Halves
    whole: Path
    exits: Exits
    kernel: str
    hidden: int
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[int, ...], ...]
    seen: Seen

    @property
    def upper(self) -> Path:
        """The cloud's shard."""
        return self.halves.path / CLOUD

    @property
    def calibrated(self) -> float:
        """The threshold that was chosen for AGREEMENT, on other texts."""
        return self.exits.exits[0].threshold


@contextmanager
def subject(plan: Plan, folder: Path, cache: Path = CACHE) -> Iterator[Subject]:
    """The model in `folder`, prepared."""
    exits = trained(plan, folder, cache)
    with TemporaryDirectory(prefix="fedge-collm-") as scratch:
        halves = cut(folder, Path(scratch) / "halves", exits, plan.kind, plan.kind)
        with open_folder(folder) as opened:
            (whole,) = export(opened, Path(scratch), even(opened.config, 1), plan.kind)
            hidden = opened.config.hidden
        shard = open_shard(whole)
        kernel = kernel_for(shard, None, LlmLimits(), invariant=True).name
        model = collm_cloud.model(shard, kernel, plan.context)
        try:
            prompts = tuple(_prompt(model, plan, at) for at in range(plan.prompts))
            texts = tuple(tuple(collm_cloud.greedy(model, prompt, plan.tokens)) for prompt in prompts)
        finally:
            model.close()
        seen = along(halves, kernel, plan.context, prompts, texts)
        yield Subject(plan, halves, whole, exits, kernel, hidden, prompts, texts, seen)


def trained(plan: Plan, folder: Path, cache: Path) -> Exits:
    """Exits of the cache, or new ones."""
    layers = "-".join(map(str, plan.exits))
    path = cache / f"collm-{plan.name}-exits-{layers}-{plan.generate}x{plan.steps}-{_code()}.safetensors"
    with open_folder(folder) as opened:
        digest = opened.digest
    try:
        if path.exists() and (found := exit_files.load(path)).model == digest:
            return found
    except ModelError as error:
        say(str(error))
    cache.mkdir(parents=True, exist_ok=True)
    effort = fit.Effort(steps=plan.steps)
    return train.train_exits(
        folder, "", plan.exits, path, effort=effort, generate=plan.generate, agreement=AGREEMENT, progress=_progress()
    )


def along(
    halves: Halves,
    kernel: str,
    context: int,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
) -> Seen:
    """What the exits say at every position of the whole model's own texts, and whether it is the text's next token."""
    shards, found = halves.edge()
    segments = Segments(shards, lambda shard: Resident(shard, named(kernel, shard.kind)), context=context)
    sure: list[list[float]] = [[] for _ in found.exits]
    agrees: list[list[bool]] = [[] for _ in found.exits]
    try:
        for prompt, text in zip(prompts, texts):
            segments.clear()
            segments.feed([*prompt, *text[:-1]])
            for number, one in enumerate(found.exits):
                rows = segments.reach(number)[len(prompt) - 1 :]
                logits = exit_files.logits(one, rows, segments.head, found.eps)
                sure[number] += [min(1.0, confidence(row)) for row in logits]
                agrees[number] += (logits.argmax(axis=1) == np.asarray(text)).tolist()
            segments.take_states()
    finally:
        segments.close()
    return Seen(np.asarray(sure, np.float64), np.asarray(agrees, np.bool_))


def agreement(model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are the whole model's choice behind the same text."""
    same = total = 0
    for prompt, ids in zip(prompts, answers):
        rows = np.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
        logits = collm_cloud.forward(model, [*prompt, *ids], 0, rows)
        same += int((logits.argmax(axis=1) == np.asarray(ids)).sum())
        total += len(ids)
    return same / total


def say(what: str) -> None:
    """Progress."""
    print(what, file=sys.stderr, flush=True)


def _prompt(model: Model, plan: Plan, at: int) -> tuple[int, ...]:
    """The beginning of a text, drawn at temperature 1."""
    if model.config.bos is None:
        raise ModelError("The model has no token that begins a text; take another one.")
    ids = [model.config.bos]
    sampling = Sampling(seed=derive(0, _HELD_OUT, at) >> 1)
    while len(ids) < plan.prompt_tokens:
        logits = collm_cloud.forward(model, ids, 0)[0]
        logits[list(model.config.eos)] = -1e30
        ids.append(sample(logits, sampling, {}, len(ids)))
    return tuple(ids)


def _progress() -> Callable[[str, float], None]:
    """A line for every tenth of what training does."""
    began_at, told = time.monotonic(), set[tuple[str, int]]()

    def tell(what: str, share: float) -> None:
        tenth = int(10 * share)
        if (what, tenth) not in told:
            told.add((what, tenth))
            say(f"exits: {what} {10 * tenth} %, {time.monotonic() - began_at:.0f} s")

    return tell


def _code() -> str:
    """What the numbers of trained exits follow from, beside the settings."""
    found = hashlib.sha256()
    for module in _CODE:
        found.update(Path(str(module.__file__)).read_bytes())
    return found.hexdigest()[:8]
