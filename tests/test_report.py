"""The report: what the timeline makes of a log, what the page shows, and what it must never let through."""

import html.parser
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import report
from fedge.core.errors import ExperimentError
from fedge.report import figures, gantt
from fedge.report.files import load
from fedge.report.style import plain
from fedge.report.timeline import KINDS, History, Span, busy, groups, intervals, jobs
from tests.report_fixture import write_run

Log = list[dict[str, Any]]
HOSTILE = "<script>alert('$x^{')</script>\x00\u202e\ud800\n" + "long" * 40


def event(t: float, kind: str, client: str = "a", **more: Any) -> dict[str, Any]:
    return {"t": t, "event": kind, "client": client, **more}


def spans(log: Log, client: str = "a") -> list[tuple[str, float, float]]:
    return [(span.kind, span.start_s, span.end_s) for span in intervals(log) if span.client == client]


def timings(download: Any, compute: Any, upload: Any = 0.0) -> dict[str, Any]:
    return {"download_s": download, "compute_s": compute, "upload_s": upload}


# ---- the timeline ------------------------------------------------------------------------------


def test_a_task_is_downloading_then_computing_then_sending_with_waiting_around_it() -> None:
    log = [
        event(0, "joined"),
        event(1, "dispatched", task="t1", steps=5),
        event(11, "arrived", task="t1", timings=timings(2, 6, 2)),
        event(14, "finished", client=""),
    ]
    assert spans(log) == [
        ("waiting", 0, 1), ("downloading", 1, 3), ("computing", 3, 9), ("sending", 9, 11), ("waiting", 11, 14),
    ]  # fmt: skip


def test_claimed_times_that_exceed_the_clock_are_scaled_down_and_nonsense_is_computing() -> None:
    log = [event(0, "dispatched", task="t1"), event(10, "arrived", task="t1", timings=timings(100, 300))]
    assert spans(log) == [("downloading", 0, 2.5), ("computing", 2.5, 10)]
    for bad in (timings(float("nan"), float("inf")), timings("x", None), timings(-5, -5), "not a table", None):
        log[1]["timings"] = bad
        assert spans(log) == [("computing", 0, 10)]


def test_late_begins_where_the_group_was_closed_without_the_client() -> None:
    log = [
        event(0, "dispatched", task="t1"),
        event(0, "group", group="g", expected_t=5.0, latest_t=6.0),
        {"t": 6, "event": "aggregated", "version": 1, "pools": ["late", "g"], "members": []},
        event(8, "arrived", task="t1", late=True, pool="late", timings=timings(1, 6, 1)),
        {"t": 9, "event": "aggregated", "version": 2, "pools": ["late"], "members": [{"client": "a", "task": "t1"}]},
    ]
    assert spans(log) == [("downloading", 0, 1), ("computing", 1, 6), ("late", 6, 8), ("waiting", 8, 9)]
    assert jobs(log)[0].overdue_s == 6
    assert jobs(log)[0].group == "g"


def test_a_late_task_whose_group_is_unknown_is_late_as_a_whole() -> None:
    log = [event(2, "dispatched", task="t1"), event(5, "arrived", task="t1", late=True, timings=timings(1, 1, 1))]
    assert spans(log) == [("late", 2, 5)]


def test_gone_lasts_from_leaving_to_coming_back_or_to_the_end_and_its_task_is_lost() -> None:
    log = [
        event(0, "joined"),
        event(1, "dispatched", task="t1"),
        event(3, "left"),
        event(7, "joined"),
        event(8, "evicted"),
        event(9, "left"),
        event(10, "finished", client=""),
    ]
    assert spans(log) == [("waiting", 0, 1), ("lost", 1, 3), ("gone", 3, 7), ("waiting", 7, 8), ("gone", 8, 10)]


