"""The bundle: the folder in which a model that is cut in pieces travels to devices and clouds.

    bundle.json     this description; its `version` is the SHA-256 over everything else
    weights.data    the weights, once; every piece maps what it needs of them
    pieces/*.onnx   graphs of a few kilobytes that name parts of weights.data

The model is a line of boundaries, from its input to its output. A piece computes from one boundary to a later one and,
on its way, the exits in between; a device runs pieces up to an exit or a cut, a cloud the piece from the cut to the
output. Owns the format and its verification: nothing of a folder is used whose hash has not been checked. Must never
import onnx, onnxruntime or torch.
"""

import hashlib
from collections.abc import Mapping
from math import inf
from pathlib import Path, PurePosixPath

import msgspec

from fedge.core.errors import BadBundle
from fedge.core.limits import EdgeLimits
from fedge.edge.exits.rules import RULES

FORMAT = 1
INPUT = "input"  # the name of the first boundary
OUTPUT = "output"  # and of the last
LARGE_BYTES = 1 << 14  # answers from this size on, maps rather than logits, are packed: exact, and worth the time
DESCRIPTION = "bundle.json"
WEIGHTS = "weights.data"
MOST_BYTES = 1 << 40  # that a sample may be said to take; more would overflow in estimates of time


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tensor must look like. An extent of -1 is the batch: free, and what tensors are stacked along.

    -2 is any other free extent, as of a list of findings: never stacked, and not a count of samples.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Boundary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A place on the line: the tensors that cross it. `position` counts the operators before it."""

    name: str
    tensors: tuple[Tensor, ...]
    position: int


class Exit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An early answer: its logits are an output of every piece that passes `boundary`.

    `temperature` divides the logits before the softmax; `threshold` is the score from which it answers. On held-out
    data `share` of all samples left here; of these the exit got `accuracy` right, the whole model `final_accuracy`.
    """

    name: str
    boundary: str
    logits: Tensor
    temperature: float = 1.0
    threshold: float = 1.0
    share: float = 0.0
    accuracy: float = 0.0
    final_accuracy: float = 0.0


class Sent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What came of sending a boundary in one coding on held-out data: how many of all samples the tail then got right,
    and the mean bytes of one. None: not measured.
    """

    accuracy: float | None = None
    bytes: float | None = None


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph from one boundary to a later one. Outputs are the later boundary's tensors, then the exits' logits."""

    file: str
    start: str
    end: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    exits: tuple[str, ...] = ()


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cut model. `files` gives size and SHA-256 of everything in the folder but the description itself.

    `rule` says when an exit answers (see `fedge.edge.exits.rules`). `codings` says, for each boundary that may be sent,
    in which codings, and what became of held-out data. The planner chooses among them.
    """

    format: int
    version: str
    model: str
    boundaries: tuple[Boundary, ...]
    pieces: tuple[Piece, ...]
    files: dict[str, tuple[int, str]]
    exits: tuple[Exit, ...] = ()
    rule: str = "confidence"
    classes: tuple[str, ...] = ()
    codings: dict[str, dict[str, Sent]] = {}

    def boundary(self, name: str) -> Boundary:
        """The boundary of this name. Raises KeyError."""
        return {boundary.name: boundary for boundary in self.boundaries}[name]

    def piece(self, start: str, end: str) -> Piece:
        """The piece between two boundaries. Raises KeyError."""
        return {(piece.start, piece.end): piece for piece in self.pieces}[start, end]


def version_of(bundle: Bundle) -> str:
    """SHA-256 over the description without its version, hence over the hashes of all files."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(bundle, version=""), order="sorted")).hexdigest()


def write(folder: Path, bundle: Bundle) -> Bundle:
    """Hash the files that lie in `folder`, give the bundle its version and write its description."""
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DESCRIPTION)
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, digest(path)) for path in names}
    bundle = msgspec.structs.replace(bundle, files=files, version="")
    bundle = msgspec.structs.replace(bundle, version=version_of(bundle))
    (folder / DESCRIPTION).write_bytes(msgspec.json.format(msgspec.json.encode(bundle)))
    return bundle


def load(folder: Path, limits: EdgeLimits = EdgeLimits()) -> Bundle:
    """The verified bundle in `folder`.

    Raises BadBundle where a file is missing, too large, outside the folder, or not what its hash promises, where the
    folder holds anything else, and where the description contradicts itself.
    """
    path = folder / DESCRIPTION
    try:
        bundle = msgspec.json.decode(path.read_bytes(), type=Bundle)
    except (FileNotFoundError, NotADirectoryError):
        raise BadBundle(f"{str(folder)!r} holds no {DESCRIPTION}; make one with `fedge edge export`.") from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadBundle(f"{str(path)!r} is not the description of a bundle ({error}); export it again.") from None
    if bundle.format != FORMAT:
        raise BadBundle(f"The bundle is of format {bundle.format}, this fedge reads {FORMAT}; export it again.")
    if version_of(bundle) != bundle.version:
        raise BadBundle("The bundle's description does not have the hash it claims; export or copy it again.")
    _check_files(folder, bundle.files, limits)
    _check_line(bundle, limits)
    return bundle


