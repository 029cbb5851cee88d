"""Heat maps of the robustness benchmark: one for each attack, and one of the worst cases.

Owns how they look. Must never compute an accuracy.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedge.report.style import context, figure, png, replace_file

Cell = tuple[str, str, str, str, str]
Place = tuple[str, str, str]  # data, partition, mode
DEEPEST = 60  # points lost at which the colour ends
SHORT = {"compass": "compass", "compass, 3x faster": "3x", "compass, 10x faster": "10x", "rounds": "rounds"}


def draw(table: Mapping[Cell, Sequence[float]], folder: Path) -> None:
    """Write ATTACK.png for every attack, and worst.png, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    places = list(dict.fromkeys(cell[:3] for cell in table))
    chains = list(dict.fromkeys(cell[4] for cell in table))
    for attack in dict.fromkeys(cell[3] for cell in table):
        shown = [place for place in places if (*place, attack, chains[0]) in table]
        lost = [[_lost(table, place, attack, chain) for place in shown] for chain in chains]
        spread = [[_spread(table.get((*place, attack, chain), [])) for place in shown] for chain in chains]
        title = "Points of accuracy lost to nobody: the price" if attack == "none" else f"Points lost to {attack}"
        _save(folder / f"{attack.lower().replace(' ', '-')}.png", title, chains, shown, lost, spread)
    lost = [[_worst(table, place, chain) for place in places] for chain in chains]
    _save(folder / "worst.png", "Points lost in the worst case over all attacks", chains, places, lost, None)


def _lost(table: Mapping[Cell, Sequence[float]], place: Place, attack: str, chain: str) -> float:
    """Against the plain mean that nobody attacks."""
    data, partition, mode = place
    quiet = table[data, partition, "rounds" if mode == "rounds" else "compass", "none", "mean"]
    return 100 * (statistics.fmean(quiet) - statistics.fmean(table[*place, attack, chain]))


def _worst(table: Mapping[Cell, Sequence[float]], place: Place, chain: str) -> float:
    attacks = {cell[3] for cell in table if cell[:3] == place and cell[4] == chain}
    return max(_lost(table, place, attack, chain) for attack in attacks)


def _spread(accuracies: Sequence[float]) -> float:
    """Points between the worst and the best seed."""
    return 100 * (max(accuracies) - min(accuracies)) if accuracies else 0.0


def _save(
    path: Path, title: str, chains: Sequence[str], places: Sequence[Place], lost: list[list[float]], spread: Any
) -> None:
    with context(path.stem):
        drawn = figure(1.9 + 0.48 * len(places), 1.3 + 0.27 * len(chains))
        axis = drawn.subplots()
        axis.imshow(lost, cmap="YlOrRd", vmin=0, vmax=DEEPEST, aspect="auto")
        for y, line in enumerate(lost):
            for x, points in enumerate(line):
                text = f"{points:.0f}" + (f"\n±{spread[y][x] / 2:.0f}" if spread and spread[y][x] >= 1 else "")
                dark = points > 0.65 * DEEPEST
                axis.text(x, y, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "#1f2328")
        axis.set_yticks(range(len(chains)), chains, fontsize=8)
        axis.set_xticks(range(len(places)), [SHORT[mode] for _, _, mode in places], fontsize=7, rotation=60)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        for x in range(1, len(places)):
            if places[x][:2] != places[x - 1][:2]:
                axis.axvline(x - 0.5, color="white", linewidth=3)
        starts = [x for x in range(len(places)) if x == 0 or places[x][:2] != places[x - 1][:2]]
        for start, stop in zip(starts, [*starts[1:], len(places)]):
            data, partition, _ = places[start]
            words = f"{data}\n{partition}"
            axis.text((start + stop - 1) / 2, len(chains) - 0.35, words, ha="center", va="top", fontsize=8)
        axis.set_title(title, fontsize=10, loc="left", fontweight="bold", pad=8)
        replace_file(path, png(drawn))
