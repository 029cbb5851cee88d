"""Tiers of clients by latency, as FedAT and TiFL use them. Owns the split and nothing else."""

from collections.abc import Mapping
from itertools import pairwise


def split(durations: Mapping[str, float], tiers: int) -> list[list[str]]:
    """`tiers` groups of near-equal size, fastest first; by seconds per task, then name. Fewer where clients are few."""
    ranked = sorted(durations, key=lambda name: (durations[name], name))
    count = max(1, min(tiers, len(ranked)))
    cuts = [round(index * len(ranked) / count) for index in range(count + 1)]
    return [ranked[start:end] for start, end in pairwise(cuts)]
