"""A torch model with exits as ONNX, and cut into pieces: the same logits everywhere."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from fedge.core.errors import ModelError
from fedge.edge.bundle import INPUT, OUTPUT
from fedge.edge.exits.rules import decide
from fedge.edge.exits.to_onnx import to_onnx
from fedge.edge.exits.train import EarlyExit, exit_head
from fedge.edge.split.export import export

pytestmark = pytest.mark.slow  # torch's exporter takes seconds to begin
SAMPLE = torch.rand(1, 3, 12, 12)


def session(path: Path, weights: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(weights or path.parent)
    )
    return ort.InferenceSession(path.read_bytes(), options)


def small() -> EarlyExit:
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()),
    ]
    exits = {0: exit_head(torch.zeros(1, 6, 6, 6), 5), 1: exit_head(torch.zeros(1, 8, 6, 6), 5, "conv")}
    model = EarlyExit(stages, exits, nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(128, 5)))
    with torch.no_grad():
        for _ in range(3):
            model(3 + torch.randn(16, 3, 12, 12))  # so that batch norm has something to remember
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[EarlyExit, Path, tuple[tuple[str, str], ...]]:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = small()
    model.stages[1].eval()
    modes = [module.training for module in model.modules()]
    exits = to_onnx(model, SAMPLE, path)
    assert modes == [module.training for module in model.modules()]
    return model.eval(), path, exits


def test_onnxruntime_computes_what_torch_does_for_any_batch(made: tuple[EarlyExit, Path, object]) -> None:
    model, path, exits = made
    assert exits == (("exit_1", "exit_1"), ("exit_2", "exit_2"))
    runs = session(path)
    assert [output.name for output in runs.get_outputs()] == [OUTPUT, "exit_1", "exit_2"]
    for batch in (1, 2, 7):
        x = 3 + torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            wanted = dict(zip(("exit_1", "exit_2", OUTPUT), model(x)))
        found = runs.run(None, {INPUT: x.numpy()})
        for output, array in zip(runs.get_outputs(), found):
            np.testing.assert_allclose(array, wanted[output.name].numpy(), rtol=1e-5, atol=1e-5)


def test_the_file_keeps_batch_norm_and_names_and_tells_of_no_machine(made: tuple[EarlyExit, Path, object]) -> None:
    model, path, _ = made
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert [node.op_type for node in graph.graph.node].count("BatchNormalization") == 1
    assert {name for name, _ in model.named_parameters()} <= {one.name for one in graph.graph.initializer}
    data = path.read_bytes()
    assert not any(word in data for word in (b".py", b"packages/", b"stack_trace", b"pkg.torch"))


def test_a_module_without_exits_has_one_output(tmp_path: Path) -> None:
    assert to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), SAMPLE, tmp_path / "plain.onnx") == ()
    assert [output.name for output in session(tmp_path / "plain.onnx").get_outputs()] == [OUTPUT]


def test_what_cannot_be_translated_or_written_is_refused(tmp_path: Path) -> None:
    class Moody(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="torch cannot translate") as caught:
        to_onnx(Moody(), SAMPLE, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="cannot be written"):
        to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), SAMPLE, tmp_path / "no" / "model.onnx")


def test_pieces_with_thresholds_of_1_are_the_full_model_to_the_bit(
    made: tuple[EarlyExit, Path, tuple[tuple[str, str], ...]], tmp_path: Path
) -> None:
    _, path, exits = made
    bundle = export(path, tmp_path / "bundle", exits=exits)
    x = (3 + torch.randn(4, 3, 12, 12)).numpy()
    whole = session(path).run([OUTPUT, "exit_1", "exit_2"], {INPUT: x})
    places = list(dict.fromkeys([INPUT, *(leave.boundary for leave in bundle.exits), OUTPUT]))
    assert len(places) == 4
    live, history = {INPUT: x}, []
    for start, end in pairwise(places):
        piece = bundle.piece(start, end)
        runs = session(tmp_path / "bundle" / piece.file, tmp_path / "bundle")
        names = [output.name for output in runs.get_outputs()]
        out = dict(zip(names, runs.run(names, {tensor.name: live[tensor.name] for tensor in piece.inputs})))
        for leave in bundle.exits:
            if leave.boundary == end:
                history.append(out[leave.logits.name])
                assert not decide(bundle.rule, history, leave.temperature, leave.threshold).any()
        live = out
    np.testing.assert_array_equal(live[OUTPUT], whole[0])
    for mine, theirs in zip(history, whole[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
