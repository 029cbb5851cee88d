"""A model cut in two, for a device and a cloud: a folder with segments and exits for the one, the rest for the other.

    collab.json                     this description
    edge/segment-0.safetensors      layers up to the first exit, then up to the next; the last one has the head too
    edge/exits.safetensors
    cloud/layers.safetensors        all other layers, with final norm and head

Each end needs the description and its own folder only. Owns the description, and the check that files are the ones it
names and belong together. Must never compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from fedge.core.errors import ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.files import replacing
from fedge.edge.llm.collab import exits as exit_files
from fedge.edge.llm.collab.exits import Exits
from fedge.edge.llm.models.folder import Folder, open_folder
from fedge.edge.llm.shards import shard as shards
from fedge.edge.llm.shards.export import Progress, export
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shard import Shard, open_shard
from fedge.edge.llm.shards.shares import even

FORMAT = 1
DESCRIPTION = "collab.json"
EXITS, CLOUD = "edge/exits.safetensors", "cloud/layers.safetensors"
_AGAIN = "cut the model again"


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """collab.json. `files` gives the SHA-256 of each file; what there is follows from `exits`, the exits' layers."""

    model: str
    exits: tuple[int, ...]
    files: dict[str, str]
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Halves:
    """A folder of halves. `exits` are layers, and `model` is the digest of the folder that was cut."""

    path: Path
    model: str
    exits: tuple[int, ...]
    files: dict[str, str]

    def edge(self, limits: LlmLimits = LlmLimits()) -> tuple[tuple[Shard, ...], Exits]:
        """The device's segments in order, and its exits, verified. Raises ModelError."""
        spans = list(pairwise((0, *self.exits)))
        segments = tuple(self._shard(_segment(at), span, limits) for at, span in enumerate(spans))
        last = segments[-1]
        found = exit_files.load(self._verified(EXITS), limits)
        hidden = {one.norm.shape for one in found.exits}
        if (found.model, found.layers, found.eps) != (self.model, self.exits, last.config.eps):
            raise ModelError(f"{self.path / EXITS} holds exits of another model or other layers; {_AGAIN}.")
        if hidden != {(last.config.hidden,)} or not last.about.head:
            raise ModelError(f"{self.path} has exits that do not fit its segments, or no head for them; {_AGAIN}.")
        return segments, found

    def cloud(self, limits: LlmLimits = LlmLimits()) -> Shard:
        """The cloud's layers, verified. Raises ModelError."""
        return self._shard(CLOUD, (self.exits[-1], None), limits)

    def _shard(self, name: str, span: tuple[int, int | None], limits: LlmLimits) -> Shard:
        found = open_shard(self._verified(name), limits)
        stop = found.config.layers if span[1] is None else span[1]
        if (found.model, found.about.layers, found.ranks) != (self.model, (span[0], stop), 1):
            raise ModelError(f"{self.path / name} is of another model or has other layers; {_AGAIN}.")
        return found

    def _verified(self, name: str) -> Path:
        path = self.path / name
        if shards.digest(path) != self.files.get(name):
            raise ModelError(f"{path} is not the file that {DESCRIPTION} names; copy it again, or {_AGAIN}.")
        return path


def cut(
    folder: Path,
    out: Path,
    exits: Exits | Sequence[int],
    edge_kind: Kind = "int8",
    cloud_kind: Kind = "int8",
    *,
    progress: Progress | None = None,
) -> Halves:
    """Write both halves of the model in `folder` to `out`, in place of what these names held there.

    `exits` are trained ones, or layers, for exits that are not and never answer. `progress` is told bytes done and
    bytes in all, of one file after another. Raises ExperimentError for layers where no exit can stand, ModelError.
    """
    with open_folder(folder) as opened:
        found = exits if isinstance(exits, Exits) else exit_files.untrained(opened, tuple(exits))
        exit_files.check_layers(opened.config, found.layers)
        hidden = {one.norm.shape for one in found.exits}
        if found.model != opened.digest or hidden != {(opened.config.hidden,)}:
            raise ModelError(f"The exits are those of another model than {folder}; train exits for this one.")
        for at, span in enumerate(pairwise((0, *found.layers))):
            _export(opened, out / _segment(at), span, edge_kind, span[1] == found.layers[-1], progress)
        exit_files.save(out / EXITS, found)
        _export(opened, out / CLOUD, (found.layers[-1], opened.config.layers), cloud_kind, True, progress)
    names = [*(_segment(at) for at in range(len(found.layers))), EXITS, CLOUD]
    files = {name: shards.digest(out / name) for name in names}
    description = _Description(found.model, found.layers, files)
    with replacing(out / DESCRIPTION) as file:  # last: till then the old one names none of the new files
        file.write(msgspec.json.format(msgspec.json.encode(description)))
    return Halves(out, found.model, found.layers, files)


def open_halves(path: Path, limits: LlmLimits = LlmLimits()) -> Halves:
    """The description in `path`; files are verified when they are asked for. Raises ModelError."""
    file = path / DESCRIPTION
    try:
        if not file.is_file() or file.stat().st_size > limits.max_config_bytes:
            raise ModelError(f"{file} is missing, or above {limits.max_config_bytes} bytes; {_AGAIN}.")
        found = msgspec.json.decode(file.read_bytes(), type=_Description)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file} cannot be used ({error!s:.200}); {_AGAIN}.") from error
    layers = found.exits
    rising = all(low < high for low, high in pairwise((0, *layers)))
    if found.format != FORMAT or not layers or not rising or layers[-1] >= limits.max_layers:
        raise ModelError(f"{file} is of format {found.format}, not {FORMAT}, or its exits do not rise; {_AGAIN}.")
    return Halves(path, found.model, layers, found.files)


def _segment(number: int) -> str:
    return f"edge/segment-{number}.safetensors"


def _export(
    folder: Folder, path: Path, layers: tuple[int, int], kind: Kind, with_head: bool, progress: Progress | None
) -> None:
    """One shard, under a name of ours. Raises ModelError."""
    shares = even(folder.config, 1)
    (written,) = export(folder, path.parent, shares, kind, layers=layers, with_head=with_head, progress=progress)
    try:
        written.replace(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written ({error}); name another folder.") from error
