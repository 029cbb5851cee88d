"""How many hostile rows a group may hold, and which rules withstand them.

Of N clients b are hostile, and K are drawn at random for a group. The number H of hostile ones among them is
hypergeometric:

    P(H > f) = sum over h > f of C(b, h) C(N - b, K - h) / C(N, K)

so a small sample can hold a larger share of hostile rows than the federation (Allouah, Farhadkhani, Guerraoui, Gupta,
Pinot, Rizk, Voitovych, "Byzantine-Robust Federated Learning: Impact of Client Subsampling and Local Updates", ICML
2024). The f to set is the smallest that is exceeded with at most the accepted probability, over all rounds together
(the union bound). All sums are of integers, so nothing is rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import comb
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators import AGGREGATORS, PRESETS, build

RECOMMENDED = ("robust", "caf")  # the first that the federation has enough clients for; the last needs but 2 f + 1
MOST = 10_000  # clients; the exact sums of more take long, and much memory
COSTS = {"coefficients": "Gram", "reduce": "coordinate", "choose": "split"}  # of each form of rule

_UNBOUNDED = {  # no f of theirs means anything
    "mean": "one hostile row moves it at will",
    "average": "one hostile row moves it at will",
    "foolsgold": "against hostile rows that are alike; a single one passes",
}
_TRUSTING = {"fltrust": {"root": "the-server"}}
_REMARKS = {
    "fltrust": "whatever f; one client, the root, has the server's own data",
    "local-clipping": "each row by itself, in groups of any size; its f is of all clients",
}


@dataclass(frozen=True, slots=True)
class Tail:
    """The probabilities that more than `byzantine` rows of one group are hostile, and of any group of the run."""

    byzantine: int
    group: Fraction
    run: Fraction


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a kind of aggregator withstands f hostile of K rows, and what it asks for.

    `needs` is its least number of rows, None where it has none; `cost` is the family: inner products of the rows
    and one weighted sum (Gram), a sort of every coordinate, or a closer look at parts of the rows (split).
    """

    kind: str
    valid: bool
    needs: int | None
    honours_weights: bool
    cost: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """What follows from so many clients, hostile ones, and draws.

    `kind` is recommended, `byzantine` is the f to set, and `kept` whether it is a minority of a group. `quorum` is the
    fewest clients per group with which that kind is valid at this risk, `quorum_byzantine` the f to set there; None
    where no number is enough. `experiment` is TOML; where a group is too small for its f, it is `cached`: the last rows
    of absent clients take part, and f is of all.
    """

    clients: int
    sampled: int
    hostile: int
    rounds: int
    risk: float
    tails: tuple[Tail, ...]
    kind: str
    byzantine: int
    kept: bool
    quorum: int | None
    quorum_byzantine: int | None
    cached: bool
    rules: tuple[Fit, ...]
    experiment: str

    @property
    def words(self) -> str:
        """What to do, in a sentence or two."""
        begin = f"f = {self.byzantine} keeps the risk of {self.risk:g}"
        if not self.cached:
            there = f"{self.quorum} clients per round, with f = {self.quorum_byzantine}"
            if self.quorum is None or self.quorum == self.sampled:
                return f"{begin}."
            if self.quorum > self.sampled:
                return f"{begin}, but withstands nobody; {self.kind!r} withstands the hostile in {there}."
            return f"{begin}; so few as {there}, would do for {self.kind!r}."
        if self.kept:
            begin += f", but {self.kind!r} then needs more than {self.sampled} rows."
        else:
            begin = f"No f below half of {self.sampled} rows keeps the risk of {self.risk:g}."
        if self.quorum is None:
            return f"{begin} For {self.kind!r} there are too few clients; choose a rule that needs fewer rows."
        return (
            f"{begin} Draw {self.quorum} clients per round with f = {self.quorum_byzantine}, or set cache = true: then "
            f"the last rows of absent clients take part, and f = {self.hostile} holds among all {self.clients} in "
            "every group."
        )


def advise(clients: int, sampled: int, hostile: int, risk: float = 1e-3, rounds: int = 1) -> Advice:
    """The advice for `sampled` of `clients` per group. Raises ExperimentError for numbers that cannot be."""
    _check(clients, sampled, hostile, risk, rounds)
    accepted = Fraction(str(risk)) / rounds
    f = bound(clients, sampled, hostile, accepted)
    kind = next((kind for kind in RECOMMENDED if least(kind)(hostile) <= clients), RECOMMENDED[-1])
    needs = least(kind)
    cached = needs(f) > sampled
    fewest = quorum(clients, hostile, accepted, needs)
    return Advice(
        clients=clients,
        sampled=sampled,
        hostile=hostile,
        rounds=rounds,
        risk=risk,
        tails=tuple(
            Tail(value, chance, min(Fraction(1), rounds * chance))
            for value, chance in enumerate(exceeded(clients, sampled, hostile))
        ),
        kind=kind,
        byzantine=f,
        kept=2 * f < sampled,
        quorum=fewest,
        quorum_byzantine=None if fewest is None else bound(clients, fewest, hostile, accepted),
        cached=cached,
        rules=tuple(fit(kind, sampled, f) for kind in (*PRESETS, *AGGREGATORS.entries)),
        experiment=_experiment(kind, clients, sampled, hostile if cached else f, cached),
    )


