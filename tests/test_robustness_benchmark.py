"""The robustness benchmark: its experiments are what they say, and its tables follow from the runs."""

import json
import subprocess
import sys

import pytest

from benchmarks import robustness, robustness_figures
from benchmarks.robustness import ATTACKS, CHAINS, DEFAULT, MODES, Job, Result
from fedge import build


def job(**changes):
    plain = {"data": "fashion", "partition": "iid", "mode": "rounds", "attack": "none", "chain": "mean", "seed": 10}
    return Job(**{**plain, **changes})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chain", CHAINS)
def test_every_chain_can_be_run_in_every_mode(chain, mode):
    plan = build.settled(robustness.experiment(job(chain=chain, mode=mode, attack="ALIE")))
    assert plan.simulation.attack["faster"] == (MODES[mode] or 1.0)
    assert plan.server.aggregator.get("cache", False) is (mode != "rounds" and chain != "mean")


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_made_by_four_of_twenty(attack):
    plan = build.settled(robustness.experiment(job(attack=attack)))
    assert plan.data.partition["clients"] == 20
    assert (plan.simulation.attack or {}).get("clients") == (None if attack == "none" else 4)


def found():
    """Two chains under one attack: the mean falls from 80 to 30, the default from 78 to 76."""
    accuracies = {("none", "mean"): 0.8, ("x", "mean"): 0.3, ("none", DEFAULT): 0.78, ("x", DEFAULT): 0.76}
    return {
        job(mode=mode, attack=attack, chain=chain, seed=seed): Result(accuracy + shift)
        for (attack, chain), accuracy in accuracies.items()
        for mode in ("rounds", "compass")
        for seed, shift in ((10, -0.01), (11, 0.01))
    }


def test_losses_are_against_where_nobody_attacks():
    lines = {line["chain"]: line for line in robustness.worst_cases(robustness.cells(found()))}
    assert lines["mean"]["loss"] == pytest.approx(50)
    assert lines[DEFAULT]["loss"] == pytest.approx(2)
    assert lines[DEFAULT]["loss against mean"] == pytest.approx(4)
    assert lines[DEFAULT]["by"].startswith("x (")


def test_the_goal_is_judged_by_the_worst_case():
    (iid,) = robustness.goals(robustness.cells(found()))
    assert (iid.value, iid.holds) == (pytest.approx(4), True)
    worse = {**found(), job(attack="y", chain=DEFAULT): Result(0.74)}
    assert not robustness.goals(robustness.cells(worse))[0].holds


def test_a_log_is_gone_on_with(tmp_path, monkeypatch):
    log, played = tmp_path / "log", []
    some = [job(seed=seed) for seed in range(4)]
    monkeypatch.setattr(robustness, "play", lambda one: played.append(one) or Result(one.seed / 10))
    monkeypatch.setattr(robustness.multiprocessing, "get_context", lambda _: Alone())
    first = robustness.measure(some[:2], 1, log)
    assert robustness.measure(some, 1, log) == {**first, some[2]: Result(0.2), some[3]: Result(0.3)}
    assert played == some


class Alone:
    """A pool of this process."""

    def Pool(self, _):  # noqa: N802 -- as multiprocessing names it
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def imap(self, work, jobs, chunksize):
        return map(work, jobs)


def test_heat_maps_are_drawn_for_every_attack(tmp_path):
    robustness_figures.draw(robustness.cells(found()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"none.png", "x.png", "worst.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_run_has_the_promised_shape():
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.robustness", "--quick", "--json"], capture_output=True, text=True, check=True
    )
    result = json.loads(ran.stdout)
    assert {row["chain"] for row in result["rows"]} == {"mean", "multi-Krum", DEFAULT}
    assert {row["attack"] for row in result["rows"]} == {"none", "sign flip", "ALIE"}
    assert all(0 <= accuracy <= 1 for row in result["rows"] for accuracy in row["accuracy"])
    assert [goal["name"][:7] for goal in result["goals"]] == ["default"]