@pytest.mark.parametrize("outcome", ["failed", "refused", "expired"])
def test_a_task_that_came_to_nothing_is_lost(outcome: str) -> None:
    log = [event(0, "dispatched", task="t1"), event(4, outcome, task="t1"), event(5, "finished", client="")]
    assert spans(log) == [("lost", 0, 4), ("waiting", 4, 5)]


def test_what_is_said_of_another_task_or_an_unknown_client_changes_nothing() -> None:
    log = [
        event(0, "dispatched", task="t1"),
        event(1, "refused", task="other"),
        event(2, "refused", client="stranger", task=""),
        event(4, "finished", client=""),
    ]
    assert spans(log) == [("computing", 0, 4)]
    assert {span.client for span in intervals(log)} == {"a"}


def test_groups_know_their_members_their_times_and_when_they_began() -> None:
    log = [
        event(0, "dispatched", task="t0"),
        event(1, "dispatched", "b", task="t1"),
        event(1, "group", "b", group="g", expected_t=4.0, latest_t=5.0),
        event(2, "arrived", task="t0", late=True, pool="late"),
        event(4, "arrived", "b", task="t1", pool="g"),
        {"t": 4, "event": "aggregated", "version": 7, "pools": ["late", "g"], "step": 1.0,
         "members": [{"client": "b", "task": "t1"}, {"client": "a", "task": "t0"}, {"client": "?", "task": "?"}]},
    ]  # fmt: skip
    (group,) = groups(log)
    assert (group.name, group.version, group.closed_s, group.expected_s, group.latest_s) == ("g", 7, 4, 4.0, 5.0)
    assert [job.client for job in group.members] == ["b", "a"]
    assert group.start_s == 1, "a late update began in another group"


def test_busy_is_work_that_counted_over_connected_time() -> None:
    known = [Span("a", "computing", 0, 3), Span("a", "late", 3, 4), Span("a", "lost", 4, 6), Span("a", "gone", 6, 99)]
    assert busy(known) == pytest.approx(4 / 6)
    assert busy([]) is None


KNOWN = ["joined", "dispatched", "arrived", "refused", "failed", "expired", "left", "evicted", "group"]
STEPS = st.tuples(
    st.sampled_from(KNOWN), st.sampled_from("abc"), st.sampled_from(["t1", "t2", ""]), st.integers(0, 4),
    st.booleans(), st.floats(), st.floats(0, 5),
)  # fmt: skip


def random_log(steps: list[tuple[Any, ...]]) -> Log:
    now, log = 0.0, []
    for kind, client, task, later, late, download, compute in steps:
        now += later / 2
        log.append(
            event(now, kind, client, task=task, late=late, timings=timings(download, compute), group="g", steps=later)
        )
        if later == 4:
            log.append({"t": now, "event": "aggregated", "version": 1, "pools": ["g"], "members": [log[-1]]})
    return log


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_spans_follow_each_other_without_gap_or_overlap_from_joining_to_the_end(steps: list[tuple[Any, ...]]) -> None:
    log = random_log(steps)
    found: dict[str, list[Span]] = {}
    for span in intervals(log):
        found.setdefault(span.client, []).append(span)
    seen: dict[str, float] = {}
    for entry in log:
        if entry["event"] in ("joined", "dispatched"):
            seen.setdefault(entry["client"], entry["t"])
    for client, since in seen.items():
        own = found.get(client, [])
        assert [span.start_s for span in own] == [since, *(span.end_s for span in own)][: len(own)]
        assert all(span.end_s > span.start_s and span.kind in KINDS for span in own)
        assert (own[-1].end_s if own else since) == log[-1]["t"]
    assert set(found) <= set(seen)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_a_client_is_gone_exactly_while_it_is_away(steps: list[tuple[Any, ...]]) -> None:
    log = random_log(steps)
    known = intervals(log)
    for client in "abc":
        here, seen = True, False
        for entry, after in pairwise(log):
            if entry.get("client") == client:
                seen = seen or entry["event"] in ("joined", "dispatched")
                here = entry["event"] in ("joined", "dispatched") or (
                    here and not (seen and entry["event"] in ("left", "evicted"))
                )
            if seen and after["t"] > entry["t"]:
                middle = (entry["t"] + after["t"]) / 2
                (kind,) = [s.kind for s in known if s.client == client and s.start_s <= middle < s.end_s]
                assert (kind == "gone") == (not here)


