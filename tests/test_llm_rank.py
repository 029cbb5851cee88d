"""A group of ranks computes what the model in plain NumPy does, however it is shared and however the tokens come."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedge.core.errors import DataError, ExperimentError, ModelError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.compute.kernels import KERNELS
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.compute.window import Window, pinned
from fedge.edge.llm.mesh.mesh import Alone, Mesh
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.ranks.head import Head
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Copy, Part, Step
from fedge.edge.llm.ranks.worker import serve_steps
from fedge.edge.llm.shards.shard import Shard, export, open_shard
from fedge.edge.llm.shards.shares import Share, even
from tests.llm_fixture import folder
from tests.llm_group import group as sockets
from tests.llm_ranks import Plain, Room, ThreadMesh, chunks, difference, group
from tests.llm_reference import dequantise, logits

IDS = np.random.default_rng(5).integers(0, 128, 24).tolist()
WHOLE = (Share((0, 2), (0, 96)),)
HALVES = (Share((0, 1), (0, 64)), Share((1, 2), (64, 96)))
LOPSIDED = (Share((0, 0), (0, 32)), Share((0, 2), (32, 32)), Share((2, 2), (32, 96)))  # nobody holds both


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path)


@pytest.mark.parametrize("shares", [WHOLE, HALVES, LOPSIDED], ids=["alone", "halves", "lopsided"])
@pytest.mark.parametrize("sizes", [[24], [7, 1, 9, 1, 6], [20, 1, 1, 1, 1]], ids=["one", "several", "decode"])
def test_a_group_computes_the_model(model: Path, tmp_path: Path, shares: tuple[Share, ...], sizes: list[int]) -> None:
    with group(model, tmp_path, shares) as (lead, _):
        assert difference(chunks(lead, IDS, sizes), logits(model, IDS)) < 1e-5


OTHERS: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},  # each counts once, even where rank 0 has no heads
    "norms of heads": {"family": "qwen3", "head_dim": 32},
    "a window": {"family": "mistral", "sliding_window": 5, "tied": True},
}


@pytest.mark.parametrize("shares", [WHOLE, LOPSIDED], ids=["alone", "lopsided"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_computed_too(tmp_path: Path, name: str, shares: tuple[Share, ...]) -> None:
    model = folder(tmp_path, **OTHERS[name])
    with group(model, tmp_path, shares) as (lead, _):
        assert difference(chunks(lead, IDS, [20, 3, 1]), logits(model, IDS)) < 1e-5


def test_all_ranks_have_the_same_bits_after_every_step(model: Path, tmp_path: Path) -> None:
    shares = (Share((0, 1), (0, 32)), Share((1, 1), (32, 64)), Share((1, 2), (64, 96)))
    with group(model, tmp_path, shares) as (lead, others):
        chunks(lead, IDS, [10, 4, *[1] * 10])
    first, second = ([one.tobytes() for one in rank.passes] for rank in others)
    assert first == second
    assert len(first) == 12


def test_sequences_of_one_step_are_as_if_each_were_alone(model: Path, tmp_path: Path) -> None:
    texts = [IDS[:9], IDS[9:20], IDS[20:]]
    with group(model, tmp_path, HALVES) as (lead, _):
        first = Step((Part(2, 0, 8), Part(0, 0, 5), Part(3, 0, 3)))
        lead.run(first, np.array(texts[0][:8] + texts[1][:5] + texts[2][:3]))
        second = Step((Part(0, 5, 6), Part(3, 3, 1), Part(2, 8, 1)))
        got = lead.run(second, np.array(texts[1][5:] + texts[2][3:] + texts[0][8:]))
    wanted = np.stack([logits(model, texts[at])[-1] for at in (1, 2, 0)])
    assert difference(got, wanted) < 1e-5


def test_with_an_invariant_kernel_company_changes_no_bit(tmp_path: Path) -> None:
    path = folder(tmp_path, hidden=128, heads=8, ffn=160)
    with open_folder(path) as opened:
        shard = open_shard(export(opened, tmp_path, even(opened.config, 1), "float32")[0])
    lead = Model(shard, Resident(shard, KERNELS["numpy-rows-float32"]), Alone(), slots=9, context=32)
    for slot in range(9):
        chunks(lead, IDS[slot : slot + 12], [12], slot)
    for start in range(12, 15):
        parts = tuple(Part(slot, start, 1) for slot in (3, 0, 8, 1, 7))
        tokens = np.array(IDS[start : start + 5])
        together = lead.run(Step(parts), tokens)
        alone = [lead.run(Step((part,)), tokens[at : at + 1])[0] for at, part in enumerate(parts)]
        assert np.array_equal(together, np.stack(alone))
    lead.close()


def test_a_slot_goes_back_and_a_prefix_is_shared(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path, HALVES) as (lead, _):
        chunks(lead, IDS[:12], [12], slot=1)
        lead.run(Step((Part(1, 12, 4),)), np.array([1, 2, 3, 4]))  # guesses that turn out wrong
        step = Step((Part(1, 12, 12), Part(0, 8, 3)), (Copy(1, 0, 8),))
        got = lead.run(step, np.array([*IDS[12:], 7, 8, 9]))
    wanted = np.stack([logits(model, IDS)[-1], logits(model, [*IDS[:8], 7, 8, 9])[-1]])
    assert difference(got, wanted) < 1e-5


def test_rows_are_those_asked_for(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path, WHOLE) as (lead, _):
        step = Step((Part(0, 0, 4), Part(1, 0, 3)))
        assert lead.run(step, np.array(IDS[:7]), np.array([], np.int64)).shape == (0, 128)
        every = lead.run(step, np.array(IDS[:7]), np.arange(7))
        for rows in ([1, 5], [6, 0, 0]):
            got = lead.run(step, np.array(IDS[:7]), np.array(rows))
            np.testing.assert_allclose(got, every[rows], rtol=0, atol=1e-5)
        np.testing.assert_allclose(lead.run(step, np.array(IDS[:7])), every[[3, 6]], rtol=0, atol=1e-5)
        assert lead.run(Step((), free=(0, 1)), np.array([], np.int64)).shape == (0, 128)


class Dequantised:
    """The folder that shards amount to: the ranks' pieces of every matrix, put together again."""

    def __init__(self, shards: list[Shard]) -> None:
        self.config, self.embed = shards[0].config, shards[0].embed
        self._tensors: dict[str, Any] = {}
        pieces: dict[str, list[Any]] = {}
        for shard in shards:
            kv, half = (last - first for first, last in (shard.share.kv_heads, shard.share.ffn))
            width = kv * self.config.head_dim
            cuts = {"qkv": [width * self.config.group, width * (self.config.group + 1)], "gate_up": [half]}
            for block in shard.blocks:
                views: Any = shard.view(block, shard.mapped[block.offset : block.offset + block.bytes])
                self._tensors[f"{block.layer} {block.part}"] = views.pop("norm")
                for name, matrix in views.items():
                    rows = np.split(dequantise(matrix), cuts.get(name, []))
                    for at, weight in enumerate(rows):
                        pieces.setdefault(f"{block.layer} {name} {at}", []).append(weight)
        for name, parts in pieces.items():
            self._tensors[name] = np.concatenate(parts, axis=int(name.split()[1] in ("o", "down")))

    def tensor(self, name: str) -> Any:
        _, *words = name.removesuffix(".weight").split(".")
        if len(words) < 3:  # model.norm and lm_head
            return self._tensors[f"{self.config.layers} head" if words else f"{self.config.layers} head 0"]
        names = {"input_layernorm": "attn", "post_attention_layernorm": "ffn", "o_proj": "o 0", "down_proj": "down 0"}
        names |= {
            "q_proj": "qkv 0",
            "k_proj": "qkv 1",
            "v_proj": "qkv 2",
            "gate_proj": "gate_up 0",
            "up_proj": "gate_up 1",
        }
        return self._tensors[f"{words[1]} {names[words[-1]]}"]


