"""Rules and pre-aggregators as formulas on rows, slow and obvious; `weights` add up to 1. And what tests share."""

import itertools

import numpy as np

from fedge.core.random import generator
from fedge.strategies.aggregators.evidence import Evidence


def evidence(rows, f=0, weights=None, names=None, seed=0):
    n = len(rows)
    weights = np.full(n, 1 / n) if weights is None else np.asarray(weights) / np.sum(weights)
    names = tuple(names or (f"client-{index:02d}" for index in range(n)))
    return Evidence(rows @ rows.T, weights, f, names, seed)


def same(found, wanted, rtol=1e-7, size=1.0):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * size)


def gap(one, other):
    return float(np.sqrt(((one - other) ** 2).sum()))


def krum_scores(rows, neighbours):
    return [
        sum(sorted(gap(row, other) ** 2 for place, other in enumerate(rows) if place != index)[:neighbours])
        for index, row in enumerate(rows)
    ]


def literal_krum(rows, f, weights):
    scores = krum_scores(rows, len(rows) - f - 2)
    return rows[scores.index(min(scores))]


def literal_multi_krum(rows, f, weights):
    scores = krum_scores(rows, len(rows) - f - 2)
    best = sorted(range(len(rows)), key=scores.__getitem__)[: len(rows) - f]
    return sum(rows[index] for index in best) / len(best)


def subsets(rows, f):
    """(diameter, sum of squared distances, rows) of all C(n, f) subsets of n - f rows."""
    for chosen in itertools.combinations(range(len(rows)), len(rows) - f):
        gaps = [gap(rows[one], rows[other]) for one, other in itertools.combinations(chosen, 2)]
        yield max(gaps, default=0.0), sum(value**2 for value in gaps), chosen


def literal_mda(rows, f, weights):
    chosen = min(subsets(rows, f))[2]
    return sum(rows[index] for index in chosen) / len(chosen)


def literal_middle(values, weights):
    below = 0.0
    for value, weight in sorted(zip(values, weights)):
        below += weight
        if below > 0.5 - 1e-9:
            return value
    raise AssertionError("the weights add up to 1")


def literal_geometric_median(rows, f, weights, iterations=60, smoothing=1e-3):
    totals = [sum(weight * gap(row, other) for weight, other in zip(weights, rows)) for row in rows]
    medoid = rows[totals.index(min(totals))]
    radius = literal_middle([gap(row, medoid) for row in rows], weights)
    if radius == 0:
        return medoid
    pulls = [weight / max(gap(row, medoid), radius) for weight, row in zip(weights, rows)]
    z = sum(pull * row for pull, row in zip(pulls, rows)) / sum(pulls)
    for _ in range(iterations):
        pulls = [weight / max(gap(row, z), smoothing * radius) for weight, row in zip(weights, rows)]
        z = sum(pull * row for pull, row in zip(pulls, rows)) / sum(pulls)
    return z


def literal_centered_clipping(rows, f, weights, iterations=3, radius=1.0):
    v = np.zeros(rows.shape[1])
    for _ in range(iterations):
        tau = radius * literal_middle([gap(row, v) for row in rows], weights)
        v = v + sum(
            weight * (row - v) * (min(1.0, tau / gap(row, v)) if gap(row, v) else 1.0)
            for weight, row in zip(weights, rows)
        )
    return v


def literal_nnm(rows, f, weights):
    keep = len(rows) - f
    near = [sorted(rows, key=lambda other, row=row: gap(row, other))[:keep] for row in rows]
    return [sum(some) / keep for some in near], weights


def literal_clip(rows, f, weights):
    bound = float(np.median([gap(row, 0.0) for row in rows]))
    return [row * min(1.0, bound / gap(row, 0.0)) for row in rows], weights


def literal_arc(rows, f, weights):
    n = len(rows)
    k = int(2 * f * (n - f) / n + 1e-12)
    order = sorted(range(n), key=lambda index: gap(rows[index], 0.0))
    bound = gap(rows[order[n - k - 1]], 0.0)
    longest = order[n - k :]
    return [row * bound / gap(row, 0.0) if index in longest else row for index, row in enumerate(rows)], weights


def weighted_means(rows, weights, groups):
    shares = [sum(weights[index] for index in group) for group in groups]
    return [
        sum(weights[index] * rows[index] for index in group) / share for group, share in zip(groups, shares)
    ], shares


def literal_bucketing(rows, f, weights):
    n = len(rows)
    places = generator(0, "bucketing").permutation(n).tolist()
    groups = [[index for index in range(n) if places[index] // 2 == bucket] for bucket in range((n + 1) // 2)]
    return weighted_means(rows, weights, sorted(groups))


def literal_buckets(rows, f, weights):
    groups = [[index for index in range(len(rows)) if index % 5 == bucket] for bucket in range(min(5, len(rows)))]
    return weighted_means(rows, weights, groups)
