"""Benchmarks: the same work on every engine, goals judged as said, and the shape that `--quick --json` promises."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.harness import arguments, emit, goal, in_turns, ratio
from benchmarks.simulation import flower_row, row
from benchmarks.trivial import SIZE, bare_rounds, examples_of

SIMULATION = {
    "overhead over a bare loop, worst of the fleets",
    "times faster than pfl, worst of the fleets",
    "times faster than Flower at 100 clients",
    "TorchTrainer over a bare PyTorch loop, worst of the models",
}
COORDINATOR = {
    "median round, 10 clients, 1 MiB (ms)",
    "updates in over a bare gRPC stream",
    "peak of its own memory beyond a coordinator without a model (models)",
}


@pytest.mark.parametrize(
    ("value", "wanted", "holds"),
    [(1.3, "<= 1.3", True), (1.31, "<= 1.3", False), (20, ">= 20", True), (1.0, "> 1", False), (None, "<= 9", False)],
)
def test_a_goal_holds_as_its_words_say(value, wanted, holds):
    assert goal("speed", value, wanted).holds is holds


def test_things_to_compare_are_timed_in_turns():
    calls = []
    taken = in_turns({"one": lambda: calls.append(1), "two": lambda: calls.append(2)}, 3)
    assert calls == [1, 2, 2, 1, 1, 2]
    assert {name: len(seconds) for name, seconds in taken.items()} == {"one": 3, "two": 3}


def test_a_ratio_is_the_median_over_pairs():
    assert ratio([1.0, 30.0, 9.0], [1.0, 10.0, 2.0]) == 3.0


def test_a_rival_that_is_not_installed_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr("benchmarks.simulation.installed", lambda _: "missing")
    assert flower_row(100, 2, 0.01)["note"] == "missing"
    assert row("pfl", 100, None, None)["note"] == "missing"


def test_the_table_names_what_was_missed(capsys):
    emit("demo", [{"what": "speed", "value": 3}], [goal("speed", 3, "<= 2")], as_json=False)
    shown = capsys.readouterr().out
    assert "MISSED speed: 3 (goal <= 2)" in shown
    assert "demo" in shown


def test_the_command_line_has_two_options():
    options = arguments("demo", ["--json", "--quick"])
    assert (options.json, options.quick) == (True, True)


def test_every_engine_does_the_same_work():
    from benchmarks.simulation import fedge_rounds

    floor = bare_rounds(4, 3)
    assert floor.shape == (SIZE,)
    assert [examples_of(client) for client in (0, 6, 7)] == [1, 7, 1]
    np.testing.assert_allclose(fedge_rounds(4, 3), floor, rtol=1e-6)
    np.testing.assert_allclose(floor, (1 - 1e-3) ** 3, rtol=1e-6)
    if importlib.util.find_spec("pfl"):
        program = "from benchmarks.pfl_rounds import rounds; print(repr(float(rounds(4, 3).mean())))"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert float(found.stdout) == pytest.approx((1 - 1e-3) ** 3, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "goals"), [("simulation", SIMULATION), ("coordinator", COORDINATOR)])
def test_a_quick_run_prints_one_object_of_the_contract(name, goals):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == name
    assert {"processor", "cores", "memory_gib"} <= result["machine"].keys()
    assert {"python", "fedge", "numpy"} <= result["versions"].keys()
    assert result["rows"]
    assert {one["name"] for one in result["goals"]} == goals
    for one in result["goals"]:
        assert one.keys() == {"name", "value", "goal", "holds"}
        assert isinstance(one["holds"], bool)