def exceeded(clients: int, sampled: int, hostile: int) -> list[Fraction]:
    """P(H > f) for f = 0, 1, ... up to the first that cannot be exceeded."""
    total = comb(clients, sampled)
    return [Fraction(ways, total) for ways in _ways_above(clients, sampled, hostile)]


def bound(clients: int, sampled: int, hostile: int, accepted: Fraction) -> int:
    """The smallest f with P(H > f) at most `accepted`."""
    most = accepted * comb(clients, sampled)
    return next(f for f, ways in enumerate(_ways_above(clients, sampled, hostile)) if ways <= most)


def _ways_above(clients: int, sampled: int, hostile: int) -> list[int]:
    """How many of the C(N, K) draws hold more than 0, 1, ... hostile clients."""
    low, high = max(0, sampled - (clients - hostile)), min(hostile, sampled)
    ways = [0] * low + [comb(hostile, low) * comb(clients - hostile, sampled - low)]
    for h in range(low, high):
        ways.append(ways[-1] * (hostile - h) * (sampled - h) // ((h + 1) * (clients - hostile - sampled + h + 1)))
    return list(accumulate(reversed(ways), initial=0))[-2::-1]


def quorum(clients: int, hostile: int, accepted: Fraction, needs: Callable[[int], int]) -> int | None:
    """The fewest clients per group that are as many as the rule `needs` for the f that is `accepted` there, or None.

    An f of 0 is not protection but luck, and does not count where anybody is hostile.
    """
    sampled = 1
    while sampled <= clients:
        f = bound(clients, sampled, hostile, accepted)
        if needs(f) <= sampled and (f or not hostile):
            return sampled
        sampled = max(sampled + 1, needs(f))  # f never falls as more are drawn, so none below are enough
    return None


def least(kind: str) -> Callable[[int], int]:
    """From f to the least rows with which a kind withstands f hostile ones."""
    known: dict[int, int] = {}

    def needs(byzantine: int) -> int:
        if byzantine not in known:
            known[byzantine] = build({"kind": kind, "byzantine": byzantine}).min_rows()
        return known[byzantine]

    return needs


def fit(kind: str, rows: int, byzantine: int) -> Fit:
    """How a kind of aggregator stands to `byzantine` hostile of `rows` rows."""
    found = AGGREGATORS.find(str(PRESETS.get(kind, {"kind": kind})["kind"]))
    honours, cost = bool(found.honours_weights), _cost(found)
    if kind in _UNBOUNDED:
        return Fit(kind, False, None, honours, cost, _UNBOUNDED[kind])
    own = {} if hasattr(found, "fold") else {"byzantine": byzantine}
    try:
        needs = build({"kind": kind, **own, **_TRUSTING.get(kind, {})}).min_rows()
    except ExperimentError as error:  # its cost grows with f, and it has a limit
        return Fit(kind, False, None, honours, cost, str(error))
    return Fit(kind, needs <= rows, needs, honours, cost, _REMARKS.get(kind, ""))


def _cost(rule: Any) -> str:
    return next((words for form, words in COSTS.items() if hasattr(rule, form)), "sum")


def _experiment(kind: str, clients: int, sampled: int, byzantine: int, cached: bool) -> str:
    """The [server] section of an experiment file."""
    draws = f'scheduler = {{ kind = "fedavg" }}\nselector = {{ kind = "uniform", clients = {sampled} }}\n'
    more = ", cache = true" if cached else ""
    rule = f'aggregator = {{ kind = "{kind}", byzantine = {byzantine}{more} }}\n'
    return f"[server]\n{draws if sampled < clients else ''}{rule}"


def _check(clients: int, sampled: int, hostile: int, risk: float, rounds: int) -> None:
    if not 1 <= clients <= MOST:
        raise ExperimentError(f"There are {clients} clients; name 1 to {MOST}, for which the odds are counted exactly.")
    if not 1 <= sampled <= clients:
        raise ExperimentError(f"{sampled} of {clients} clients cannot be drawn; draw 1 to {clients}.")
    most = (clients - 1) // 2
    if hostile < 0:
        raise ExperimentError(f"{hostile} hostile clients cannot be; name 0 to {most} of {clients}.")
    if hostile > most:
        raise ExperimentError(
            f"Without data of the server's own nothing withstands {hostile} hostile of {clients} clients; at most "
            f"{most} of {clients}, or {hostile} of at least {2 * hostile + 1}, can be withstood; with such data "
            "'fltrust' withstands any number."
        )
    if not 0 < risk < 1:
        raise ExperimentError(f"A risk of {risk:g} is no probability to accept; name one above 0 and below 1.")
    if rounds < 1:
        raise ExperimentError(f"{rounds} rounds are no run; name 1 or more.")
