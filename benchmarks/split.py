"""Split inference: seconds per answer against bandwidth, for fixed ways to run a model and for fedge's plan.

A device and a cloud run on this machine; between them a relay limits the rate and adds a round trip. The device takes
`slower` times as long as this machine for every piece and every coding, by waiting; everything else is real: sessions,
codings, gRPC, the estimate of the link. Ways: everything on the device; the picture as JPEG-90 to the cloud, and in the
coding that is fastest there; the best fixed cut (the two that the profiles and the true link promise most for, the
better one as measured); Neurosurgeon (Kang et al., ASPLOS 2017: the cut with raw tensors that the profiles and the true
link say is fastest); and a session of fedge, which knows neither link nor rate beforehand. All but JPEG-90 keep within
one point of the full model's accuracy on held-out samples.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import msgspec
import numpy as np

from benchmarks.harness import Goal, arguments, emit, goal
from benchmarks.split_networks import ALL, LOSE, Network
from fedge.core.params import Array
from fedge.edge.bundle import INPUT, Bundle, Sent
from fedge.edge.cloud import device as devices
from fedge.edge.cloud import request
from fedge.edge.cloud.session import Session
from fedge.edge.coding import codings
from fedge.edge.coding.codings import Coded
from fedge.edge.plan import options as choices
from fedge.edge.plan import profile as profiles
from fedge.edge.plan.link import Link
from fedge.edge.plan.options import Option
from fedge.edge.plan.planner import Bounds, plan
from fedge.edge.plan.profile import CodingCost, Profile, coding_key, piece_key
from fedge.edge.runtime.measure import profile_bundle
from fedge.edge.runtime.sessions import Runner, open_piece
from tests.relay import Relay

BANDWIDTHS_MBPS = (0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 70.0, 200.0)
RTT_S, DEADLINE_S = 0.01, 20.0
ROUNDS, WARM = 2, 6
FEDGE, LOCAL, CUT, NEUROSURGEON = "fedge", "device alone", "best fixed cut", "Neurosurgeon"
JPEG, CLOUD = "cloud, JPEG-90", "cloud, as exact"  # the second: the smallest coding that keeps within a point
Row = dict[str, Any]


class Slow(Runner):
    """A piece that takes `seconds`: what the slow device needs for it."""

    def __init__(self, runner: Runner, seconds: float) -> None:
        super().__init__(runner.piece, runner._session, runner.optimised)
        self._seconds = seconds

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As the piece, later."""
        begun = time.perf_counter()
        outputs = super().run(inputs)
        _until(begun + self._seconds)
        return outputs


def _until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


@contextlib.contextmanager
def slow_device(bundle: Bundle, profile: Profile) -> Iterator[None]:
    """Sessions that are opened in here take as long for pieces and codings as the profile says."""
    places = {tensor.name: boundary.name for boundary in bundle.boundaries for tensor in boundary.tensors}

    def opened(folder: Path, known: Bundle, start: str, end: str, **more: Any) -> Runner:
        return Slow(open_piece(folder, known, start, end, **more), profile.pieces[piece_key(start, end)])

    def encode(name: str, tensor: Array, coding: str) -> Coded:
        begun = time.perf_counter()
        coded = codings.encode(name, tensor, coding)
        cost = profile.codings.get(coding_key(places[name], coding))
        _until(begun + (cost.encode_s if cost else 0.0))
        return coded

    with mock.patch.object(devices, "open_piece", opened), mock.patch.object(request, "encode", encode):
        yield


def slowed(profile: Profile, factor: float) -> Profile:
    """The profile of a device that is so many times slower."""
    costs = {
        key: CodingCost(factor * cost.encode_s, factor * cost.decode_s, cost.bytes)
        for key, cost in profile.codings.items()
    }
    pieces = {key: factor * seconds for key, seconds in profile.pieces.items()}
    return msgspec.structs.replace(profile, pieces=pieces, codings=costs)


