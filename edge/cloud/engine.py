"""The tails of one bundle in onnxruntime: a batch of requests in, one outcome for each of them out.

A batched answer need not equal the single one to the last bit: onnxruntime's kernels add up in another order for
another batch extent. It is equal within float32 rounding, and the same batch always gives the same bits. An axis
that the bundle calls the batch has rows that do not see each other. Must never know who asked, or wait.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedge.core.errors import FedgeError, ModelError, OurFault, RefusedTensor
from fedge.core.limits import EdgeLimits
from fedge.core.params import Array
from fedge.edge.bundle import LARGE_BYTES, OUTPUT, Bundle, Piece, Tensor
from fedge.edge.cloud.wire import Request
from fedge.edge.coding.codings import Coded, decode, encode
from fedge.edge.runtime.sessions import Runner, open_piece

Outcome = tuple[Coded, ...] | FedgeError
_log = logging.getLogger("fedge")


class Engine:
    """All tails of the bundle in `folder`, opened; raises BadBundle. `compute` may run in several threads."""

    def __init__(self, folder: Path, bundle: Bundle, limits: EdgeLimits, threads: int = 1) -> None:
        self._limits = limits
        self._outputs = bundle.boundary(OUTPUT).tensors
        self._runners: dict[str, Runner] = {
            piece.start: open_piece(folder, bundle, piece.start, OUTPUT, threads=threads, packed=True)
            for piece in bundle.pieces
            if piece.end == OUTPUT
        }

    @property
    def runners(self) -> Collection[Runner]:
        """All tails."""
        return self._runners.values()

    def compute(self, batch: Sequence[Request]) -> list[Outcome]:
        """The outcome of each request of a batch, in order; all are for the same piece. Never raises."""
        outcomes: dict[int, Outcome] = {}
        inputs: dict[int, tuple[Array, ...]] = {}
        for index, request in enumerate(batch):
            decoded = self._decode(request)
            if isinstance(decoded, FedgeError):
                outcomes[index] = decoded
            else:
                inputs[index] = decoded
        if inputs:
            outcomes |= zip(inputs, self._run(batch[0].piece, list(inputs.values())))
        return [outcomes[index] for index in range(len(batch))]

    def close(self) -> None:
        """Let the models go."""
        for runner in self._runners.values():
            runner.close()

    def _decode(self, request: Request) -> tuple[Array, ...] | FedgeError:
        try:
            return tuple(
                decode(coded, tensor, self._limits) for coded, tensor in zip(request.tensors, request.piece.inputs)
            )
        except Exception as error:
            return _fault(error)

    def _run(self, piece: Piece, samples: Sequence[tuple[Array, ...]]) -> list[Outcome]:
        """Outputs of each sample; where a batch fails, each is tried alone so that one cannot fail the others."""
        names = [tensor.name for tensor in piece.inputs]
        try:
            stacked = [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*samples)]
            outputs = self._runners[piece.start].run(dict(zip(names, stacked)))
            rows = [sample[0].shape[0] for sample in samples] if len(samples) > 1 else []
            return [self._sendable(share) for share in _shares(self._outputs, outputs, rows)]
        except Exception as error:
            if len(samples) == 1:
                return [_fault(error)]
            return [outcome for sample in samples for outcome in self._run(piece, [sample])]

    def _sendable(self, outputs: tuple[Coded, ...]) -> Outcome:
        """The outputs, unless no message holds them: one that is too large takes the whole stream with it."""
        size, most = sum(coded.size_bytes for coded in outputs), self._limits.max_tensor_bytes
        if size <= most:
            return outputs
        return RefusedTensor(f"The answer has {size} bytes, at most {most} are sent; ask for fewer samples at a time.")


def _shares(tensors: Sequence[Tensor], outputs: Mapping[str, Array], rows: Sequence[int]) -> list[tuple[Coded, ...]]:
    """What of the outputs, coded, belongs to each sample of so many rows; all to one where no rows are given."""
    columns = []
    for tensor in tensors:
        whole = outputs[tensor.name]
        if rows and whole.shape[0] != sum(rows):
            raise ModelError(f"{tensor.name!r} has {whole.shape[0]} rows for a batch of {sum(rows)}; export it again.")
        parts = np.split(whole, np.cumsum(rows)[:-1]) if rows else [whole]
        coding = "raw" if whole.nbytes < LARGE_BYTES * len(parts) else "raw+zstd"
        columns.append([encode(tensor.name, part, coding) for part in parts])
    return list(zip(*columns))


def _fault(error: Exception) -> FedgeError:
    """What the device is told; a fault of ours is written down here, and it learns no more than that."""
    if isinstance(error, FedgeError):
        return error
    _log.error("a tail failed", exc_info=error)
    return OurFault("The cloud failed on this request; its log says why.")
