"""A torch module, with exits or without, as one ONNX file.

Outputs are `output` and, of an EarlyExit, `exit_1`, `exit_2`, ... in order. Owns the names, and that the file holds the
model as it is: batch norm stays a layer of its own, and nothing tells of the machine it was made on. Must never cut
(`fedge.edge.split.export` does).
"""

import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

from fedge.core.errors import ModelError
from fedge.edge.bundle import INPUT, OUTPUT
from fedge.edge.exits.train import EarlyExit


def to_onnx(model: nn.Module, sample: torch.Tensor, path: Path) -> tuple[tuple[str, str], ...]:
    """Write the model, in evaluation mode, for batches of any size of inputs like `sample` [n, ...].

    Returns name and output of every exit, as `fedge.edge.split.export` takes them. The module's modes (training or
    not) are as before afterwards. Raises ModelError where torch cannot translate the model or the file not be written.
    """
    exits = [f"exit_{number + 1}" for number in range(len(model.exits))] if isinstance(model, EarlyExit) else []
    modes = [(module, module.training) for module in model.modules()]
    try:
        graph = _translated(model.eval(), sample, [*exits, OUTPUT])
        graph.graph.output.sort(key=lambda output: output.name != OUTPUT)  # the one of every model comes first
        _strip(graph.graph)
        del graph.metadata_props[:]
        graph.doc_string = graph.producer_version = ""
        path.write_bytes(graph.SerializeToString())
    except OSError as error:
        raise ModelError(f"The model cannot be written to {path} ({error}); name another file.") from error
    finally:
        for module, training in modes:
            module.training = training
    return tuple((name, name) for name in exits)


def _translated(model: nn.Module, sample: torch.Tensor, outputs: list[str]) -> onnx.ModelProto:
    """The model as torch's exporter writes it, unoptimised: its optimiser folds batch norm into convolutions."""
    # A batch of one or two would be taken for a constant.
    batch = sample[:1].expand(3, *sample.shape[1:]).contiguous()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                model,
                (batch,),
                file,
                input_names=[INPUT],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                optimize=False,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"torch cannot translate the model to ONNX ({reason[0]}); use operators its exporter knows."
            ) from error
        return onnx.load(file)


def _strip(graph: onnx.GraphProto) -> None:
    """Take out what nobody needs to compute: where in which file a node came from, and how it was spoken of."""
    graph.doc_string = ""
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)