@pytest.mark.parametrize("shares", [WHOLE, HALVES, LOPSIDED], ids=["alone", "halves", "lopsided"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_group_computes_the_dequantised_model(
    model: Path, tmp_path: Path, kind: Any, shares: tuple[Share, ...]
) -> None:
    with group(model, tmp_path, shares, kind) as (lead, _):
        got = chunks(lead, IDS, [20, 1, 1, 1, 1])
    shards = [open_shard(path) for path in sorted(tmp_path.glob("rank-*.safetensors"))]
    assert len(shards) == len(shares)
    assert difference(got, logits(Dequantised(shards), IDS)) < 1e-5  # type: ignore[arg-type]
    assert 1e-3 < difference(got, logits(model, IDS)) < {"int8": 0.05, "int4": 0.5}[kind]


def test_half_of_the_layers_go_on_where_the_other_half_ended(model: Path, tmp_path: Path) -> None:
    x = []
    with open_folder(model) as opened:
        for layers in ((0, 1), (1, 2), None):
            (path,) = export(opened, tmp_path, WHOLE, "float32", layers=layers)
            shard = open_shard(path)
            before = shard.embed(IDS) if layers != (1, 2) else x[-1]
            rank = Rank(shard, Plain(shard), ThreadMesh(Room(1), 0), slots=1, context=32)
            x.append(rank.forward(Step((Part(0, 0, 24),)), before))
            if layers == (0, 1):
                with pytest.raises(ModelError, match="no vocabulary matrix"):
                    Head(shard, Plain(shard))
    assert np.array_equal(x[1], x[2])


def test_ranks_over_sockets_with_weights_that_stream_compute_the_model(model: Path, tmp_path: Path) -> None:
    with open_folder(model) as opened:
        shards = [open_shard(path) for path in export(opened, tmp_path, LOPSIDED, "float32")]

    def work(mesh: Mesh) -> Any:
        shard = shards[mesh.rank]
        size = max(block.bytes for block in shard.blocks)
        assert len(pinned([block.bytes for block in shard.blocks], 2 * size)) < len(shard.blocks)
        window = Window(shard, KERNELS["numpy-float32"], 2 * size)
        if mesh.rank:
            rank = Rank(shard, window, mesh, slots=1, context=32)
            done = serve_steps(rank, mesh)
            rank.close()
            return done
        lead = Model(shard, window, mesh, slots=1, context=32)
        found = chunks(lead, IDS, [19, 1, 1, 2, 1])
        lead.close()
        return found

    found = sockets(3, work)
    assert found[1:] == [5, 5]
    assert difference(found[0], logits(model, IDS)) < 1e-5


def _refusing(model: Path, out: Path) -> Rank:
    with open_folder(model) as opened:
        shard = open_shard(export(opened, out, WHOLE, "float32", layers=(0, 1))[0])  # without a head
    limits = LlmLimits(max_step_tokens=16)
    rank = Rank(shard, Plain(shard), ThreadMesh(Room(1), 0), slots=2, context=20, limits=limits)
    rank.forward(Step((Part(0, 0, 4),)), np.ones((4, 64), np.float32))
    return rank


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (Step((Part(2, 0, 1),)), (1, 64)),
        (Step((Part(0, 4, 17),)), (17, 64)),
        (Step((Part(1, 0, 17),)), (17, 64)),
        (Step((Part(0, 5, 1),)), (1, 64)),
        (Step((Part(0, 4, 16),), free=(0,)), (16, 64)),
        (Step((Part(0, 4, 1),)), (2, 64)),
        (Step((Part(0, 4, 1),)), (1, 65)),
        (Step((Part(0, 0, 0),)), (0, 64)),
        (Step((), free=(2,)), (0, 64)),
        (Step((Part(1, 5, 1),), (Copy(0, 1, 5),)), (1, 64)),
        (Step((), (Copy(0, 2, 1),)), (0, 64)),
        (Step((), (Copy(-1, 1, 0),)), (0, 64)),
    ],
)
def test_a_worker_refuses_a_step_that_cannot_be(
    model: Path, tmp_path: Path, step: Step, shape: tuple[int, int]
) -> None:
    rank = _refusing(model, tmp_path)
    held = rank.cache.entries[0][0].copy()
    steps = SimpleNamespace(receive_step=lambda: (step, np.ones(shape, np.float32)))
    with pytest.raises(RankLost):
        serve_steps(rank, steps)
    with pytest.raises(RankLost):
        rank.forward(Step((Part(0, 4, 1),)), np.ones((1, 64)))  # float64
    assert rank.cache.lengths == [4, 0]
    assert np.array_equal(rank.cache.entries[0][0], held)