@contextlib.contextmanager
def cloud(network: Network, profile: Profile) -> Iterator[str]:
    """The tail of the network, served by a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiles.save(Path(file.name), profile)
        command = ["edge", "serve", str(network.folder), "--listen", "127.0.0.1:0", "--profile", file.name, "--json"]
        with subprocess.Popen([sys.executable, "-m", "fedge", *command], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                yield str(json.loads(process.stdout.readline())["listening"])
            finally:
                process.terminate()


def candidates(network: Network, device: Profile, tail: Profile, link: Link) -> dict[str, list[Option]]:
    """What each fixed way may run, best first by what the profiles and the true link promise."""
    options = choices.build(network.bundle, device, tail)
    plain = [one for one in options if not one.exits]
    full = next(one.accuracy for one in plain if one.boundary is None)
    kept = [one for one in plain if one.accuracy is not None and full is not None and one.accuracy >= full - LOSE]
    cuts = [one for one in kept if one.boundary not in (None, INPUT)]
    pictures = [one for one in kept if one.boundary == INPUT]
    raw = {boundary.name: {"raw": Sent()} for boundary in network.bundle.boundaries[:-1]}
    chain = choices.build(msgspec.structs.replace(network.bundle, codings=raw, exits=()), device, tail)
    return {
        LOCAL: [one for one in plain if one.boundary is None],
        JPEG: [one for one in plain if (one.boundary, one.coding) == (INPUT, "jpeg90")],
        CLOUD: sorted(pictures, key=lambda one: one.latency_s(link))[:1],
        CUT: sorted(cuts, key=lambda one: one.latency_s(link))[:2],
        NEUROSURGEON: [plan(chain, link, Bounds()).choice],
    }


def ask(network: Network, session: Session, count: int) -> tuple[list[float], list[Array], list[str]]:
    """Seconds, outputs and labels of `count` answers."""
    answers = [session.infer(network.samples[index : index + 1]) for index in range(count)]
    outputs = [answer.output for answer in answers]
    assert all(output is not None for output in outputs)
    return [answer.latency_s for answer in answers], outputs, [answer.label for answer in answers]


def fixed(network: Network, address: str, device: Profile, option: Option, asked: int) -> list[float]:
    """Seconds of answers by one way and no other."""
    with (
        slow_device(network.bundle, device),
        Session(network.folder, address, deadline_s=DEADLINE_S, profile=device) as session,
    ):
        assert session.wait_for_cloud(30)
        session._pilot.close()  # nothing is planned any more
        session._pilot.choice = option
        ask(network, session, 2)
        return ask(network, session, asked)[0]


def planned(
    network: Network, address: str, device: Profile, asked: int, accuracy: float
) -> tuple[list[float], float, str]:
    """Seconds of fedge's answers, how right they are, and the plan in the end."""
    bounds = Bounds(accuracy=accuracy)
    with (
        slow_device(network.bundle, device),
        Session(network.folder, address, deadline_s=DEADLINE_S, bounds=bounds, profile=device) as session,
    ):
        assert session.wait_for_cloud(30)
        for _ in range(WARM):
            ask(network, session, 1)
            time.sleep(0.25)  # the pilot looks every tenth of a second
        seconds, outputs, _ = ask(network, session, asked)
        return seconds, right(network, outputs), session.option.name


def right(network: Network, outputs: Sequence[Array]) -> float:
    """The mean score of these answers to the first samples."""
    found = np.concatenate(outputs)
    truth = network.truth[: len(found)] if network.truth is not None else whole(network, len(found))
    return float(np.mean(network.judge(found, truth)))


def whole(network: Network, count: int) -> Array:
    """What the full model answers."""
    runner = open_piece(network.folder, network.bundle, INPUT, "output")
    name = network.bundle.boundary(INPUT).tensors[0].name
    output = network.bundle.boundary("output").tensors[0].name
    return np.concatenate([runner.run({name: network.samples[i : i + 1]})[output] for i in range(count)])


def measure(network: Network, bandwidths: Sequence[float], asked: int, rounds: int) -> list[Row]:
    """One row for each bandwidth."""
    name = network.bundle.boundary(INPUT).tensors[0].name
    here = profile_bundle(network.folder, network.bundle, inputs={name: network.samples[:1]})
    device = slowed(here, network.slower)
    options = choices.build(network.bundle, device, None)
    full = next(one.accuracy for one in options if not one.exits)
    assert full is not None
    rows = []
    with cloud(network, here) as address:
        for mbps in bandwidths:
            with Relay(address, up_bps=mbps * 1e6, down_bps=mbps * 1e6, rtt_s=RTT_S) as relay:
                rows.append(_row(network, relay.address, device, here, mbps, full - LOSE, asked, rounds))
                print(rows[-1], flush=True, file=sys.stderr)
    return rows


