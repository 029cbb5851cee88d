"""The engine over a real model of random weights: what is batched, cached, copied, guessed and recovered
gives the tokens that the whole model in plain NumPy gives each user alone."""

import random
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from fedge.core.errors import RankLost
from fedge.edge.llm.engine.engine import Engine
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.engine.scheduler import Scheduler
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.models.config import read
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.models.tokenizer import Tokenizer
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.shards.quant import Matrix
from fedge.edge.llm.shards.shard import export, open_shard
from fedge.edge.llm.shards.shares import even
from tests import llm_reference
from tests.llm_fixture import folder

GREEDY = Sampling(temperature=0)


class Plain:
    """All blocks of a shard in memory, in float32."""

    def __init__(self, shard):
        views = [shard.view(one, shard.mapped[one.offset : one.offset + one.bytes]) for one in shard.blocks]
        self.views = [
            {name: linear(one) if isinstance(one, Matrix) else one for name, one in view.items()} for view in views
        ]

    def take(self, index):
        return self.views[index]

    def release(self, index):
        assert index < len(self.views)

    def close(self):
        self.views = []


def linear(matrix):
    weight = llm_reference.dequantise(matrix).T
    return lambda x: x @ weight


@contextmanager
def opened(path, out, *, slots):
    """The model of a folder, of one rank."""
    out.mkdir()
    with open_folder(path) as source:
        shard = open_shard(export(source, out, even(read(path), 1), "float32")[0])
    model = Model(shard, Plain(shard), Alone(), slots=slots, context=64)
    try:
        yield model
    finally:
        model.close()


class Flaky:
    """The model, which loses a rank in some of its passes, after others have written their keys and values."""

    def __init__(self, model, losses):
        self.model, self.losses, self.passes = model, losses, 0

    def run(self, step, tokens, rows):
        self.passes += 1
        out = self.model.run(step, tokens, rows)
        if self.passes in self.losses:
            raise RankLost("Rank 1 fell silent.", 1)
        return out


def assert_greedy(path, prompt, answer):
    """Every token is the likeliest one after all before it, or as likely but for rounding."""
    logits = llm_reference.logits(path, [*prompt, *answer])[len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(answer)), answer]
    assert (logits.max(axis=1) - chosen <= 1e-4 * np.abs(logits).max()).all()


@pytest.mark.parametrize("losses", [(), (4, 9)])
def test_twenty_users_who_come_and_go_get_what_the_whole_model_tells_each(tmp_path, losses):
    path = folder(tmp_path / "model", vocab=128)
    chance = random.Random(11)
    texts = [[chance.randrange(128) for _ in range(40)] for _ in range(2)]
    with opened(path, tmp_path / "shards", slots=3) as model:
        flaky = Flaky(model, losses)
        engine = Engine(flaky, vocab=128, slots=3, context=64, max_kv_tokens=150, recover=lambda: flaky)
        asked = []
        for _ in range(20):
            prompt = chance.choice(texts)[: chance.randrange(1, 41)] + chance.choices(range(128), k=2)
            handle = engine.submit(Request(tuple(prompt), chance.randrange(1, 20), GREEDY))
            asked.append((prompt, handle))
            if chance.random() < 0.2:
                threading.Timer(chance.random() / 10, handle.cancel).start()
            time.sleep(chance.random() / 100)
        answers = [list(handle) for _, handle in asked]
        engine.close()
    stats = engine.stats()
    assert stats["reused_tokens"] > 100
    assert stats["recoveries"] == len(losses)
    for (prompt, _), pieces in zip(asked, answers, strict=True):
        assert pieces[-1].finish in ("length", "cancelled")
        got = [piece.token for piece in pieces if piece.token is not None]
        if got:
            assert_greedy(path, prompt, got)


def test_a_copied_prefix_and_a_reused_one_hold_the_keys_and_values_of_their_tokens(tmp_path):
    path = folder(tmp_path / "model", vocab=128)
    text = [(37 * at + at // 7) % 128 for at in range(40)]
    prompts = {1: text, 2: [*text[:30], 1, 2], 3: [*text[:25], 5]}
    answers = {key: [] for key in prompts}
    scheduler = Scheduler(2, 64, 30, 6)
    with opened(path, tmp_path / "shards", slots=2) as model:
        scheduler.add(1, text, 20)
        for passes in range(30):
            if passes == 4:
                scheduler.add(2, prompts[2], 5)
                scheduler.add(3, prompts[3], 5)
            plan = scheduler.plan()
            logits = model.run(plan.step, plan.tokens, plan.rows)
            for want in plan.wants:
                token = int(np.argmax(logits[want.row]))
                scheduler.accept(want, [token])
                answers[want.key].append(token)
                if len(answers[want.key]) == 5 + 15 * (want.key == 1):
                    scheduler.end(want.key)
            if not scheduler.running:
                break
    assert scheduler.copied_tokens == 30
    assert scheduler.reused_tokens == 55
    for key, answer in answers.items():
        assert len(answer) == 5 + 15 * (key == 1)
        assert_greedy(path, prompts[key], answer)


def test_the_text_is_what_the_tokenizer_makes_of_the_tokens(tmp_path):
    path = folder(tmp_path / "model", vocab=300)
    tokenizer = Tokenizer(path)
    prompt = tuple(tokenizer.encode("fedge"))
    with opened(path, tmp_path / "shards", slots=4) as model:
        engine = Engine(model, tokenizer, vocab=tokenizer.vocab, slots=4, context=64)
        whole = list(engine.submit(Request(prompt, 40, GREEDY, stop_tokens=())))
        text = "".join(piece.text for piece in whole)
        stop = text[len(text) // 2 :][:3]
        cut = list(engine.submit(Request(prompt, 40, GREEDY, stop=(stop,), stop_tokens=())))
        engine.close()
    stream = tokenizer.stream()
    assert text == "".join(stream.push(piece.token) for piece in whole) + stream.flush()
    assert len(text) > 10
    assert "".join(piece.text for piece in cut) == text[: text.index(stop)]
    assert cut[-1].finish == "stop"
