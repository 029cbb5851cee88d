"""A model cut in two: the halves compute what the whole does, and files that do not belong together are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedge.core.errors import ExperimentError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.collab.exits import logits, save, untrained
from fedge.edge.llm.collab.halves import CLOUD, DESCRIPTION, EXITS, cut, open_halves
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.models.folder import NORM, open_folder
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.shard import Shard, digest
from tests.llm_fixture import folder
from tests.llm_ranks import Plain, difference
from tests.llm_reference import ffn, norm
from tests.llm_reference import logits as whole

IDS = np.random.default_rng(8).integers(3, 128, 20).tolist()
FILES = ["collab.json", "cloud/layers.safetensors", "edge/exits.safetensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("halves")
    cut(model, out, (1, 3), "float32", "float32")
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def through(shard: Shard, x: np.ndarray) -> np.ndarray:
    rank = Rank(shard, Plain(shard), Alone(), slots=1, context=32)
    return rank.forward(Step((Part(0, 0, len(x)),)), x)


def test_the_halves_one_after_the_other_are_the_model(model: Path, made: Path) -> None:
    halves = open_halves(made)
    segments, exits = halves.edge()
    cloud = halves.cloud()
    assert [one.layers for one in (*segments, cloud)] == [range(1), range(1, 3), range(3, 4)]
    assert halves.exits == exits.layers == (1, 3)
    x = segments[0].embed(IDS)
    for segment in segments:
        x = through(segment, x)
    with open_folder(model) as opened:
        assert halves.model == exits.model == opened.digest
        weight = opened.tensor("model.layers.3.post_attention_layernorm.weight")
        early = norm(x + ffn(opened, "model.layers.3.mlp.", norm(x, weight, exits.eps)), opened.tensor(NORM), exits.eps)
    blocks = Plain(segments[1])
    head = blocks.views[-1]["head"]
    assert difference(logits(exits.exits[1], x, head, exits.eps), head(early)) < 1e-5
    last = through(cloud, x)
    end = Plain(cloud).views[-1]
    assert difference(end["head"](norm(last, end["norm"], exits.eps)), whole(model, IDS)) < 1e-5
    assert not segments[0].about.head  # the vocabulary lies on the device once


def test_trained_exits_and_kinds_of_weights_are_kept(model: Path, tmp_path: Path) -> None:
    with open_folder(model) as opened:
        given = untrained(opened, (2,))
    given = replace(given, exits=(replace(given.exits[0], temperature=1.25, threshold=0.5),))
    halves = cut(model, tmp_path, given, "int8", "int4")
    (segment,), found = open_halves(tmp_path).edge()
    assert (found.exits[0].temperature, found.exits[0].threshold) == (1.25, 0.5)
    assert (segment.kind, halves.cloud().kind) == ("int8", "int4")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [*FILES, "edge/segment-0.safetensors"]
    )


def test_each_end_needs_only_its_own_files(copied: Path) -> None:
    halves = open_halves(copied)
    shutil.move(copied / "cloud", copied / "away")
    assert len(halves.edge()[0]) == 2
    with pytest.raises(ModelError, match="missing"):
        halves.cloud()
    shutil.move(copied / "away", copied / "cloud")
    shutil.rmtree(copied / "edge")
    assert halves.cloud().layers == range(3, 4)
    with pytest.raises(ModelError, match="missing"):
        halves.edge()


@pytest.mark.parametrize("name", ["edge/segment-0.safetensors", "edge/segment-1.safetensors", EXITS, CLOUD])
def test_a_changed_file_is_refused(copied: Path, name: str) -> None:
    raw = bytearray((copied / name).read_bytes())
    raw[-5] ^= 1
    (copied / name).write_bytes(raw)
    halves = open_halves(copied)
    with pytest.raises(ModelError, match="copy it again"):
        halves.cloud() if name == CLOUD else halves.edge()


def promise(path: Path, name: str, other: Path) -> None:
    """Put another file in place of one, and let the description name it."""

    shutil.copy(other, path / name)
    about = json.loads((path / DESCRIPTION).read_text())
    about["files"][name] = digest(path / name)
    (path / DESCRIPTION).write_text(json.dumps(about))


def test_parts_of_another_model_or_cut_are_refused(model: Path, copied: Path, tmp_path: Path) -> None:
    other = folder(tmp_path, layers=4, seed=1)
    with open_folder(other) as opened:
        theirs = untrained(opened, (1, 3))
    with pytest.raises(ModelError, match="another model"):
        cut(model, tmp_path / "out", theirs)
    cut(other, tmp_path / "theirs", theirs, "float32", "float32")
    cut(model, tmp_path / "shorter", (1, 2), "float32", "float32")
    for source, name in (("theirs", EXITS), ("shorter", EXITS), ("theirs", "edge/segment-0.safetensors")):
        spoilt = Path(shutil.copytree(copied, tmp_path / f"{source}-{name[5:10]}"))
        promise(spoilt, name, tmp_path / source / name)
        with pytest.raises(ModelError, match="of another model or"):
            open_halves(spoilt).edge()
    for source in ("theirs", "shorter"):
        promise(copied, CLOUD, tmp_path / source / CLOUD)
        with pytest.raises(ModelError, match="of another model or"):
            open_halves(copied).cloud()


def test_exits_or_a_head_that_do_not_fit_are_refused(model: Path, copied: Path, tmp_path: Path) -> None:
    with open_folder(folder(tmp_path, layers=4, hidden=32)) as opened:
        narrow = untrained(opened, (1, 3))
    halves = open_halves(copied)
    save(tmp_path / "narrow", replace(narrow, model=halves.model))
    promise(copied, EXITS, tmp_path / "narrow")
    with pytest.raises(ModelError, match="do not fit"):
        open_halves(copied).edge()
    with pytest.raises(ModelError, match="another model"):
        cut(model, tmp_path / "out", replace(narrow, model=halves.model))


DESCRIPTIONS: list[Callable[[str], str]] = [
    lambda text: text.replace('"format": 1', '"format": 2'),
    lambda text: text.replace('"exits": [1, 3]', '"exits": [3, 1]'),
    lambda text: text.replace('"exits": [1, 3]', '"exits": []'),
    lambda text: text.replace('"exits": [1, 3]', '"exits": [0, 3]'),
    lambda text: text.replace('"exits": [1, 3]', f'"exits": [1, {1 << 40}]'),
    lambda text: text.replace('"exits"', '"other"'),
    lambda text: text[:-3],
    lambda _: "[" * 100_000,
    lambda _: "",
]


@pytest.mark.parametrize("change", DESCRIPTIONS)
def test_a_description_that_cannot_be_is_refused(copied: Path, change: Callable[[str], str]) -> None:
    path = copied / DESCRIPTION
    text = json.dumps(json.loads(path.read_text()))
    path.write_text(change(text))
    assert path.read_text() != text
    with pytest.raises(ModelError) as caught:
        open_halves(copied)
    assert "\n" not in str(caught.value)


def test_a_description_that_is_missing_long_or_binary_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="above 10 bytes"):
        open_halves(copied, LlmLimits(max_config_bytes=10))
    (copied / DESCRIPTION).write_bytes(b"\xff\xfe\x00")
    for path in (copied, tmp_path):
        with pytest.raises(ModelError):
            open_halves(path)


def test_names_do_not_lead_out_of_the_folder(copied: Path) -> None:
    """The description says what the files are, not where they lie."""
    path = copied / DESCRIPTION
    about = json.loads(path.read_text())
    about["files"] = {f"../../{name}": said for name, said in about["files"].items()}
    path.write_text(json.dumps(about))
    with pytest.raises(ModelError, match="not the file"):
        open_halves(copied).cloud()


def test_exits_where_none_can_stand_are_refused(model: Path, tmp_path: Path) -> None:
    for layers in ((), (0, 1), (1, 4), (2, 2)):
        with pytest.raises(ExperimentError, match="rising"):
            cut(model, tmp_path / "out", layers)
    assert not (tmp_path / "out" / DESCRIPTION).exists()
    (tmp_path / "plain").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        cut(model, tmp_path / "plain", (1,))


def test_a_new_cut_replaces_the_old_one(model: Path, copied: Path) -> None:
    cut(model, copied, (2,), "int8", "int8")
    halves = open_halves(copied)
    assert (halves.exits, halves.cloud().layers, len(halves.edge()[0])) == ((2,), range(2, 4), 1)