def test_the_fixture_shows_why_groups_beat_rounds(tmp_path: Path) -> None:
    shares = {}
    for kind in ("compass", "fedavg"):
        known = intervals(load(write_run(tmp_path / kind, kind)).events)
        shares[kind] = busy(known) or 0.0
        if kind == "compass":
            assert {span.kind for span in known} == set(KINDS)
    assert shares["compass"] > 0.8 > 0.6 > shares["fedavg"]


# ---- what is drawn -----------------------------------------------------------------------------


def test_many_clients_are_thinned_from_fast_to_slow_and_a_long_run_is_cut(tmp_path: Path) -> None:
    history = History.of(load(write_run(tmp_path, "fedavg", updates=400, clients=100)).events)
    everyone = history.by_speed()
    shown = gantt.chart(history, 80)
    assert len(everyone) == 100
    assert len(shown.clients) == gantt.MAX_ROWS
    assert (shown.clients[0], shown.clients[-1]) == (everyone[0], everyone[-1])
    assert not shown.whole
    assert shown.end_s < history.end_s
    assert all(span.start_s < span.end_s <= shown.end_s for span in shown.spans)
    paces = {job.client: (job.end_s - job.start_s) / job.steps for job in history.jobs if job.outcome == "arrived"}
    assert paces[shown.clients[0]] < paces[shown.clients[20]] < paces[shown.clients[-1]]


def test_first_at_is_the_first_evaluation_that_meets_the_target() -> None:
    metrics: list[dict[str, Any]] = [{"t": t, "accuracy": a} for t, a in [(1, 0.2), (2, None), (3, 0.8), (4, 0.7)]]
    assert figures.first_at(metrics, 0.75) == 3
    assert figures.first_at(metrics, 0.9) is None
    assert figures.first_at(metrics, None) is None


# ---- the page ----------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; `open` must be empty at the end: every tag is closed."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_every_part_and_needs_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = report.write(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text("utf-8"))
    for words in (
        "mnist-compass", "best accuracy", "to reach 80%", "scheduler compass", "Learning", "What every client did",
        "Staleness", "Traffic per client", "Data", "Refused and failed", "NOT_FINITE", "The experiment, as resolved",
        "gateway-05", "aggregated together",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") >= 5
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert len({value for name, value in page.attributes if name == "id"}) == sum(
        name == "id" for name, _ in page.attributes
    )
    assert {"curves.png", "timeline.png", "staleness.png", "traffic.png", "partition.png"} <= {
        image.name for image in (folder / "plots").iterdir() if image.read_bytes().startswith(b"\x89PNG")
    }
    assert not list(folder.rglob("*.partial"))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path, updates=40)
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first


