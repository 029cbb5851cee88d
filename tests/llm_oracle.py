"""A model whose logits are a function of a slot's whole history, which it holds token by token: what the scheduler gets
wrong about slots, positions, copies or frees either raises here or changes the tokens that come out."""

import numpy as np

from fedge.edge.llm.engine.sampler import Sampling, sample

VOCAB = 11


class Oracle:
    """`memory`: how many of the last tokens the logits depend on; few make texts that repeat themselves."""

    def __init__(self, slots, context, memory=None):
        self.slots = [[] for _ in range(slots)]
        self.context, self.memory = context, memory
        self.steps = []
        self.fail = []  # exceptions to raise, one per pass; None for a pass that works

    def run(self, step, tokens, rows):
        self.steps.append(step)
        for slot in step.free:
            self.slots[slot] = []
        for copy in step.copies:
            assert copy.source != copy.target
            assert 0 < copy.count <= len(self.slots[copy.source])
            self.slots[copy.target] = self.slots[copy.source][: copy.count]
        assert step.tokens == len(tokens) > 0
        assert len({part.slot for part in step.parts}) == len(step.parts)
        flat, at = [], 0
        for part in step.parts:
            held = self.slots[part.slot]
            assert part.count > 0
            assert part.start <= len(held), "a position was skipped"
            assert part.start + part.count <= self.context
            self.slots[part.slot] = held[: part.start] + [int(one) for one in tokens[at : at + part.count]]
            flat += [self.slots[part.slot][: part.start + count + 1] for count in range(part.count)]
            at += part.count
        if self.fail and (error := self.fail.pop(0)):
            raise error
        return np.array([logits(flat[row], self.memory) for row in rows], np.float32).reshape(len(rows), VOCAB)


def logits(history, memory=None):
    seen = tuple(history if memory is None else history[-memory:])
    return np.random.default_rng(list(seen)).normal(0, 3, VOCAB).astype(np.float32)


def alone(prompt, new_tokens, sampling=Sampling(temperature=0), memory=None, stop_tokens=()):
    """What one request gets from a model that nobody shares, computed anew for every token."""
    tokens, counts = list(prompt), {}
    for _ in range(new_tokens):
        token = sample(logits(tokens, memory), sampling, counts, len(tokens))
        tokens.append(token)
        counts[token] = counts.get(token, 0) + 1
        if token in stop_tokens:
            break
    return tokens[len(prompt) :]