def test_after_a_pass_that_broke_off_the_next_one_is_right(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path, WHOLE) as (lead, _):
        chunks(lead, IDS[:20], [20])
        mesh, lead._rank._mesh = lead._rank._mesh, SimpleNamespace(allreduce=lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lead.run(Step((Part(0, 20, 4),)), np.array(IDS[20:]))
        lead._rank._mesh = mesh
        got = lead.run(Step((Part(0, 20, 4),)), np.array(IDS[20:]))
    assert difference(got[0], logits(model, IDS)[-1]) < 1e-5


def test_a_worker_ends_when_rank_0_does(model: Path, tmp_path: Path) -> None:
    rank = _refusing(model, tmp_path)
    x = np.ones((1, 64), np.float32)
    steps = iter([(Step((Part(0, 4, 1),)), x), (Step((Part(1, 0, 1),)), x), None])
    assert serve_steps(rank, SimpleNamespace(receive_step=lambda: next(steps))) == 2
    rank.close()
    with pytest.raises(RankLost):
        rank.forward(Step((Part(0, 0, 1),)), x)


def test_a_token_outside_the_vocabulary_or_a_group_without_room_is_refused(model: Path, tmp_path: Path) -> None:
    with group(model, tmp_path, WHOLE) as (lead, _), pytest.raises(DataError, match="token"):
        lead.run(Step((Part(0, 0, 1),)), np.array([128]))
    with group(model, tmp_path, WHOLE) as (lead, _), pytest.raises(DataError, match="row"):
        lead.run(Step((Part(0, 0, 1),)), np.array([3]), np.array([1]))
    with pytest.raises(ExperimentError), group(model, tmp_path, WHOLE, context=1 << 50):
        pass