def _check_files(folder: Path, files: Mapping[str, tuple[int, str]], limits: EdgeLimits) -> None:
    for name, (size, sha256) in files.items():
        if not _inside(name):
            raise BadBundle(f"The bundle names the file {name!r}, which may lie outside its folder; do not use it.")
        most = limits.max_model_bytes if name.endswith(".onnx") else limits.max_weights_bytes
        if size > most:
            raise BadBundle(f"{name!r} has {size} bytes, {most} are allowed; export the model in smaller parts.")
        path = folder / name
        if not path.is_file() or path.is_symlink() or path.stat().st_size != size or digest(path) != sha256:
            raise BadBundle(f"{name!r} of the bundle is missing or changed; copy the whole folder again.")
    for path in folder.rglob("*"):  # a piece may keep its weights in any file of the folder: none may be unknown
        known = path == folder / DESCRIPTION or path.relative_to(folder).as_posix() in files
        if path.is_symlink() or not (known or path.is_dir()):
            name = path.relative_to(folder).as_posix()
            raise BadBundle(f"{name!r} lies in the bundle's folder but is no part of it; move it elsewhere.")


def _check_line(bundle: Bundle, limits: EdgeLimits) -> None:
    """Boundaries stand in order, and pieces and exits name only what is there."""
    order = {boundary.name: index for index, boundary in enumerate(bundle.boundaries)}
    positions = [boundary.position for boundary in bundle.boundaries]
    ends = [boundary.name for boundary in bundle.boundaries[:1] + bundle.boundaries[-1:]]
    if len(order) != len(positions) or positions != sorted(positions) or ends != [INPUT, OUTPUT]:
        raise BadBundle("The boundaries of the bundle do not run from input to output; export it again.")
    if len(bundle.pieces) > limits.max_pieces:
        raise BadBundle(f"The bundle has {len(bundle.pieces)} pieces, {limits.max_pieces} are allowed.")
    if positions[0] < 0 or not all(boundary.tensors for boundary in bundle.boundaries):
        raise BadBundle("A boundary of the bundle has no tensors, or lies before the input; export it again.")
    exits = {leave.name for leave in bundle.exits}
    for piece in bundle.pieces:
        known = piece.start in order and piece.end in order and exits.issuperset(piece.exits)
        if not known or order[piece.start] >= order[piece.end] or piece.file not in bundle.files:
            raise BadBundle(f"The piece {piece.file!r} joins boundaries that are not there; export the bundle again.")
    if any(leave.boundary not in order for leave in bundle.exits) or not order.keys() >= bundle.codings.keys():
        raise BadBundle("An exit or a coding of the bundle names a boundary that is not there; export it again.")
    _check_pieces(bundle)
    _check_figures(bundle)


def _check_pieces(bundle: Bundle) -> None:
    """Every piece takes what crosses its start, and gives what crosses its end and the logits of its exits.

    A model that is fed more inputs on the way may give some of its outputs there as well.
    """
    exits = {leave.name: leave for leave in bundle.exits}
    sides = any(len(piece.inputs) > len(bundle.boundary(piece.start).tensors) for piece in bundle.pieces)
    for piece in bundle.pieces:
        end = set(bundle.boundary(piece.end).tensors)
        given = end.intersection(piece.outputs) if sides and piece.end == OUTPUT else end
        given |= {exits[name].logits for name in piece.exits}
        takes = set(piece.inputs).issuperset(bundle.boundary(piece.start).tensors)
        if not takes or not given or not given.issubset(piece.outputs):
            raise BadBundle(f"The piece {piece.file!r} does not join its boundaries' tensors; export the bundle again.")
        if piece.end != OUTPUT and {leave.name for leave in bundle.exits if leave.boundary == piece.end} - {
            *piece.exits
        }:
            raise BadBundle(f"The piece {piece.file!r} leaves out an exit at its end; export the bundle again.")


def _check_figures(bundle: Bundle) -> None:
    """What was calibrated and measured can be used, and exits can be told apart."""
    if len({leave.name for leave in bundle.exits}) < len(bundle.exits):
        raise BadBundle("Two exits of the bundle have the same name; export it again.")
    if bundle.rule not in RULES:
        raise BadBundle(f"The bundle's exit rule {bundle.rule!r} is unknown; use one of {', '.join(RULES)}.")
    for leave in bundle.exits:
        parts = (leave.threshold, leave.share, leave.accuracy, leave.final_accuracy)
        if not 0 < leave.temperature < inf or not all(0 <= part <= 1 for part in parts):
            raise BadBundle(f"The figures of the exit {leave.name!r} are impossible; calibrate the bundle again.")
    for sent in (sent for told in bundle.codings.values() for sent in told.values()):
        if not 0 <= (sent.accuracy or 0) <= 1 or not 0 <= (sent.bytes or 0) <= MOST_BYTES:
            raise BadBundle("The figures of a coding of the bundle are impossible; assess the bundle again.")


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
