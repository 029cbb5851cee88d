"""The planner against a device that is played sample by sample; and its promises."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.core.errors import DataError, ExperimentError
from fedge.edge.bundle import INPUT, LARGE_BYTES, OUTPUT, Exit, Sent, Tensor
from fedge.edge.plan import replan
from fedge.edge.plan.link import OFFLINE, Link, LinkState, estimate, observe
from fedge.edge.plan.options import Option, build
from fedge.edge.plan.planner import Bounds, plan, switches
from fedge.edge.plan.profile import CodingCost, Profile, coding_key, piece_key
from fedge.edge.plan.replan import Replanner, start, step
from fedge.edge.plan.scale import Scale, cloud_took, device_took
from tests.edge_lines import SAMPLES, VERSION, Line, bundle_of, lines

LINKS = st.builds(Link, st.floats(4, 9).map(lambda power: 10**power), st.floats(0, 0.3))
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def _options(line: Line) -> tuple[Option, ...]:
    return build(line.bundle, line.device, line.cloud)


def _played(line: Line, option: Option, link: Link, sample: int) -> tuple[float, bool]:
    """Seconds and whether the answer is right when the device runs this one sample as the option says."""
    places = {leave.name: leave.boundary for leave in line.bundle.exits}
    leave, (early, final) = line.leaves[sample], line.right[sample]
    seconds = 0.0
    for begin, end in option.pieces:
        seconds += line.device.pieces[piece_key(begin, end)]
        if leave is not None and leave in option.exits and places[leave] == end:
            return seconds, early
    if option.boundary is None:
        return seconds, final
    cost = line.device.codings.get(coding_key(option.boundary, option.coding or ""), CodingCost(0, 0, 4 * 5))
    (logits,) = line.bundle.boundary(OUTPUT).tensors
    network_s = link.rtt_s + (cost.bytes + 4 * logits.shape[1]) * 8 / link.bandwidth_bps
    tail_s = line.cloud.pieces[piece_key(option.boundary, OUTPUT)]
    return seconds + cost.encode_s + network_s + cost.decode_s + tail_s, final


@few
@given(lines(), LINKS)
def test_expectations_are_the_means_over_samples_played_one_by_one(line: Line, link: Link) -> None:
    for option in _options(line):
        played = [_played(line, option, link, sample) for sample in range(SAMPLES)]
        stubborn = replace(line, leaves=(None,) * SAMPLES)
        assert option.latency_s(link) == pytest.approx(fmean(seconds for seconds, _ in played), rel=1e-9)
        assert option.accuracy == pytest.approx(fmean(right for _, right in played), abs=1e-9)
        assert option.longest_s(link) == pytest.approx(_played(stubborn, option, link, 0)[0], rel=1e-9)
        assert option.memory_bytes == 100 * len(option.pieces)


@few
@given(lines())
def test_both_ends_and_every_boundary_are_among_the_options(line: Line) -> None:
    options = _options(line)
    plain = [(option.boundary, option.coding) for option in options if not option.exits]
    inner = [(boundary.name, "u8") for boundary in line.bundle.boundaries[1:-1]]
    assert plain == [(None, None), (INPUT, "raw"), *inner]
    assert len({option.name for option in options}) == len(options)
    assert all(begin == end for option in options for (_, begin), (end, _) in pairwise(option.pieces))
    taken = {stat.name for stat in line.bundle.exits if stat.share > 0}
    assert {name for option in options for name in option.exits} == taken
    assert [option.boundary for option in build(line.bundle, line.device, None)] == [None] * (1 + bool(taken))


def test_options_leave_out_what_was_not_measured_but_insist_on_the_ends() -> None:
    line = _line()
    poorer = msgspec.structs.replace(line.device, codings={})
    assert {option.name for option in build(line.bundle, poorer, line.cloud)} == {"local", "input as raw"}
    headless = msgspec.structs.replace(line.device, pieces={})
    with pytest.raises(DataError, match="input to output"):
        build(line.bundle, headless, line.cloud)
    tailless = msgspec.structs.replace(line.cloud, pieces={piece_key("b0", OUTPUT): 1.0})
    with pytest.raises(DataError, match=r"input\.\.output"):
        build(line.bundle, line.device, tailless)
    other = msgspec.structs.replace(line.cloud, version="1" * 64)
    with pytest.raises(DataError, match="another bundle"):
        build(line.bundle, line.device, other)


@pytest.mark.parametrize(
    "stats",
    [
        [{"share": 1.5}, {}],
        [{"share": 0.6}, {"share": 0.6}],
        [{"share": math.nan}, {}],
        [{"share": 0.1, "accuracy": -1.0}, {}],
        [{"share": 0.1, "final_accuracy": 1.1}, {}],
    ],
)
def test_statistics_that_are_none_are_refused(stats: list[dict[str, float]]) -> None:
    line = _line()
    exits = tuple(Exit(f"e{at}", "b0", Tensor("l", "float32", (-1, 10)), **given) for at, given in enumerate(stats))
    with pytest.raises(DataError, match="measure them again"):
        build(msgspec.structs.replace(line.bundle, exits=exits), line.device, line.cloud)


def test_a_cut_that_the_input_goes_around_breaks_the_bound_that_keeps_the_input() -> None:
    """As where the number of rows is read off the input behind the cut."""
    line = _line()
    beside = (*line.bundle.boundary("b1").tensors, *line.bundle.boundary(INPUT).tensors)
    ends = tuple(
        msgspec.structs.replace(one, tensors=beside) if one.name == "b1" else one for one in line.bundle.boundaries
    )
    options = build(msgspec.structs.replace(line.bundle, boundaries=ends), line.device, line.cloud)
    assert {option.boundary for option in options if option.carries_input} == {INPUT, "b1"}
    rows = plan(options, Link(1e9, 0.0), Bounds(keep_input=True)).rows
    assert {row.option.boundary for row in rows if row.breaks} == {INPUT, "b1"}


@pytest.mark.parametrize("off", [(0,), (1,), (0, 1)])
def test_exits_that_nobody_takes_disable_no_cut_and_no_other_exit(off: tuple[int, ...]) -> None:
    """Pieces are those that export writes: from a boundary to the next exit's at most, or to the output."""
    names = [INPUT, "b0", "b1", "b2", OUTPUT]
    stats: dict[str, Any] = {"threshold": 0.5, "share": 0.4, "accuracy": 1.0, "final_accuracy": 1.0}
    exits = [
        Exit(f"e{at}", f"b{at}", Tensor(f"l{at}", "float32", (-1, 10)), **({} if at in off else stats))
        for at in range(2)
    ]
    bundle = bundle_of(3, exits, {name: {"raw": Sent(0.9)} for name in names[:-1]})
    pairs = [*pairwise(names), *((name, OUTPUT) for name in names[:-2])]
    known = Profile("d", VERSION, 1, pieces={piece_key(*pair): 0.01 for pair in pairs})
    options = build(bundle, known, known)
    plain = {option.boundary for option in options if not option.exits}
    used = {option.boundary: option.exits for option in options if option.exits}
    on = tuple(f"e{at}" for at in range(2) if at not in off)
    assert plain == {None, *names[:-1]}
    assert used == ({} if not on else dict.fromkeys((None, "b2", "b1"), on) | ({"b0": on} if off == (1,) else {}))
    deep = next(option for option in options if option.boundary == "b2" and option.exits == on)
    assert deep.pieces == ((INPUT, "b0"), ("b0", "b1"), ("b1", "b2"))
    assert deep.sent == pytest.approx(0.6 if on else 1.0)


