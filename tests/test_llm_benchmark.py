"""The language benchmark: one model in every runtime's form, processes and their limits, a network, goals."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import llm, llm_cases, llm_link, llm_models, llm_ranks, llm_rivals
from benchmarks.llm_cases import FEDGE, Case, Found
from benchmarks.llm_models import TINY
from benchmarks.llm_net import Net
from benchmarks.llm_processes import ControlGroup, Process, limits_work, watch
from benchmarks.llm_ranks import Crew, Opening, Taken
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.shards.shard import open_shard
from fedge.edge.llm.shards.shares import even
from tests.llm_reference import logits

TOKENS = 6
HOG = "import time; held = bytearray(200 << 20); time.sleep(60)"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prompt():
    return llm_cases.prompt(TINY)


@pytest.fixture(scope="module")
def wanted(cache, prompt):
    """What the slow, obvious model says."""
    ids = list(prompt)
    with open_folder(llm_models.folder(TINY, cache=cache)) as folder:
        for _ in range(TOKENS):
            ids.append(int(logits(folder, np.array(ids))[-1].argmax()))
    return ids[len(prompt) :]


def openings(paths, kernel, **more):
    return [Opening(str(path), rank, 0, kernel, **more) for rank, path in enumerate(paths)]


def test_both_folders_hold_the_same_numbers(cache):
    narrow, wide = (llm_models.folder(TINY, dtype, cache) for dtype in ("BF16", "F32"))
    sizes = [(path / llm_models.WEIGHTS).stat().st_size for path in (narrow, wide)]
    assert sizes[1] > 1.9 * sizes[0]
    with open_folder(narrow) as one, open_folder(wide) as other:
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
            np.testing.assert_array_equal(one.tensor(name), other.tensor(name))
            assert one.tensor(name).std() > 0.01


def test_shards_are_made_again_when_they_are_broken_or_the_code_has_changed(cache, monkeypatch):
    first = llm_models.shards(TINY, "int8", 2, cache)
    before = [path.read_bytes() for path in first]
    first[1].write_bytes(b"broken")
    assert [path.read_bytes() for path in llm_models.shards(TINY, "int8", 2, cache)] == before
    unchanged = first[1].stat().st_mtime_ns
    llm_models.shards(TINY, "int8", 2, cache)
    assert first[1].stat().st_mtime_ns == unchanged
    monkeypatch.setattr(llm_models, "_code", lambda: "other code")
    llm_models.shards(TINY, "int8", 2, cache)
    assert first[1].stat().st_mtime_ns > unchanged
    assert open_shard(first[1]).shares == even(open_shard(first[0]).config, 2)


def test_devices_that_lack_memory_hold_as_many_bytes_each(cache):
    def apart(paths):
        sizes = [sum(block.bytes for block in open_shard(path).blocks) for path in paths]
        return abs(sizes[0] - sizes[1]) / sum(sizes)

    even_ones = llm_models.shards(TINY, "int4", 2, cache)
    assert apart(even_ones) > 0.1, "the head is on rank 0"
    (child, _) = by_bytes = llm_models.made(TINY, "shards", "int4", "2", "by-bytes", cache=cache)
    assert child.parent != even_ones[0].parent
    assert apart(by_bytes) < 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_answer_as_the_reference_does(cache, prompt, wanted, ranks):
    paths = llm_models.shards(TINY, "float32", ranks, cache)
    with Crew(openings(paths, "numpy-float32", profile=True)) as crew:
        crew.order(prompt, TOKENS)
        taken = crew.end(60)
        assert all(process.private_bytes > 10 << 20 for process in crew.processes)
    assert list(taken.ids) == wanted
    assert len(taken.token_s) == TOKENS - 1
    assert taken.ttft_s > 0
    assert {"qkv", "o", "gate_up", "down", "head", "attention", "pointwise", "exchange", "rest"} <= set(taken.parts)
    assert (taken.rtt_s > 0) == (ranks > 1)


def test_a_rank_reads_past_the_cache_where_it_is_told_to(cache, prompt, wanted, monkeypatch):
    (path,) = llm_models.shards(TINY, "float32", 1, cache)
    largest = max(block.bytes for block in open_shard(path).blocks)
    given = []
    monkeypatch.setattr(llm_ranks, "Window", lambda *facts, limits: given.append(facts[2:]))
    for direct in (True, None):
        llm_ranks._blocks(Opening(str(path), 0, 0, "numpy-float32", 2 * largest, direct=direct))
    assert given == [(2 * largest, True), (2 * largest, None)]
    with Crew(openings([path], "numpy-float32", memory_bytes=2 * largest)) as crew:
        crew.order(prompt, TOKENS)
        assert list(crew.end(60).ids) == wanted


def test_a_slow_device_takes_the_time_it_would_take(cache, prompt):
    paths = llm_models.shards(TINY, "int8", 1, cache)
    weights = TINY.vocab * TINY.hidden + TINY.layers * TINY.hidden * (3 * TINY.ffn + 3 * TINY.hidden)
    with Crew(openings(paths, "numpy-int8", weights_per_s=weights / 0.05)) as crew:
        crew.order(prompt[:2], 4)
        assert min(crew.taken(60).token_s) >= 0.049
        crew.order(prompt[:2], 4)  # the same ranks run again
        assert len(crew.taken(60).ids) == 4


def test_a_rank_that_fails_is_quoted(prompt):
    with Crew(openings(["nowhere.safetensors"], "numpy-int8")) as crew:
        crew.order(prompt, TOKENS)
        with pytest.raises(RuntimeError, match="failed: .*nowhere.safetensors is missing"):
            crew.end(60)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("float32", "F32"), ("float32+disk", "F32"), ("llama.cpp", "Q8_0")])
def test_rivals_have_the_same_model(cache, prompt, wanted, name, dtype):
    if name == "llama.cpp":
        pytest.importorskip("llama_cpp")  # takes minutes to build
    make = llm_models.gguf if name == "llama.cpp" else llm_models.folder
    path = make(TINY, dtype, cache)
    command = [sys.executable, "-m", "benchmarks.llm_rivals", name, str(path), "1,2", json.dumps(prompt), str(TOKENS)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    exact = 1 if name == "llama.cpp" else TOKENS  # eight bits lead elsewhere in the end
    assert found["ids"][:exact] == wanted[:exact]
    assert found["threads"] in (1, 2)
    assert len(found["token_s"]) == TOKENS - 1


def test_a_rival_is_given_every_token_once_and_in_order():
    seen = []

    def following(ids, at):
        seen.append((list(ids), at))
        return 100 + len(seen)

    found = llm_rivals.timed(following, [5, 6, 7], 3)
    assert seen[2:] == [([5, 6, 7], 0), ([103], 3), ([104], 4)]
    assert found["ids"] == [103, 104, 105]


@pytest.mark.skipif(not limits_work(), reason="this system gives no memory control groups")
def test_a_process_beyond_its_limit_is_killed_and_said_to_be():
    process = Process("timeit", ["-n", "1", HOG], limit_bytes=100 << 20)
    try:
        assert process.group
        folder = process.group.folder
        assert watch([process], 30)
        assert process.fate == "killed: out of memory"
        assert 90 << 20 < process.group_bytes <= 100 << 20
    finally:
        process.close()
    assert not folder.exists()


@pytest.mark.skipif(not limits_work(), reason="this system gives no memory control groups")
def test_pages_of_files_count_for_who_reads_them(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 << 20))
    llm_models.forget([path])
    process = Process("timeit", ["-n", "1", f"open({str(path)!r}, 'rb').read(64 << 20)"])
    try:
        assert watch([process], 30)
        assert process.popen.returncode == 0, process.fate
        assert process.group_bytes > 100 << 20, "the file once in the cache, and once in the process"
    finally:
        process.close()


def test_a_control_group_that_cannot_be_is_no_group():
    if limits_work():
        group = ControlGroup(None)
        assert group.folder.exists()
        group.close()
        assert not group.folder.exists()
    with pytest.raises(OSError, match="."):
        ControlGroup(-5)


@pytest.mark.parametrize(("delay_s", "bps", "least_s"), [(0.0, 1e9, 0.0), (0.03, 1e9, 0.06), (0.0, 8e5, 0.2)])
def test_the_net_delays_and_limits(delay_s, bps, least_s):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo():
            peer, _ = server.accept()
            with peer:
                while data := peer.recv(1 << 16):
                    peer.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        true = f"127.0.0.1:{server.getsockname()[1]}"
        with Net([true, "127.0.0.1:1"], delay_s, bps) as net:
            assert net.addresses(0) == [true, "127.0.0.1:1"]
            host, port = net.addresses(1)[0].split(":")
            with socket.create_connection((host, int(port)), 10) as one:
                begun = time.monotonic()
                one.sendall(bytes(10_000))
                got = 0
                while got < 10_000:
                    got += len(one.recv(1 << 16))
                took_s = time.monotonic() - begun
            thread.join(10)
            assert not thread.is_alive(), "the end goes through as well"
    assert least_s <= took_s < least_s + 10


def test_the_planner_is_judged_by_the_worst_link(cache):
    (path,) = llm_models.shards(TINY, "int8", 1, cache)
    points = [(0, 50), (20, 50)]

    def taken(*seconds):
        return [Taken(0.1, (one,) * 3, (1,), rtt, 5e7) for one, rtt in zip(seconds, (1e-4, 4e-2))]

    rows = llm_link.rows(path, points, {1: taken(0.02, 0.02), 2: taken(0.011, 0.1)}, 1e8)
    assert [(row["ranks"], row["delay_ms"], row["planned"]) for row in rows] == [
        (1, 0, False),
        (2, 0, True),
        (1, 20, True),
        (2, 20, False),
    ]
    assert rows[0]["predicted_ms"] == 20.0, "other work is measured with one rank"
    assert next(one.value for one in llm_link.goals(rows)) == 1.0
    wrong = llm_link.rows(path, points, {1: taken(0.02, 0.02), 2: taken(0.03, 0.1)}, 1e8)
    regret, _ = llm_link.goals(wrong)
    assert (regret.value, regret.holds) == (1.5, False)


def test_what_the_prediction_is_made_from_does_not_judge_it():
    def row(ranks, predicted):
        facts = {"ranks": ranks, "predicted_ms": predicted, "ms_per_token": 10.0, "planned": ranks == 2}
        return {"part": "link", "delay_ms": 0, "Mbit/s": 50} | facts

    _, off = llm_link.goals([row(1, 10.0), row(1, 10.0), row(2, 13.0)])
    assert off.value == 0.3
    _, off = llm_link.goals([row(1, 10.0) | {"planned": True}])
    assert off.value is None


def test_a_figure_is_drawn(cache, tmp_path):
    (path,) = llm_models.shards(TINY, "int8", 1, cache)
    taken = {ranks: [Taken(0.1, (0.02,), (1,), 1e-3, 5e7)] * 2 for ranks in (1, 2)}
    rows = llm_link.rows(path, [(0, 50), (5, 50)], taken, 1e8)
    llm_link.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def case_row(key, ms, past_cache=False):
    part, runtime, weights, ranks, window = key
    case = Case(part, runtime, weights, ranks, window_mib=512 if window else 0, past_cache=past_cache)
    return llm_cases.row(case, [Found(0.1, ms / 1e3, 1, (1, 2), 1 << 20, 0, None)])


def test_goals_are_ratios_of_the_rows_they_name():
    times = dict.fromkeys(key for _, above, below, _ in llm.GOALS for key in (above, below))
    rows = [case_row(key, at + 1) for at, key in enumerate(times)]
    order = {key: at + 1 for at, key in enumerate(times)}
    found = {one.name: one.value for one in llm.judged(rows)}
    for name, above, below, _ in llm.GOALS:
        assert found[name] == round(order[above] / order[below], 3)
    past = [case_row(key, 1000, past_cache=True) for key in times if key[-1]]
    assert past
    assert {one.name: one.value for one in llm.judged([*rows, *past])} == found
    assert all(one.value is None and not one.holds for one in llm.judged([]))


def test_every_goal_is_about_cases_that_are_run():
    cases = [case for case in (*llm.FREE, *llm.CAPPED) if not case.past_cache]
    keys = {(one.part, one.runtime, one.weights, one.ranks, one.window_mib > 0) for one in cases}
    assert len(keys) == len(cases)
    assert {key for _, above, below, _ in llm.GOALS for key in (above, below)} <= keys


def test_a_row_has_medians_the_largest_memory_and_what_went_wrong():
    case = Case("caps", FEDGE, "int4", 2, limit_mb=600)
    runs = [Found(ttft, ttft / 10, 2, (1,), int(100 * ttft) << 20, 0, 5 << 20) for ttft in (0.3, 0.1, 0.2)]
    row = llm_cases.row(case, runs)
    assert (row["ttft_ms"], row["ms_per_token"], row["tokens_per_s"], row["private_mib"]) == (200.0, 20.0, 50.0, 30)
    bad = llm_cases.row(case, [], "killed: out of memory")
    assert bad["note"] == "killed: out of memory"
    assert "ms_per_token" not in bad


def test_what_is_missing_or_fails_is_a_row(cache, monkeypatch):
    monkeypatch.setitem(llm_cases.MODULES, "transformers", ("torch", "no_such_module"))
    cases = [Case("rivals", "transformers", "float32"), Case("int8", FEDGE, "int9")]
    rows = llm.compared(cases, TINY, cache, 2)
    assert rows[0]["note"] == "missing: no_such_module"
    assert rows[1]["note"]
    assert not any("ms_per_token" in row for row in rows)


def test_a_part_that_fails_leaves_the_rows_of_the_others():
    def broken():
        raise RuntimeError("killed: out of memory")

    rows = llm.every(["link", "real"], {"link": broken, "real": lambda: [{"part": "real", "weights": "toy"}]})
    assert rows == [{"part": "link", "note": "failed: killed: out of memory"}, {"part": "real", "weights": "toy"}]
    assert llm_link.measured(rows) == []
    assert all(one.value is None for one in llm.judged(rows))


def test_what_is_measured_is_told_before_it_is_drawn(tmp_path, monkeypatch, capsys):
    def broken(rows, path):
        raise OSError("no space")

    row = {"part": "link", "runtime": "fedge", "ranks": 2, "delay_ms": 0, "Mbit/s": 50, "planned": True}
    monkeypatch.setattr(llm_link, "measure", lambda *_, quick: [row | {"predicted_ms": 10.0, "ms_per_token": 10.0}])
    monkeypatch.setattr(llm_link, "draw", broken)
    words = ["llm", "--quick", "--json", "--only", "link", "--cache", str(tmp_path), "--figure"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "figure.png")])
    with pytest.raises(OSError, match="no space"):
        llm.main()
    assert json.loads(capsys.readouterr().out)["rows"][0]["ms_per_token"] == 10.0
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "no" / "figure.png")])
    with pytest.raises(SystemExit, match="There is no folder for the figure"):
        llm.main()
    assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_run_prints_one_object_of_the_contract(tmp_path):
    command = [sys.executable, "-m", "benchmarks.llm", "--quick", "--json", "--cache", str(tmp_path)]
    figure = tmp_path / "figure.png"
    done = subprocess.run([*command, "--figure", str(figure)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == "llm"
    assert {row["part"] for row in result["rows"]} >= {"float32", "int8", "int4", "rivals", "link", "profile"}
    assert len(result["goals"]) == len(llm.judged([]))
    exact = [row for row in result["rows"] if row["weights"] == "float32" and row["runtime"] == FEDGE]
    assert len(exact) == 2
    assert result["packages"]["safetensors"] != "missing"
    assert figure.exists()


def test_an_unknown_part_is_refused():
    command = [sys.executable, "-m", "benchmarks.llm", "--only", "flaot32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode
    assert "There is no 'flaot32'" in done.stderr
