"""A piece of a bundle, ready to run on onnxruntime.

onnxruntime copies and re-packs weights when it loads a model. Here that work is done once, into files (see
`fedge.edge.runtime.cache`); from then on a session maps those files and copies nothing, so that the weights are pages
the system may drop and fetch again, and loading takes milliseconds. Owns how sessions are made, and what goes into and
comes out of them. Must never run on bytes that were not verified, nor import onnx.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fedge.core.errors import BadBundle, ModelError, RefusedTensor
from fedge.core.params import Array
from fedge.edge.bundle import WEIGHTS, Bundle, Piece, Tensor, digest
from fedge.edge.runtime import cache as caches
from fedge.edge.runtime.tensors import check

SILENT = 4  # what onnxruntime has to say comes as an exception
_NAMES = {"float": "float32", "double": "float64"}  # of types, where onnxruntime's differ from NumPy's


class Runner:
    """One piece. Threads may share it. `optimised` says whether it runs out of mapped files."""

    def __init__(self, piece: Piece, session: Any, optimised: bool) -> None:
        self.piece, self.optimised = piece, optimised
        self._session = session

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The piece's outputs by name: the tensors of its end, then the logits of the exits it passes.

        Raises RefusedTensor where the inputs are not those of the piece, before anything is computed, or where
        onnxruntime cannot compute with them; ModelError after `close`.
        """
        check(self.piece.inputs, inputs)
        session = self._session  # another thread may close meanwhile; this run ends as it began
        if session is None:
            raise ModelError("The piece has been closed; open it again.")
        names = [tensor.name for tensor in self.piece.outputs]
        feeds = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in inputs.items()}
        try:
            return dict(zip(names, session.run(names, feeds)))
        except caches.FAILURES as error:
            where = f"{self.piece.start!r} to {self.piece.end!r}"
            raise RefusedTensor(f"The piece from {where} cannot compute with these inputs ({_line(error)}).") from None

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        self._session = None


def open_piece(
    folder: Path,
    bundle: Bundle,
    start: str,
    end: str,
    *,
    threads: int = 1,
    cache: Path | None = None,
    packed: bool = False,
) -> Runner:
    """The piece between two boundaries of the verified bundle in `folder`.

    The first time on a machine the piece is optimised, which takes as long as an ordinary load and as much memory, and
    the result is kept in `cache` (by default the user's, see `fedge.edge.runtime.cache`). Where that cannot be written
    the piece runs all the same, with more memory. `packed` gives every large matrix a private copy in the order in
    which the kernels read it: for a cloud, as products with matrices are then up to twice as fast in batches; for
    convolutions it makes no difference. Raises BadBundle where there is no such piece, or it is not the
    graph that the bundle describes.
    """
    try:
        piece = bundle.piece(start, end)
    except KeyError:
        known = ", ".join(f"{one.start}..{one.end}" for one in bundle.pieces)
        raise BadBundle(f"The bundle has no piece from {start!r} to {end!r}; it has {known}.") from None
    graph = graph_of(folder, bundle, piece.file)
    kept = prepared(folder, bundle, piece, graph, cache)
    mapped = _mapped(kept, options(threads, packed)) if kept else None
    session = mapped or _plain(folder, piece, graph, options(threads, packed))
    _check_signature(piece, session)
    return Runner(piece, session, optimised=mapped is not None)


def prepared(folder: Path, bundle: Bundle, piece: Piece, graph: bytes, cache: Path | None) -> Path | None:
    """The folder with the optimised piece, which is made where it is missing; None where it cannot be kept."""
    make = partial(_optimise, folder, bundle, graph)
    return caches.entry(cache or caches.default(), caches.key(bundle, piece), make)


def options(threads: int, packed: bool = False) -> Any:
    """What all sessions have in common."""
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads, chosen.inter_op_num_threads = threads, 1
    chosen.log_severity_level = SILENT
    # Otherwise weights stay where they are mapped, and kernels put them in order as they go.
    chosen.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def graph_of(folder: Path, bundle: Bundle, name: str) -> bytes:
    """A graph of the bundle. Raises BadBundle where it is not what was verified."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise BadBundle(f"{name!r} of the bundle cannot be read ({error}); copy the whole folder again.") from None
    if hashlib.sha256(data).hexdigest() != bundle.files[name][1]:
        raise BadBundle(f"{name!r} has changed since the bundle was verified; copy the whole folder again.")
    return data


def _optimise(folder: Path, bundle: Bundle, graph: bytes, fresh: Path) -> None:
    """Fill `fresh`. All optimisations, among them those for this very processor."""
    if WEIGHTS in bundle.files and digest(folder / WEIGHTS) != bundle.files[WEIGHTS][1]:
        # They would be kept as what they are not.
        raise BadBundle(f"{WEIGHTS!r} has changed since the bundle was verified; copy the whole folder again.")
    chosen = options(threads=1)
    chosen.optimized_model_filepath = str(fresh / caches.GRAPH)
    chosen.add_session_config_entry("session.optimized_model_external_initializers_file_name", caches.DATA)
    _load(folder, graph, chosen)


def _plain(folder: Path, piece: Piece, graph: bytes, chosen: Any) -> Any:
    """A session on the piece as it came."""
    try:
        return _load(folder, graph, chosen)
    except caches.FAILURES as error:
        raise BadBundle(f"onnxruntime cannot use {piece.file!r} ({_line(error)}); export the bundle again.") from None


def _load(folder: Path, graph: bytes, chosen: Any) -> Any:
    """From bytes, because the weights lie above the folder of the pieces, where onnxruntime does not look."""
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    return onnxruntime.InferenceSession(graph, chosen, providers=["CPUExecutionProvider"])


def _mapped(kept: Path, chosen: Any) -> Any:
    """A session on an optimised piece, or None where onnxruntime refuses it after all."""
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(kept / caches.GRAPH), chosen, providers=["CPUExecutionProvider"])
    except caches.FAILURES as error:
        caches.log.warning("the optimised piece in %s cannot be used (%s); it runs as it came", kept, _line(error))
        return None
    caches.hold(kept, session)
    return session


def _check_signature(piece: Piece, session: Any) -> None:
    """The graph takes and gives what the description says, as far as the graph says it."""
    for tensors, found in ((piece.inputs, session.get_inputs()), (piece.outputs, session.get_outputs())):
        told = {one.name: one for one in found}
        if told.keys() != {tensor.name for tensor in tensors} or not all(
            _agrees(one, told[one.name]) for one in tensors
        ):
            raise BadBundle(f"{piece.file!r} is not the graph that the bundle describes; export the bundle again.")


def _agrees(tensor: Tensor, told: Any) -> bool:
    name = told.type.removeprefix("tensor(").removesuffix(")")
    pairs = zip(told.shape, tensor.shape)
    fixed = all(want < 0 or want == extent for extent, want in pairs if isinstance(extent, int) and extent >= 0)
    return _NAMES.get(name, name) == tensor.dtype and fixed


def _line(error: Exception) -> str:
    """What onnxruntime says, in one line."""
    return " ".join(str(error).split())[:300]
