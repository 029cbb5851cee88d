"""Early exits on CIFAR-10: accuracy against multiply-adds per image, for each rule, against networks without exits.

The network (exit_network.py) is trained once, which takes some ten minutes on two cores, and kept; `--retrain` does it
again. Temperatures and thresholds are chosen on 5000 training images that it was not trained on: for each rule, the
thresholds that save most while the accuracy there stays within so many points of the full network's, counted
cautiously. All figures are of the test images. The rivals: the same network trained without exits, and each exit alone,
answering every image.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import exit_network
from benchmarks.exit_network import Labels
from benchmarks.harness import Goal, emit, goal
from fedge.edge.exits.calibrate import calibration_error, choose_thresholds, evaluate, temperature
from fedge.edge.exits.rules import RULES

ALLOWED = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # points of accuracy below the full network's
GOAL_POINTS, GOAL_SAVED = 1.0, 40
QUICK_STEPS, QUICK_IMAGES = 40, 2000
Outputs = list[NDArray[np.float32]]
Row = dict[str, Any]


def fixed(outputs: Outputs, labels: Labels, work: Sequence[float], plain: Row | None) -> list[Row]:
    """Each output alone, and the network trained without exits."""
    names = [*(f"exit {number}" for number in range(1, len(outputs))), "full network"]
    rows = [_row(name, None, _accuracy(one, labels), cost, work[-1]) for name, one, cost in zip(names, outputs, work)]
    return [*rows, *([plain] if plain else [])]


def curve(
    rule: str, held: Outputs, held_labels: Labels, test: Outputs, labels: Labels, work: Sequence[float]
) -> list[Row]:
    """One row for each allowance that the held-out images grant."""
    heats = [temperature(one, held_labels) for one in held[:-1]]
    full = _accuracy(held[-1], held_labels)
    rows = []
    for points in ALLOWED:
        wanted = max(0.0, full - points / 100)
        chosen = choose_thresholds(
            held[:-1], held[-1], held_labels, wanted=wanted, temperatures=heats, work=work, rule=rule
        )
        found = evaluate(
            test[:-1], test[-1], labels, rule=rule, temperatures=heats, thresholds=chosen.thresholds, work=work
        )
        assert found.accuracy is not None
        row = _row(rule, points, found.accuracy, found.work, work[-1])
        row["lost, points"] = round(100 * (_accuracy(test[-1], labels) - found.accuracy), 2)
        row["left at, %"] = [round(100 * one.share, 1) for one in found.leaving]
        row["thresholds"] = [round(bar, 4) for bar in chosen.thresholds]
        rows.append(row)
    return rows


def calibrations(held: Outputs, held_labels: Labels, test: Outputs, labels: Labels) -> list[Row]:
    """ECE of each output on test images before and after its temperature."""
    rows = []
    for number, (mine, one) in enumerate(zip(held, test), 1):
        heat = temperature(mine, held_labels)
        before, after = calibration_error(one, labels), calibration_error(one, labels, heat)
        name = f"exit {number}" if number < len(held) else "full network"
        row = {"output": name, "temperature": round(heat, 3), "ece": round(before, 4)}
        rows.append({**row, "ece after temperature": round(after, 4)})
    return rows


def goals(rows: Sequence[Row]) -> list[Goal]:
    """What the default rule saves while it loses a point at most on test images, and what an allowed point comes to."""
    mine = [row for row in rows if row["network"] == "confidence"]
    [row] = [row for row in mine if row["allowed, points"] == GOAL_POINTS]
    saved = max((row["saved, %"] for row in mine if row["lost, points"] <= GOAL_POINTS), default=None)
    return [
        goal(f"multiply-adds saved at {GOAL_POINTS:.0f} point lost or less, %", saved, f">= {GOAL_SAVED}"),
        goal(
            f"accuracy lost where {GOAL_POINTS:.0f} point is allowed, points", row["lost, points"], f"<= {GOAL_POINTS}"
        ),
    ]


def _row(name: str, points: float | None, accuracy: float, cost: float, full: float) -> Row:
    return {
        "network": name,
        "allowed, points": points,
        "accuracy, %": round(100 * accuracy, 2),
        "multiply-adds, M": round(cost / 1e6, 3),
        "saved, %": round(100 * (1 - cost / full), 1),
    }


def _accuracy(logits: NDArray[np.float32], labels: Labels) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def measure(quick: bool, retrain: bool) -> tuple[list[Row], list[Row], dict[str, float]]:
    """Rows, calibration errors, and the seconds of training where there was any."""
    images = exit_network.sides()
    if quick:
        images = {side: (x[:QUICK_IMAGES], y[:QUICK_IMAGES]) for side, (x, y) in images.items()}
    model, took = exit_network.trained(exits=True, retrain=retrain, at_most=QUICK_STEPS if quick else None)
    (x_held, y_held), (x_test, y_test) = images["held out"], images["test"]
    held, test = exit_network.all_logits(model, x_held), exit_network.all_logits(model, x_test)
    work, seconds = exit_network.multiply_adds(model), {"with exits": took}
    plain = None
    if not quick:
        rival, seconds["without exits"] = exit_network.trained(exits=False, retrain=retrain)
        [logits] = exit_network.all_logits(rival, x_test)
        cost = exit_network.multiply_adds(rival)[-1]
        plain = _row("trained without exits", None, _accuracy(logits, y_test), cost, work[-1])
    rows = fixed(test, y_test, work, plain)
    for rule in RULES:
        rows += curve(rule, held, y_held, test, y_test, work)
    spent = {name: round(value, 1) for name, value in seconds.items() if value is not None}
    return rows, calibrations(held, y_held, test, y_test), spent


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over multiply-adds: a line for each rule, a point for each network without a choice."""
    from fedge.report.style import context, figure, png, replace_file

    with context("exits"):
        drawn = figure(6.4, 4.0)
        axis = drawn.subplots()
        for rule in RULES:
            mine = sorted((row["multiply-adds, M"], row["accuracy, %"]) for row in rows if row["network"] == rule)
            axis.plot(*zip(*mine), marker="o", markersize=3.5, label=rule)
        for row in rows:
            if row["network"] not in RULES:
                place = row["multiply-adds, M"], row["accuracy, %"]
                axis.plot(*place, "s", color="#57606a", markersize=5)
                axis.annotate(row["network"], place, xytext=(-4, -10), textcoords="offset points", ha="right", size=7)
        axis.set_xlabel("multiply-adds per image, millions")
        axis.set_ylabel("test accuracy, %")
        axis.set_title("Early exits on CIFAR-10", fontsize=10, loc="left", fontweight="bold")
        axis.legend(loc="lower right", fontsize=8)
        replace_file(path, png(drawn))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a cut-down run of under a minute")
    parser.add_argument("--retrain", action="store_true", help="train even where weights were kept")
    parser.add_argument("--figure", type=Path, help="draw the curves into this PNG")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(2)
    if not exit_network.CIFAR.is_file():
        missing = f"there is no {exit_network.CIFAR}; fetch CIFAR-10 into it as x_train, y_train, ..."
        emit("exits", [], [], as_json=chosen.json, notes={"missing": missing})
        return
    rows, errors, seconds = measure(chosen.quick, chosen.retrain)
    if chosen.figure:
        draw(rows, chosen.figure)
    notes = {"calibration": errors, "training_s": seconds, "quick": chosen.quick}
    emit("exits", rows, goals(rows), as_json=chosen.json, notes=notes)
    if not chosen.json:
        for error in errors:
            print(error)


if __name__ == "__main__":
    main()
