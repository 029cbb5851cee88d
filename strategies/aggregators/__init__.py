"""Aggregators: rows and weights to one vector. One rule is one file, named after it.

Owns the names of the kinds, and how a rule's settings become an aggregator. Must never import a rule before it is
asked for.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from fedge.core.errors import ExperimentError
from fedge.core.registry import Registry, explained
from fedge.strategies.contracts import Aggregator
from fedge.strategies.preaggregators import PREAGGREGATORS

_HERE = "fedge.strategies.aggregators"

# Kinds that stand for settings of another; what a user adds goes on top.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "robust": {
        "kind": "caf",
        "pre": ["norm-filter", "clip"],
    },  # docs/robustness.md has the figures
    "flag-paper": {"kind": "flag", "pairwise": 1.0, "unit": False},
    "dnc-paper": {"kind": "dnc", "at_once": True},
}

AGGREGATORS = Registry(
    "server.aggregator",
    {
        "mean": f"{_HERE}.mean:Mean",
        "average": f"{_HERE}.average:Average",
        "krum": f"{_HERE}.krum:Krum",
        "multi-krum": f"{_HERE}.krum:MultiKrum",
        "mda": f"{_HERE}.mda:MinimumDiameterAveraging",
        "geometric-median": f"{_HERE}.geometric_median:GeometricMedian",
        "centered-clipping": f"{_HERE}.centered_clipping:CenteredClipping",
        "caf": f"{_HERE}.caf:CovarianceFilter",
        "dnc": f"{_HERE}.dnc:DivideAndConquer",
        "foolsgold": f"{_HERE}.foolsgold:FoolsGold",
        "fltrust": f"{_HERE}.fltrust:FLTrust",
        "flag": f"{_HERE}.flag:FlagAggregator",
        "median": f"{_HERE}.median:Median",
        "trimmed-mean": f"{_HERE}.trimmed_mean:TrimmedMean",
        "meamed": f"{_HERE}.meamed:MeaMed",
        "phocas": f"{_HERE}.phocas:Phocas",
        "bulyan": f"{_HERE}.bulyan:Bulyan",
        "sign-majority": f"{_HERE}.sign_majority:SignMajority",
        "gas": f"{_HERE}.gas:GradientSplitting",
        "local-clipping": f"{_HERE}.local_clipping:LocalClipping",
    },
    presets=tuple(PRESETS),
)

CHAIN = ("byzantine", "pre", "momentum", "cache")  # settings of the aggregator around every robust rule


class Chain(msgspec.Struct, frozen=True):
    """Those settings: at most `byzantine` hostile rows per group; pre-aggregators by name or as a table."""

    byzantine: int = 0
    pre: list[str | dict[str, Any]] = []
    momentum: float = 0.0
    cache: bool = False


def build(settings: Mapping[str, Any]) -> Aggregator:
    """The aggregator {"kind": ..., **settings of the rule and of CHAIN}. Raises ExperimentError."""
    table, called = _spelt(settings), str(settings.get("kind"))
    if table.get("kind") == "mean" and table.keys() & set(CHAIN):
        table["kind"] = "average"  # the mean of rows that are kept
    kind = table.get("kind")
    if not isinstance(kind, str) or hasattr(AGGREGATORS.find(kind), "fold"):
        return AGGREGATORS.build(table, CHAIN[1:] if kind == "mean" else ())  # type: ignore[no-any-return]
    chain = _chain({key: table.pop(key) for key in CHAIN if key in table})
    rule: Any = AGGREGATORS.build(table, CHAIN, called)
    _check_rule(rule, kind, chain)
    from fedge.strategies.aggregators.robust import Robust

    pre = tuple(PREAGGREGATORS.build({"kind": step} if isinstance(step, str) else step) for step in chain.pre)
    return Robust(rule, chain.byzantine, pre, chain.momentum, chain.cache)


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with every default written out. Raises ExperimentError."""
    built: Any = build(settings)
    table = _spelt(settings)
    rule = getattr(built, "rule", None)
    if rule is None:
        return {"kind": table["kind"], **_fields(built)}
    chain = _chain({key: table[key] for key in CHAIN if key in table})
    names = [{"kind": step} if isinstance(step, str) else step for step in chain.pre]
    pre = [{"kind": name["kind"], **_fields(step)} for name, step in zip(names, built.pre)]
    own = {"byzantine": chain.byzantine, "pre": pre, "momentum": chain.momentum, "cache": chain.cache}
    return {"kind": table["kind"], **_fields(rule), **own}


def most_byzantine(settings: Mapping[str, Any], rows: int, runs: Callable[[Aggregator], bool]) -> int | None:
    """The largest f below that of the settings, and below `rows`, with which the aggregator `runs`; None without any.

    Larger f ask for more, so halving finds it, however large the one in the settings.
    """

    def fails(byzantine: int) -> bool:
        try:
            return not runs(build({**settings, "byzantine": byzantine}))
        except ExperimentError:
            return True

    fewer = range(min(int(settings.get("byzantine", 0)), rows))
    return bisect_left(fewer, True, key=fails) - 1 if fewer and not fails(0) else None


def named(settings: Mapping[str, Any]) -> str:
    """What a user calls the aggregator of these settings, for a sentence: its preset, or its rule with what stands in
    front. Raises ExperimentError.
    """
    whole = completed(settings)
    for name, preset in PRESETS.items():
        if preset["kind"] == whole["kind"]:
            spelt = completed(preset)
            if all(whole.get(key) == spelt[key] for key in preset):
                return repr(name)
    before = ", ".join(step["kind"] for step in whole.get("pre", ()))
    return f"{whole['kind']!r} behind {before}" if before else repr(whole["kind"])


def _spelt(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a preset's name replaced by what it stands for."""
    preset = PRESETS.get(str(settings.get("kind")))
    return dict(settings) if preset is None else {**preset, **settings, "kind": preset["kind"]}


def _check_rule(rule: Any, kind: str, chain: Chain) -> None:
    forms = ("coefficients", "reduce", "choose")
    if not (hasattr(rule, "least") and hasattr(rule, "honours_weights") and any(hasattr(rule, form) for form in forms)):
        raise ExperimentError(
            f"server.aggregator: {kind!r} is no rule; give it honours_weights, least() and one of "
            f"{', '.join(f'{form}()' for form in forms)}, or the methods of an Aggregator (fedge.strategies.contracts)."
        )
    if chain.pre and hasattr(rule, "root"):
        raise ExperimentError(
            f"server.aggregator.pre: {kind!r} compares rows with one client's own, which mixing would blur; drop it."
        )


def _chain(own: Mapping[str, Any]) -> Chain:
    try:
        return msgspec.convert(dict(own), Chain)
    except msgspec.ValidationError as error:
        path, what = explained(error)
        raise ExperimentError(f"server.aggregator.{path}: {what}.") from None


def _fields(built: Any) -> dict[str, Any]:
    return {field.name: getattr(built, field.name) for field in dataclasses.fields(built) if field.init}