def _row(
    network: Network, address: str, device: Profile, here: Profile, mbps: float, least: float, asked: int, rounds: int
) -> Row:
    ways = candidates(network, device, here, Link(mbps * 1e6, RTT_S))
    exact = any((one.accuracy or 0.0) >= least for one in ways[JPEG])
    taken: dict[str, list[list[float]]] = {way: [[] for _ in found] for way, found in ways.items()}
    mine: list[float] = []
    scores, names = [], []
    for _ in range(rounds):
        seconds, score, chosen = planned(network, address, device, asked, least)
        mine += seconds
        scores.append(score)
        names.append(chosen)
        for way, found in ways.items():
            for index, option in enumerate(found):
                taken[way][index].append(fmean(fixed(network, address, device, option, asked)))
    best = {
        way: min((median(each), index) for index, each in enumerate(lists)) for way, lists in taken.items() if lists
    }
    fastest = min(value for way, (value, _) in best.items() if way != JPEG or exact)
    ours = median(fmean(mine[at : at + asked]) for at in range(0, len(mine), asked))
    return {
        "network": network.name,
        "slower": network.slower,
        "Mbit/s": mbps,
        **{way: round(1e3 * value, 1) for way, (value, _) in best.items()},
        FEDGE: round(1e3 * ours, 1),
        "over the best": round(ours / fastest, 3),
        "over all": round(ours / min(value for value, _ in best.values()), 3),
        "plan": names[-1],
        "cut": ways[CUT][best[CUT][1]].name if CUT in best else None,
        "right, %": round(100 * fmean(scores), 1),
    }


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Regret at every point, and whether exits or a bottleneck win where they apply."""
    with_exits = [row for row in rows if "exits" in row["network"]]

    def worst(key: str) -> float | None:
        return max((row[key] for row in rows), default=None)

    return [
        goal("fedge over the best way as exact, worst point", worst("over the best"), "<= 1.05"),
        goal("fedge over the best way, JPEG-90 included, worst point", worst("over all"), "<= 1.05"),
        goal(
            "fedge over the best way where there are exits, best point",
            min((row["over all"] for row in with_exits), default=None),
            "< 1",
        ),
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds over bandwidth, one panel for each network; where fedge is fastest the ground is shaded."""
    from matplotlib.ticker import LogLocator, NullLocator

    from fedge.report.style import context, figure, png, replace_file

    names = list(dict.fromkeys(row["network"] for row in rows))
    with context("split"):
        drawn = figure(3.4 * len(names), 3.4)
        for axis, name in zip(np.atleast_1d(drawn.subplots(1, len(names))), names):
            mine = [row for row in rows if row["network"] == name]
            x = [row["Mbit/s"] for row in mine]
            for way in (LOCAL, JPEG, CLOUD, CUT, NEUROSURGEON):
                axis.plot(x, [row.get(way) for row in mine], marker=".", linewidth=1, label=way)
            axis.plot(x, [row[FEDGE] for row in mine], color="black", linewidth=2.2, label=FEDGE)
            for row in mine:
                if row["over the best"] < 1:
                    axis.axvspan(row["Mbit/s"] / 1.35, row["Mbit/s"] * 1.35, color="#2da44e", alpha=0.12, linewidth=0)
            axis.set_xscale("log")
            axis.set_yscale("log")
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter("{x:g}")
                scale.set_minor_locator(NullLocator())
            axis.set_xlabel("Mbit/s")
            axis.set_title(name, fontsize=10, loc="left", fontweight="bold")
        drawn.axes[0].set_ylabel("ms per answer")
        drawn.axes[1 % len(names)].legend(fontsize=7)
        replace_file(path, png(drawn))


def main() -> None:
    """The command."""
    options = arguments(str(__doc__).splitlines()[0], figure="a PNG to write", only="one network alone")
    bandwidths, rounds = (BANDWIDTHS_MBPS[1::4], 1) if options.quick else (BANDWIDTHS_MBPS, ROUNDS)
    rows: list[Row] = []
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, usual) in ALL.items():
            if options.only and name != options.only:
                continue
            asked = 4 if options.quick else usual
            try:
                network = make(Path(folder), asked)
            except FileNotFoundError as error:
                missing[name] = f"missing: {error}"
                continue
            rows += measure(network, bandwidths, asked, rounds)
    if options.figure:
        draw(rows, Path(options.figure))
    emit("split", rows, judged(rows), as_json=options.json, notes={"missing": missing, "rtt_s": RTT_S})


if __name__ == "__main__":
    main()