def spoil(folder: Path) -> None:
    """Every name that could come from a client or a server in the way of the page, made hostile."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for entry in events:
        for where in [entry, *entry.get("members", ())]:
            if where.get("client") == "phone-06":
                where["client"] = HOSTILE
        for key in ("reason", "detail", "group", "pool"):
            if key in entry:
                entry[key] = f"{entry[key]}{HOSTILE}"
        entry["pools"] = [f"{pool}{HOSTILE}" for pool in entry.get("pools", ())]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"name": HOSTILE, "seed": HOSTILE, "model_sha256": HOSTILE}
    summary["partition"] |= {"clients": [HOSTILE] * 10, "classes": [HOSTILE] * 10}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "experiment.toml").write_text(f'x = "{HOSTILE[:31]}"\n[server.scheduler]\nkind = "<b>$body</b>"\n')


def test_hostile_names_are_shown_and_never_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path, updates=60)
    spoil(folder)
    text = report.write(folder).read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "b>$body", "alert"} & set(page.tags)
    assert "<script" not in text.lower()
    assert "<script>alert('$x^{')" in page.text, "the name itself is still to be read"
    assert "<b>$body</b>" in page.text
    assert not set("\x00\u202e\ud800") & set(text)


def test_a_comparison_escapes_names_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=60)
    spoil(folder)
    text = report.compare([folder, folder], tmp_path / "out").page.read_text("utf-8")
    assert "<script" not in text.lower()
    assert Page(text).open == []


@given(st.text(st.characters(exclude_categories=())))
def test_plain_text_is_one_short_printable_line(text: str) -> None:
    assert plain(text).isprintable()
    assert len(plain(text)) <= 28
    assert plain(text).encode("utf-8").decode("utf-8") == plain(text)


def test_half_a_line_odd_values_and_missing_files_leave_a_page_about_the_rest(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=60)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"t": "soon", "event": "left"}\n[1, 2]\n{"t": 1e999, "event": "x"}\n')
        file.write('{"t": 99, "event": "aggregated", "pools": 7, "members": [3, {"client": "a"}], "version": "x"}\n')
        file.write('{"t": 99, "event": "arrived", "client": 5, "staleness": -3, "bytes": null}\n{"t": 99, "ev')
    (folder / "summary.json").write_text("{")
    (folder / "experiment.toml").unlink()
    text = report.write(folder).read_text("utf-8")
    assert "What every client did" in text
    assert "Data" not in Page(text).text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"t": 0}\n{"t": 0, "accuracy": 0.1}'),
        ("metrics.jsonl", '{"t": 1, "accuracy": NaN, "loss": Infinity}\n{"t": 1, "accuracy": 0.5, "loss": NaN}'),
        ("events.jsonl", ""),
        ("events.jsonl", '{"t": 0, "event": "joined", "client": "a"}'),
        ("events.jsonl", '{"t": 0, "event": "joined", "client": "a"}\n{"t": 3, "event": "finished"}'),
        ("events.jsonl", '{"t": 1, "event": "aggregated", "version": 1, "pools": []}'),
    ],
)
def test_next_to_nothing_still_makes_a_page(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert Page(report.write(tmp_path).read_text("utf-8")).open == []
    assert report.compare([tmp_path], tmp_path / "out").rows[0].name == tmp_path.name


def test_a_folder_without_a_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"holds no metrics\.jsonl"):
        report.write(tmp_path)
    with pytest.raises(ExperimentError, match="nothing to compare"):
        report.compare([], tmp_path)


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path, updates=30)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExperimentError, match=r"pip install '\.\[plots\]'"):
        report.write(folder)
    assert not (folder / "report.html").exists()


def test_a_page_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path, updates=30)
    (folder / "report.html").write_text("the old page")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write(folder)
    assert (folder / "report.html").read_text() == "the old page"
    assert not list(folder.rglob("*.partial"))


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    folder = write_run(tmp_path, updates=30)
    program = (
        "import sys, pathlib, fedge.report as report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.write(pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_hundred_thousand_events_make_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path, updates=34_000, clients=60)
    lines = (folder / "events.jsonl").read_text().count("\n")
    size = report.write(folder).stat().st_size
    assert lines > 95_000
    assert size < 5_000_000
    assert "of 60 clients from fast to slow" in (folder / "report.html").read_text("utf-8")


# ---- the comparison ----------------------------------------------------------------------------


def run_folder(folder: Path, name: str, kind: str, scores: list[tuple[float, float]], target: float | None) -> Path:
    folder.mkdir()
    lines = [
        {"t": t, "accuracy": a, "updates": i + 1, "bytes_up": 100 * (i + 1), "bytes_down": 50}
        for i, (t, a) in enumerate(scores)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "summary.json").write_text(json.dumps({"name": name, "target": target}))
    (folder / "experiment.toml").write_text(f'[server.scheduler]\nkind = "{kind}"\n')
    return folder


def test_compare_holds_all_runs_to_the_lowest_target_and_the_fastest(tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path / "one", "mnist", "fedavg", [(10, 0.3), (40, 0.85)], 0.9),
        run_folder(tmp_path / "two", "mnist", "compass", [(5, 0.5), (16, 0.8), (20, 0.7)], 0.8),
        run_folder(tmp_path / "three", "slow", "fedasync", [(5, 0.5)], None),
    ]
    found = report.compare(folders, tmp_path / "out")
    assert found.target == 0.8
    assert [row.name for row in found.rows] == ["one", "two", "slow"]
    assert [row.scheduler for row in found.rows] == ["fedavg", "compass", "fedasync"]
    assert [row.time_to_target_s for row in found.rows] == [40, 16, None]
    assert [row.relative for row in found.rows] == [2.5, 1.0, None]
    assert [row.best_accuracy for row in found.rows] == [0.85, 0.8, 0.5]
    assert [row.updates for row in found.rows] == [2, 3, 1]
    assert [row.bytes_total for row in found.rows] == [250, 350, 150]
    assert found.cells[2] == ("slow", "fedasync", "-", "-", "50.00%", "1", "150 B", "-")
    assert found.plot.read_bytes().startswith(b"\x89PNG")
    text = Page(found.page.read_text("utf-8")).text
    assert "two" in text
    assert "2.50" in text
    assert len(found.rows[0].cells()) == len(report.HEADS)


def test_runs_that_differ_in_their_rule_and_attack_are_told_apart(tmp_path: Path) -> None:
    rules = {
        "one": '{ kind = "mean" }',
        "two": '{ kind = "median", byzantine = 2 }',
        "three": '{ kind = "caf", byzantine = 1, pre = [{ kind = "norm-filter" }, "clip"] }',
    }
    for name, rule in rules.items():
        folder = run_folder(tmp_path / name, name, "fedavg", [(10, 0.3)], None)
        with (folder / "experiment.toml").open("a") as file:
            file.write(f"[server]\naggregator = {rule}\n")
            file.write('[simulation]\nattack = { kind = "alie", clients = 2 }\n' if name != "one" else "")
    verdicts = {"a": {"judged": 3, "rejected": 3}, "b": {"judged": 3, "rejected": 0}, "c": "damaged"}
    (tmp_path / "two" / "summary.json").write_text(json.dumps({"name": "two", "held": 1200, "verdicts": verdicts}))
    found = report.compare([tmp_path / name for name in rules], tmp_path / "out")
    assert found.heads[8:] == ("aggregator", "f", "attack", "held", "rejected")
    assert [cells[8:] for cells in found.cells] == [
        ("mean", "-", "-", "-", "-"),
        ("median", "2", "alie x 2", "1,200", "50%"),
        ("caf behind norm-filter, clip", "1", "alie x 2", "-", "-"),
    ]
    assert "caf behind norm-filter, clip" in Page(found.page.read_text("utf-8")).text


@pytest.mark.parametrize("target", [2, -1, 0, float("nan")])
def test_a_target_that_is_no_accuracy_is_refused(tmp_path: Path, target: float) -> None:
    folder = run_folder(tmp_path / "one", "a", "fedavg", [(10, 0.3)], 0.8)
    with pytest.raises(ExperimentError, match="is no accuracy; give one above 0 and at most 1"):
        report.compare([folder], tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


def test_a_target_of_ones_own_comes_before_those_of_the_runs(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "one", "a", "fedavg", [(10, 0.3), (40, 0.85)], 0.8)]
    assert report.compare(folders, tmp_path / "out", target=0.25).rows[0].time_to_target_s == 10
    assert report.compare(folders, tmp_path / "out", target=0.99).rows[0].relative is None
