"""The split benchmark: on a tiny model every way runs over a real relay, and goals are judged as they say."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks import split
from benchmarks.split_networks import Network, overlaps
from fedge.edge import bundle as bundles
from fedge.edge.assess import assess, same_class
from fedge.edge.plan.link import Link
from fedge.edge.runtime.measure import profile_bundle
from tests import edge_fixture as tiny


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    folder = tmp_path_factory.mktemp("split") / "bundle"
    tiny.make(folder)
    samples = np.concatenate([tiny.sample(seed) for seed in range(8)])
    bundle = assess(folder, samples, lose=1.0)
    return Network("tiny with exits", 20.0, folder, bundle, samples, None, same_class)


@pytest.mark.slow
def test_every_way_is_measured(network: Network) -> None:
    [row] = split.measure(network, (50.0,), asked=2, rounds=1)
    for way in (split.LOCAL, split.CLOUD, split.CUT, split.NEUROSURGEON, split.FEDGE):
        assert row[way] > 0
    assert split.JPEG not in row, "its input is no picture"
    assert row[split.CLOUD] > 1e3 * split.RTT_S, "the picture went over the relay"
    ways = (split.LOCAL, split.CLOUD, split.CUT, split.NEUROSURGEON)
    fastest = min(row[way] for way in ways)  # as printed, to a tenth of a millisecond
    assert (row[split.FEDGE] - 0.05) / (fastest + 0.05) <= row["over the best"]
    assert row["over the best"] <= (row[split.FEDGE] + 0.05) / (fastest - 0.05)


def test_ways_are_what_their_names_say(network: Network) -> None:
    here = profile_bundle(network.folder, network.bundle, repeats=1)
    ways = split.candidates(network, here, here, Link(1e6, 0.01))
    assert [(one.boundary, one.exits) for one in ways[split.LOCAL]] == [(None, ())]
    assert {one.boundary for one in ways[split.CLOUD]} == {"input"}
    assert 1 <= len(ways[split.CUT]) <= 2
    assert {one.boundary for one in ways[split.CUT]} <= {"a", "b"}
    assert all(one.coding in (None, "raw") and not one.exits for one in ways[split.NEUROSURGEON])


def test_the_slow_device_takes_what_its_profile_says(network: Network) -> None:
    here = profile_bundle(network.folder, network.bundle, repeats=1)
    slow = split.slowed(here, 7.0)
    assert slow.pieces == {key: 7.0 * seconds for key, seconds in here.pieces.items()}
    claimed = msgspec.structs.replace(here, pieces=dict.fromkeys(here.pieces, 0.05))
    with split.slow_device(network.bundle, claimed), split.Session(network.folder, profile=claimed) as session:
        seconds, outputs, labels = split.ask(network, session, 2)
    assert min(seconds) >= 0.05
    assert labels == ["device", "device"]
    assert split.right(network, outputs) == 1.0


def test_goals_are_judged_on_every_point() -> None:
    rows = [
        {"network": "plain", "over the best": 1.04, "over all": 1.3},
        {"network": "with exits", "over the best": 0.9, "over all": 0.95},
    ]
    assert [(one.value, one.holds) for one in split.judged(rows)] == [(1.04, True), (1.3, False), (0.95, True)]
    assert not any(one.holds for one in split.judged([]))


def test_text_maps_are_compared_by_overlap() -> None:
    full = np.zeros((3, 1, 2, 2))
    full[0, 0, 0] = full[1, 0] = 1.0
    found = full.copy()
    found[1, 0, 0] = 0.0
    np.testing.assert_array_equal(overlaps(found, full), [1.0, 0.5, 1.0])


def test_the_figure_is_a_picture(tmp_path: Path) -> None:
    row = {"network": "n", "Mbit/s": 1.0, split.LOCAL: 3.0, split.CLOUD: 4.0, split.CUT: 5.0, split.FEDGE: 2.0}
    split.draw([row | {"over the best": 0.7}, row | {"Mbit/s": 10.0, "over the best": 1.2}], tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_bundles_of_the_benchmark_verify(network: Network) -> None:
    assert bundles.load(network.folder).version == network.bundle.version
