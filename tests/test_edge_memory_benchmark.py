"""The memory benchmark: both runtimes have the same model, each in a process of its own, and the worst model judges."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from benchmarks import edge_memory, edge_memory_process
from benchmarks.light_models import weighted
from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, OUTPUT
from fedge.edge.runtime.sessions import open_piece

GOALS = {
    "times less private memory than onnxruntime, worst large model",
    "times faster to load than onnxruntime, worst large model",
    "run time over onnxruntime's, worst model",
}


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "squeezenet"
    assert edge_memory.made("squeezenet", folder) > 4_900_000
    return folder


def test_both_forms_of_a_model_are_the_same_model(squeezenet):
    bundle = bundles.load(squeezenet / "bundle")
    (tensor,) = bundle.boundary(INPUT).tensors
    x = np.random.default_rng(1).standard_normal(tensor.shape).astype(np.float32)
    plain = onnxruntime.InferenceSession(str(squeezenet / "model.onnx"), providers=["CPUExecutionProvider"])
    runner = open_piece(squeezenet / "bundle", bundle, INPUT, OUTPUT, cache=squeezenet / "cache")
    (found,) = runner.run({tensor.name: x}).values()
    (wanted,) = plain.run(None, {tensor.name: x})
    assert np.std(wanted) > 0.1, "no softmax, no zeros that would hide a difference"
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert (squeezenet / "model.onnx").stat().st_size > 4_900_000, "plain onnxruntime gets one file"
    assert (squeezenet / "bundle/pieces/whole.onnx").stat().st_size < 100_000


def test_random_weights_are_the_same_each_time():
    assert weighted("squeezenet").SerializeToString() == weighted("squeezenet").SerializeToString()


@pytest.mark.slow
def test_a_model_is_compared_in_processes_of_its_own(tmp_path):
    lines, ratios = edge_memory.compared("squeezenet", tmp_path / "model", 1, 2)
    assert [line["runtime"] for line in lines] == ["fedge", "onnxruntime"]
    assert lines[0]["first_use_ms"] > lines[0]["load_ms"]
    assert lines[0]["mapped_mib"] > lines[0]["weights_mib"], "weights are mapped"
    assert lines[1]["private_mib"] > lines[1]["weights_mib"], "weights are copied"
    assert lines[0]["apart"] < 1e-4
    assert ratios["large"] is False
    assert ratios["memory"] > 1


def test_a_cache_that_does_not_work_stops_the_benchmark(squeezenet, tmp_path):
    (tmp_path / "bundle").symlink_to(squeezenet / "bundle")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(SystemExit, match="nothing to measure"):
        edge_memory_process.loaded("fedge", tmp_path, 1)


def test_a_process_that_fails_is_quoted(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)edge_memory_process fedge.* failed: .*bundle\.json"):
        edge_memory.child("fedge", tmp_path)


def test_goals_are_about_the_worst_and_memory_only_about_the_large():
    ratios = [
        {"large": True, "memory": 9.0, "load": 4.0, "slower": 1.0},
        {"large": True, "memory": 6.0, "load": 40.0, "slower": 0.9},
        {"large": False, "memory": 2.0, "load": 3.0, "slower": 1.04},
    ]
    assert [(one.value, one.holds) for one in edge_memory.goals(ratios)] == [(6.0, True), (4.0, False), (1.04, True)]
    assert {one.name for one in edge_memory.goals([])} == GOALS
    assert not any(one.holds for one in edge_memory.goals([]))


def test_a_row_is_made_of_medians():
    found = [{"load_s": one, "private": 2 << 20, "mapped": 0, "first_run_s": 1.0} for one in (0.3, 0.1, 0.2)]
    row = edge_memory.row("m", 1 << 20, "onnxruntime", found, [0.5, 0.25, 1.0])
    assert (row["load_ms"], row["private_mib"], row["run_ms"], row["verify_ms"]) == (200.0, 2.0, 500.0, None)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_run_prints_one_object_of_the_contract():
    command = [sys.executable, "-m", "benchmarks.edge_memory", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == "edge_memory"
    assert {one["name"] for one in result["goals"]} == GOALS
    assert {row["model"] for row in result["rows"]} == set(edge_memory.QUICK)
