"""Who was listened to: what the tally counts, what the command says of it, and what the report draws."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import experiment as experiments
from fedge import report, runs
from fedge.experiment import Stop
from fedge.progress import Progress
from fedge.report import verdicts
from fedge.report.files import load
from fedge.report.style import context
from fedge.report.timeline import History
from fedge.report.verdicts import CACHED, CACHED_REJECTED, HEARD, REJECTED, Client, Hearing, thinned
from fedge.server.machine.events import Record
from fedge.tally import ENOUGH, Tally
from tests.report_fixture import judge, write_run

with warnings.catch_warnings():  # typer still imports what click has deprecated
    warnings.filterwarnings("ignore", ".*Click 9", DeprecationWarning)
    from fedge import cli

Row = dict[str, Any]
NAMES = ("phone-00", "phone-08")  # hostile in the fixture


def row(client: str, rejected: bool, score: float | None = 1.0, **more: Any) -> Row:
    return {"client": client, "score": score, "rejected": rejected, **more}


def group(version: int, *members: Row, absent: tuple[Row, ...] = ()) -> Row:
    return {"version": version, "pools": ["p"], "members": list(members)} | ({"absent": absent} if absent else {})


def tallied(*groups: Row) -> Tally:
    tally = Tally()
    for values in groups:
        tally.record(Record(1.0, "aggregated", values))
    return tally


# ---- the tally ---------------------------------------------------------------------------------


def test_verdicts_are_counted_by_client_those_on_cached_rows_too() -> None:
    tally = tallied(
        group(1, row("a", False, 0.5, coefficient=0.5), row("b", True, 3.0, coefficient=0.0)),
        group(2, row("a", True, 2.5), absent=(row("b", True, 4.0), row("c", False, None))),
    )
    found = tally.summary()
    assert found["verdicts"] == {
        "a": {"judged": 2, "rejected": 1, "score": 1.5},
        "b": {"judged": 2, "rejected": 2, "score": 3.5},
        "c": {"judged": 1, "rejected": 0, "score": 0.0},
    }
    assert (found["updates"], found["always_rejected"], found["unheard"]) == (3, [], "")


def test_where_nobody_was_judged_the_summary_says_nothing_of_it() -> None:
    found = tallied(group(1, {"client": "a", "weight": 1.0})).summary()
    assert not {"verdicts", "always_rejected", "unheard"} & set(found)
    assert (found["held"], found["superseded"]) == (0, 0)


def test_held_groups_and_superseded_rows_are_counted() -> None:
    tally = Tally()
    tally.record(Record(1.0, "held", {"pools": ("p",), "rows": 2, "missing": "3 more clients"}))
    tally.record(Record(1.0, "held", {"pools": ("q",), "rows": 4, "missing": "1 more clients"}))
    tally.record(Record(2.0, "superseded", {"client": "a", "task": "t"}))
    assert (tally.summary()["held"], tally.summary()["superseded"]) == (2, 1)


def test_a_starved_run_says_rule_need_and_who_is_left() -> None:
    tally = Tally(rule={"kind": "bulyan", "byzantine": 1})
    tally.record(Record(1.0, "finished", {"reason": "starved", "needs": 7, "left": 6}))
    assert tally.summary()["starved"] == (
        "'bulyan' with byzantine = 1 needs 7 clients in a group, and 6 are left; set byzantine to at most 0, or have "
        "more clients take part"
    )
    tally = Tally(rule={"kind": "median", "byzantine": 1})
    for _ in range(2):
        tally.record(Record(1.0, "held", {"pools": ("p",), "rows": 2, "missing": "1 more clients"}))
    assert tally.waiting == "2 groups in a row, the last lacks 1 more clients"
    tally.record(Record(1.0, "finished", {"reason": "starved", "needs": 3, "left": 3}))
    assert "held 2 groups in a row, the last lacks 1 more clients; 3 clients are left" in tally.summary()["starved"]


def test_groups_that_are_held_are_on_the_last_line_and_in_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    tally = tallied(group(1, {"client": "a"}))
    tally.record(Record(1.0, "held", {"pools": ("p",), "rows": 2, "missing": "1 more clients"}))
    cli._report(runs.Run(experiments.parse(""), {**tally.summary(), "finished": "updates"}, {}), False)
    assert "1 versions, 1 updates, 1 groups held (updates)" in capsys.readouterr().out
    progress = Progress("", Stop())
    progress.begin(tally)
    assert ("held", "1 groups in a row, the last lacks 1 more clients") in progress._rows({})


def test_accepted_updates_are_those_of_all_clients() -> None:
    tally = Tally()
    for client in "aab":
        tally.record(Record(1.0, "arrived", {"client": client, "staleness": 0}))
    tally.record(Record(2.0, "superseded", {"client": "a", "task": "t"}))
    tally.record(Record(2.0, "aggregated", group(1, {"client": "a"}, {"client": "b"})))
    found = tally.summary()
    assert found["accepted"] == sum(found["updates_by_client"].values()) == found["updates"] + found["superseded"] == 3


@given(st.integers(1, 40), st.integers(0, 40))
def test_always_rejected_is_nine_in_ten_of_at_least_five(judged: int, rejected: int) -> None:
    rejected = min(judged, rejected)
    groups = [group(i, row("a", i < rejected), row("b", False)) for i in range(judged)]
    found = tallied(*groups).summary()
    always = judged >= 5 and 10 * rejected >= 9 * judged
    assert found["always_rejected"] == (["a"] if always else [])
    assert found["unheard"] == (f"always rejected: a ({rejected} of {judged})" if always else "")


def test_many_unheard_are_named_worst_first_and_cut_off() -> None:
    groups = [group(i, *(row(f"c{n:02d}", True) for n in range(14 if i < ENOUGH else 1))) for i in range(9)]
    words = tallied(*groups).unheard
    assert words.startswith("always rejected: c00 (9 of 9), c01 (5 of 5), ")
    assert words.endswith("c09 (5 of 5) and 4 more")


@pytest.mark.parametrize(
    ("attack", "hostile", "words"),
    [
        ("alie", ["a", "b"], "always rejected, all hostile: a (5 of 5), b (5 of 5)"),
        ("alie", ["b", "c"], "always rejected: a (5 of 5, honest), b (5 of 5)"),
        ("none", ["a", "b"], "always rejected: a (5 of 5), b (5 of 5)"),
    ],
)
def test_a_simulation_says_whether_the_rejected_are_hostile(attack: str, hostile: list[str], words: str) -> None:
    tally = Tally()
    tally.record(Record(0.0, "hostile", {"clients": hostile, "attack": attack}))
    for version in range(1, ENOUGH + 1):
        tally.record(Record(1.0, "aggregated", group(version, row("a", True), row("b", True), row("c", False))))
    assert tally.unheard == words
    assert tally.summary().get("hostile") == (None if attack == "none" else hostile)


def test_the_command_says_who_was_always_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    tally = tallied(*(group(i, row("client-003", True), row("b", False)) for i in range(23)))
    summary = {**tally.summary(), "finished": "updates"}
    cli._report(runs.Run(experiments.parse(""), summary, {}), False)
    assert "always rejected: client-003 (23 of 23)" in capsys.readouterr().out


# ---- the report --------------------------------------------------------------------------------


def hearing(folder: Path) -> Hearing:
    events = load(folder).events
    return Hearing.of(events, History.of(events).by_speed())


def test_the_hearing_holds_every_verdict_by_client_and_version() -> None:
    events: list[Row] = [
        {"t": 0.0, "event": "hostile", "clients": ["b"], "attack": "alie"},
        {"t": 1.0, "event": "aggregated"} | group(1, row("a", False, 0.5, staleness=0), row("b", True, 3.0)),
        {"t": 2.0, "event": "aggregated"} | group(2, {"client": "a", "staleness": 9}),  # by a rule that judges nobody
        {"t": 3.0, "event": "aggregated"}
        | group(4, row("a", True, 2.0, staleness=4), absent=(row("b", True), row("c", False))),
    ]
    found = Hearing.of(events, ["c", "a", "gone"])
    assert list(found.clients) == ["c", "a", "b"]  # by speed, who has none last
    assert found.versions == (1, 4)
    assert {name: one.fates for name, one in found.clients.items()} == {
        "a": {1: HEARD, 4: REJECTED},
        "b": {1: REJECTED, 4: CACHED_REJECTED},
        "c": {4: CACHED},
    }
    assert (found.clients["a"].rate, found.clients["a"].staleness, found.clients["a"].scores) == (0.5, [0, 4], [0.5, 2])
    assert found.hostile == {"b": "alie"}
    assert (found.rate(hostile=True), found.rate(hostile=False)) == (1.0, 1 / 3)


@given(st.integers(1, 400), st.integers(2, 130))
def test_thinned_keeps_the_ends_the_order_and_the_limit(count: int, most: int) -> None:
    found = thinned(range(count), most)
    assert len(found) == min(count, most)
    assert (found[0], found[-1]) == (0, count - 1)
    assert found == sorted(set(found))


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_runs_put_together_are_the_whole(values: list[str]) -> None:
    found = list(verdicts._runs(values))
    assert [values[start] for start, stop in found for _ in range(start, stop)] == values
    assert all(values[stop - 1] != values[stop] for _, stop in found[:-1])


def areas(drawn: Any, color: str) -> float:
    """The area in data units of all that was drawn in a colour in the map."""
    from matplotlib.colors import to_rgba

    total = 0.0
    for patch in drawn.axes[0].patches:
        if patch.get_facecolor() == to_rgba(color) and patch.get_zorder() == 2:
            corners = patch.get_path().vertices.reshape(-1, 5, 2)
            total += float(((corners[:, 2, 0] - corners[:, 0, 0]) * (corners[:, 2, 1] - corners[:, 0, 1])).sum())
    return total


@pytest.mark.parametrize("coefficients", [True, False])
def test_the_map_has_one_cell_per_verdict(tmp_path: Path, coefficients: bool) -> None:
    known = hearing(judge(write_run(tmp_path, updates=120), list(NAMES), cached=True, coefficients=coefficients))
    fates = [fate for one in known.clients.values() for fate in one.fates.values()]
    assert set(fates) == set(verdicts.COLOURS)
    with context():
        drawn = verdicts.draw(known)
        for fate, color in verdicts.COLOURS.items():
            assert areas(drawn, color) == pytest.approx(0.8 * fates.count(fate))
        shown = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert {"◆ phone-00", "◆ phone-08", "gateway-01"} <= set(shown)
    assert [bar.get_width() for bar in drawn.axes[1].patches] == [one.rate for one in known.clients.values()]


def test_many_clients_and_versions_are_thinned(tmp_path: Path) -> None:
    clients = {f"c{n:03d}": Client() for n in range(verdicts.MAX_ROWS + 50)}
    versions = tuple(range(1, verdicts.MAX_COLUMNS + 200))
    for index, one in enumerate(clients.values()):
        for version in versions[index % 2 :: 2]:
            one.add(version, row("", False, staleness=0), absent=False)
    with context():
        drawn = verdicts.draw(Hearing(versions, clients, {}))
    shown = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert (len(shown), shown[0], shown[-1]) == (verdicts.MAX_ROWS, "c000", f"c{len(clients) - 1:03d}")
    assert drawn.axes[0].get_xlim() == (0, verdicts.MAX_COLUMNS)


def test_the_page_shows_who_was_listened_to(tmp_path: Path) -> None:
    folder = judge(write_run(tmp_path, updates=160), list(NAMES))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"unheard": "always rejected: <b> (9 of 9)"}))
    text = report.write(folder).read_text("utf-8")
    known = hearing(folder)
    assert "Who was listened to" in text
    assert f"{known.rate(hostile=True):.0%} of hostile clients, {known.rate(hostile=False):.0%} of others" in text
    assert "Always rejected: &lt;b&gt; (9 of 9)." in text
    one = known.clients["phone-00"]
    cells = f'<td>phone-00</td><td>sign-flip</td><td class="number">{len(one.fates)}</td>'
    assert f'{cells}<td class="number">{one.rejected}</td><td class="number">{one.rate:.0%}</td>' in text
    assert (folder / "plots" / "verdicts.png").read_bytes().startswith(b"\x89PNG")


def test_without_verdicts_there_is_no_such_section(tmp_path: Path) -> None:
    assert "listened" not in report.write(write_run(tmp_path, updates=40)).read_text("utf-8")
    assert not (tmp_path / "plots" / "verdicts.png").exists()


def test_odd_verdicts_and_hostile_names_leave_a_page(tmp_path: Path) -> None:
    odd = [
        {"t": 1, "event": "hostile", "clients": 7, "attack": ["<script>"]},
        {"t": 1, "event": "hostile", "clients": [3, "<script>"], "attack": "<script>"},
        {"t": 2, "event": "aggregated", "version": "x", "members": [row("<script>", True, None), 4], "absent": 9},
        {"t": 3, "event": "aggregated", "version": 2, "members": [], "absent": [5, row("c", False, float("nan"))]},
        {
            "t": 4,
            "event": "aggregated",
            "version": 2,
            "members": [{"client": "d", "rejected": "yes"}, {"rejected": True}],
        },
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, odd)))
    text = report.write(tmp_path).read_text("utf-8")
    assert "<script" not in text
    assert "Who was listened to" in text
    assert set(hearing(tmp_path).clients) == {"<script>", "c", ""}