def test_real_bytes_count_more_than_those_of_a_profile() -> None:
    line = _line()
    known = msgspec.structs.replace(line.bundle, codings={"b0": {"u8": Sent(0.9, 17.5)}, "b1": {"u8": Sent(0.9)}})
    sizes = {option.boundary: option.bytes for option in build(known, line.device, line.cloud)}
    assert (sizes["b0"], sizes["b1"]) == (17.5, line.device.codings[coding_key("b1", "u8")].bytes)


def test_large_answers_are_packed_and_so_not_counted() -> None:
    line = _line()
    tensors = (Tensor("map", "float32", (-1, LARGE_BYTES // 4)),)
    large = msgspec.structs.replace(line.bundle.boundary(OUTPUT), tensors=tensors)
    bundle = msgspec.structs.replace(line.bundle, boundaries=(*line.bundle.boundaries[:-1], large))
    assert {option.reply_bytes for option in build(bundle, line.device, line.cloud)} == {0}


def test_codings_may_be_given_which_leaves_plain_neurosurgeon() -> None:
    """Raw float32 at every boundary, no exits: Kang et al., 2017."""
    line = _line()
    raw = {boundary.name: {"raw": Sent()} for boundary in line.bundle.boundaries[:-1]}
    options = build(msgspec.structs.replace(line.bundle, codings=raw, exits=()), line.device, line.cloud)
    assert [option.name for option in options] == ["local", "input as raw", "b0 as raw", "b1 as raw"]
    assert [option.bytes for option in options] == [0, 20, 24, 28]
    link = Link(1e4, 0.01)
    size = 4 * line.bundle.boundary(OUTPUT).tensors[0].shape[1]  # of the answer
    assert [option.reply_bytes for option in options] == [0, size, size, size]
    totals = [
        option.device_s + option.sent * (0.01 + 8 * (option.bytes + size) / 1e4 + option.tail_s) for option in options
    ]
    assert plan(options, link, Bounds()).choice == options[totals.index(min(totals))]


@few
@given(lines(), LINKS, st.data())
def test_the_plan_is_the_fastest_that_keeps_all_bounds(line: Line, link: Link, data: st.DataObject) -> None:
    options = _options(line)
    bounds = Bounds(
        deadline_s=data.draw(st.none() | st.floats(0, 1)),
        memory_bytes=data.draw(st.none() | st.integers(0, 500)),
        energy_j=data.draw(st.none() | st.floats(0, 1)),
        joule_per_byte=1e-6,
        accuracy=data.draw(st.none() | st.floats(0, 1)),
        keep_input=data.draw(st.booleans()),
    )
    kept = [option for option in options if _keeps(option, link, bounds)]
    if not kept:
        with pytest.raises(ExperimentError, match="excludes most"):
            plan(options, link, bounds)
        return
    found = plan(options, link, bounds)
    assert found.choice.latency_s(link) == min(option.latency_s(link) for option in kept)
    assert [row.option for row in found.rows if not row.breaks] == kept
    assert found.choice in kept


def _keeps(option: Option, link: Link, bounds: Bounds) -> bool:
    return (
        (bounds.deadline_s is None or option.longest_s(link) <= bounds.deadline_s)
        and (bounds.memory_bytes is None or 100 * len(option.pieces) <= bounds.memory_bytes)
        and (bounds.energy_j is None or option.sent * option.bytes * 1e-6 <= bounds.energy_j)
        and (bounds.accuracy is None or (option.accuracy or 0.0) >= bounds.accuracy)
        and not (bounds.keep_input and option.boundary == INPUT)
    )


def test_a_refusal_names_the_bound_and_the_value_that_helps() -> None:
    options = (_option("local", worst_s=0.3), _option("b1", worst_s=0.1, size=100_000), _option(INPUT, size=200_000))
    with pytest.raises(ExperimentError, match=r"deadline_s excludes most \(3 of 3\): set deadline_s = 0\.3 to") as told:
        plan(options, Link(1e6, 0.01), Bounds(deadline_s=0.2, keep_input=True))
    assert "'local'" in str(told.value)
    assert plan(options, Link(1e6, 0.01), Bounds(deadline_s=0.3, keep_input=True)).choice == options[0]
    with pytest.raises(ExperimentError, match="no option to choose"):
        plan((), Link(1e6, 0.0), Bounds())


def test_what_is_not_known_does_not_count_as_kept() -> None:
    unknown = replace(_option("local"), memory_bytes=None, accuracy=None)
    for bounds in (Bounds(memory_bytes=10**9), Bounds(accuracy=0.0)):
        with pytest.raises(ExperimentError):
            plan((unknown,), OFFLINE, bounds)


@pytest.mark.parametrize("bad", [{"deadline_s": -1.0}, {"accuracy": math.nan}, {"energy_j": math.inf}])
def test_a_bound_that_is_none_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ExperimentError, match="finite"):
        Bounds(**bad)  # type: ignore[arg-type]


@few
@given(lines(), st.floats(0, 0.1), st.none() | st.floats(0.05, 1.0))
def test_switch_points_agree_with_a_dense_search(line: Line, rtt_s: float, deadline_s: float | None) -> None:
    options, bounds = _options(line), Bounds(deadline_s=deadline_s)
    exact = switches(options, bounds, rtt_s, 1e5, 1e9)
    rates = [10 ** (5.001 + 3.99 * step / 100) for step in range(101)]
    assert exact[0][0] == 1e5
    for rate in rates:
        promised = [option for start_bps, option in exact if start_bps <= rate][-1]
        link = Link(rate, rtt_s)
        kept = [one.latency_s(link) for one in options if one.longest_s(link) <= (deadline_s or math.inf)]
        assert bool(kept) == (promised is not None)
        if promised:
            assert promised.latency_s(link) == pytest.approx(min(kept), rel=1e-9)


def test_what_comes_back_takes_time_on_the_link_too() -> None:
    """A large map as the answer makes the tail worth less; where it wins is told by both directions."""
    local = _option("local", 0.1)
    cloud, large = _option(INPUT, 0.0, 10_000), replace(_option(INPUT, 0.0, 10_000), reply_bytes=90_000)
    link = Link(8e6, 0.01)
    assert large.latency_s(link) - cloud.latency_s(link) == pytest.approx(0.09)
    assert large.longest_s(link) - cloud.longest_s(link) == pytest.approx(0.09)
    assert plan((local, cloud), link, Bounds()).choice == cloud
    assert plan((local, large), link, Bounds()).choice == local
    found = switches((local, large), Bounds(deadline_s=0.15), 0.01, 1e5, 1e9)
    assert [rate for rate, _ in found] == pytest.approx([1e5, 8 * 100_000 / 0.09])


def test_every_winner_has_its_range() -> None:
    """Fixed times of 100, 50 and 10 ms; 0, 10 kB and 100 kB: lines in 1 / bandwidth that cross where they should."""
    local, cut, cloud = _option("local", 0.1), _option("b1", 0.04, 10_000), _option(INPUT, 0.0, 100_000)
    found = switches((cloud, local, cut), Bounds(), 0.01, 1e5, 1e9)
    assert [option for _, option in found] == [local, cut, cloud]
    assert [rate for rate, _ in found] == pytest.approx([1e5, 8 * 10_000 / 0.05, 8 * 90_000 / 0.04])
    late = switches((cloud, cut), Bounds(deadline_s=0.09), 0.01, 1e5, 1e9)
    assert [option for _, option in late] == [None, cut, cloud]
    assert [rate for rate, _ in late] == pytest.approx([1e5, 8 * 10_000 / 0.04, 8 * 90_000 / 0.04])


def _option(boundary: str, worst_s: float = 0.0, size: float = 0.0, tail_s: float = 0.0) -> Option:
    if boundary == "local":
        return Option((), (), None, None, worst_s, worst_s, memory_bytes=0)
    cost = {"bytes": size, "tail_s": tail_s, "carries_input": boundary == INPUT}
    return Option((), (), boundary, "u8", worst_s, worst_s, 1.0, memory_bytes=0, **cost)  # type: ignore[arg-type]


def _line() -> Line:
    """One fixed line: two inner boundaries, an exit at each."""
    pairs = [(INPUT, "b0"), (INPUT, "b1"), (INPUT, OUTPUT), ("b0", "b1"), ("b0", OUTPUT), ("b1", OUTPUT)]
    seconds = [0.01, 0.02, 0.04, 0.012, 0.033, 0.021]
    exits = [Exit(f"e{at}", f"b{at}", Tensor(f"l{at}", "float32", (-1, 10))) for at in range(2)]
    bundle = bundle_of(2, exits, {"b0": {"u8": Sent(0.9)}, "b1": {"u8": Sent(0.8)}})
    cost = {coding_key(name, "u8"): CodingCost(0.001, 0.001, size) for name, size in (("b0", 8000), ("b1", 4000))}
    device = Profile(
        "device", VERSION, 1, pieces=dict(zip((piece_key(*pair) for pair in pairs), seconds)), codings=cost
    )
    tails = {piece_key(name, OUTPUT): 0.004 for name in (INPUT, "b0", "b1")}
    return Line(bundle, device, Profile("cloud", VERSION, 4, pieces=tails), (), ())


LOCAL, CLOUD = _option("local", worst_s=0.100), _option(INPUT, size=20_000, tail_s=0.01)
EQUAL_BPS = 8 * 20_000 / (0.100 - 0.01 - 0.02)  # with a round trip of 20 ms both take 100 ms


def _run(state: Replanner, links: list[Link]) -> list[Option]:
    choices = []
    for link in links:
        state = step(state, link)
        choices.append(state.choice)
    return choices


def _changes(choices: list[Option]) -> int:
    return sum(before != after for before, after in pairwise(choices))


@few
@given(lines(), LINKS, LINKS)
def test_on_a_steady_link_the_replanner_ends_within_the_margin_of_the_best(line: Line, first: Link, link: Link) -> None:
    options = _options(line)
    choices = _run(start(options, first, Bounds()), [link] * 10)
    best_s = plan(options, link, Bounds()).choice.latency_s(link)
    assert choices[-1].latency_s(link) <= max(best_s * (1 + replan.MARGIN), best_s + replan.MARGIN_S) + 1e-12
    assert _changes(choices) <= 1


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    noise=st.floats(0, 0.5),
    off=st.floats(0.9, 1.1),
    deadline_s=st.sampled_from([None, 0.100, 0.11, 0.15]),
)
def test_noise_around_a_switch_point_causes_a_handful_of_changes(
    seed: int, noise: float, off: float, deadline_s: float | None
) -> None:
    chance = random.Random(seed)
    links = [Link(off * EQUAL_BPS * chance.lognormvariate(0, noise), 0.02) for _ in range(600)]
    choices = _run(start((LOCAL, CLOUD), links[0], Bounds(deadline_s=deadline_s)), links)
    naive = _changes([replan.best((LOCAL, CLOUD), link, Bounds(deadline_s=deadline_s)) for link in links])
    assert _changes(choices) <= max(8, naive // 20)


def test_an_estimated_link_that_falls_100_times_is_followed_and_its_recovery_too() -> None:
    link_state, now = LinkState(), 0.0
    link_state = observe(link_state, 64, 0.02, 0.0, now)
    choices = []
    state = start((LOCAL, CLOUD), OFFLINE, Bounds())
    for rate in [20e6] * 10 + [0.2e6] * 10 + [20e6] * 10:
        now += 0.1
        link_state = observe(link_state, 20_000, 0.02 + 8 * 20_000 / rate, 0.0, now)
        state = step(state, estimate(link_state) or OFFLINE)
        choices.append(state.choice)
    assert choices[5:10] == [CLOUD] * 5
    assert choices[13:20] == [LOCAL] * 7  # after three requests
    assert choices[25:] == [CLOUD] * 5
    assert _changes(choices) == 2


def test_patience_grows_with_every_change_and_wears_off() -> None:
    good, bad = Link(1.3 * EQUAL_BPS, 0.02), Link(0.8 * EQUAL_BPS, 0.02)  # 1.19 and 1.18 times better: 1.9 and 1.7
    state = start((LOCAL, CLOUD), good, Bounds())
    waited = []
    for link in (bad, good, bad, good, bad, good):
        before, steps = state.choice, 0
        while state.choice == before:
            state, steps = step(state, link), steps + 1
        waited.append(steps)
    assert waited == [4, 7, 15, 26, 57, 52]
    for _ in range(4 * replan.CALM * int(replan.MOST_PATIENCE)):
        state = step(state, good)
    assert state.patience == replan.PATIENCE


def test_a_choice_that_breaks_its_deadline_is_left_at_once() -> None:
    bounds = Bounds(deadline_s=0.12)
    state = start((LOCAL, CLOUD), Link(1.5 * EQUAL_BPS, 0.02), bounds)
    assert state.choice == CLOUD
    assert step(state, Link(0.6 * EQUAL_BPS, 0.02)).choice == LOCAL


def test_an_option_that_hardly_keeps_the_deadline_is_not_changed_to() -> None:
    far = replace(LOCAL, device_s=0.5, worst_s=0.05)  # 5 times slower on average, but always in time
    close = Link(0.945 * EQUAL_BPS, 0.02)  # the cloud takes 104 ms
    state = start((far, CLOUD), OFFLINE, Bounds(deadline_s=0.108))
    assert _run(state, [close] * 50)[-1] == far
    assert _run(start((far, CLOUD), OFFLINE, Bounds(deadline_s=0.2)), [close] * 50)[-1] == CLOUD


def test_where_all_miss_the_deadline_the_longest_time_counts_not_the_mean() -> None:
    leaves = Option((), ("e0",), None, None, 0.01, 0.3)
    state = Replanner((leaves, LOCAL), Bounds(deadline_s=0.05), leaves)
    assert _run(state, [OFFLINE] * 9)[-1] == LOCAL


def test_where_no_option_keeps_the_deadline_the_one_that_misses_it_least_runs() -> None:
    state = start((LOCAL, CLOUD), OFFLINE, Bounds(deadline_s=0.001))
    assert state.choice == LOCAL
    assert _run(state, [Link(1e9, 0.0)] * 3)[-1] == CLOUD
    with pytest.raises(ExperimentError, match="keep_input = false"):
        start((CLOUD,), OFFLINE, Bounds(keep_input=True))


@given(st.floats(0.02, 50), st.floats(1e-4, 1))
def test_factors_converge_on_what_is_observed(ratio: float, profiled_s: float) -> None:
    scale = Scale()
    for _ in range(60):
        scale = device_took(scale, ratio * profiled_s, profiled_s)
    assert scale.device == pytest.approx(ratio, rel=0.01)
    assert scale.cloud == 1.0


@given(st.floats(), st.floats())
def test_factors_stay_finite_whatever_a_peer_claims(observed_s: float, profiled_s: float) -> None:
    scale = cloud_took(Scale(), observed_s, profiled_s)
    assert 1 / 2 < scale.cloud < 2
    assert scale.device == 1.0


def test_a_device_that_throttles_plans_anew() -> None:
    link, scale = Link(0.8 * EQUAL_BPS, 0.02), Scale()
    state = step(start((LOCAL, CLOUD), link, Bounds()), link, scale)
    assert state.choice == LOCAL
    for _ in range(20):
        scale = device_took(scale, 0.3, 0.1)
        state = step(state, link, scale)
    assert state.choice == CLOUD
    for _ in range(20):
        scale = cloud_took(scale, 1.0, 0.01)
        state = step(state, link, scale)
    assert state.choice == LOCAL
