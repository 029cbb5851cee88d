"""Exits of a language model: their arithmetic, their file, their thresholds, and that training makes them better."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedge.core.errors import DataError, ExperimentError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.exits.calibrate import calibration_error, loss_bound, temperature
from fedge.edge.llm.collab.exits import Exits, Figures, Row, load, logits, save, untrained
from fedge.edge.llm.collab.fit import Effort, Lesson, Vocabulary, fit
from fedge.edge.llm.collab.teacher import pieces, teacher
from fedge.edge.llm.collab.thresholds import Seen, compact, row, table, threshold_for
from fedge.edge.llm.collab.train import FEWEST, divide, train_exits
from fedge.edge.llm.models.folder import EMBEDDING, HEAD, NORM, open_folder, promised
from tests.llm_fixture import folder
from tests.llm_reference import attention, ffn, norm
from tests.llm_reference import logits as whole

RANDOM = np.random.default_rng(3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("model"), layers=3, vocab=320, context=32)


@pytest.fixture(scope="module")
def start(model: Path) -> Exits:
    with open_folder(model) as opened:
        return untrained(opened, (1, 2))


def test_an_untrained_exit_is_the_next_layers_network_and_the_models_end(model: Path, start: Exits) -> None:
    x = RANDOM.standard_normal((7, 64), dtype=np.float32)
    with open_folder(model) as opened:
        y = x + ffn(
            opened,
            "model.layers.2.mlp.",
            norm(x, opened.tensor("model.layers.2.post_attention_layernorm.weight"), start.eps),
        )
        head = opened.tensor(HEAD)
        wanted = norm(y, opened.tensor(NORM), start.eps) @ head.T
    got = logits(start.exits[1], x, lambda z: z @ head.T, start.eps)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    warm = replace(start.exits[1], temperature=2.5)
    np.testing.assert_allclose(logits(warm, x, lambda z: z @ head.T, start.eps), wanted / 2.5, rtol=1e-4, atol=1e-5)
    assert got.dtype == np.float32
    assert [one.threshold for one in start.exits] == [1.0, 1.0]
    assert start.layers == (1, 2)


@pytest.mark.parametrize("layers", [(), (0, 1), (1, 3), (2, 1), (1, 1), (-1,)])
def test_exits_stand_between_layers_in_rising_order(model: Path, layers: tuple[int, ...]) -> None:
    with open_folder(model) as opened, pytest.raises(ExperimentError, match="rising numbers from 1 to 2"):
        untrained(opened, layers)


def test_a_file_holds_all_of_the_exits(start: Exits, tmp_path: Path) -> None:
    first = replace(start.exits[0], temperature=1.5, threshold=0.75, figures=Figures(0.2, 0.03, 0.6))
    given = replace(start, exits=(first, start.exits[1]), table=(Row((0.5, 0.5), (0.1, 0.2), (1.0, 0.9), 0.7, 0.98),))
    save(tmp_path / "new" / "exits.safetensors", given)
    found = load(tmp_path / "new" / "exits.safetensors")
    assert (found.model, found.eps, found.layers, found.table) == (given.model, given.eps, (1, 2), given.table)
    for one, other in zip(found.exits, given.exits, strict=True):
        assert (one.layer, one.temperature, one.threshold, one.figures) == (
            other.layer,
            other.temperature,
            other.threshold,
            other.figures,
        )
        for name in ("feed_norm", "gate_up", "down", "norm"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["exits.safetensors"]


def spoil(path: Path, facts: dict[str, Any] | None = None, one: dict[str, Any] | None = None, **tensors: Any) -> None:
    """Change what a file says of all exits, of the first one, or its tensors (None: away)."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    about = json.loads(header["__metadata__"]["fedge"]) | (facts or {})
    about["exits"][0] |= one or {}
    arrays = load_file(path) | {
        name.replace("_of_1", "").replace("at_", "1."): array for name, array in tensors.items()
    }
    save_file({name: array for name, array in arrays.items() if array is not None}, path, {"fedge": json.dumps(about)})


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("format", {"facts": {"format": 2}}),
    ("eps", {"facts": {"eps": 0.0}}),
    ("model", {"facts": {"model": "abc"}}),
    ("rise", {"one": {"layer": 2}}),
    ("rise", {"one": {"layer": 0}}),
    ("rise", {"facts": {"exits": [{"layer": 1 << 40, "temperature": 1.0, "threshold": 1.0, "figures": {}}]}}),
    ("threshold 1.5", {"one": {"threshold": 1.5}}),
    ("threshold -0.1", {"one": {"threshold": -0.1}}),
    ("temperature 0", {"one": {"temperature": 0.0}}),
    ("Expected `int`", {"one": {"layer": "1"}}),
    ("unknown field", {"facts": {"run": "this"}}),
    ("1.down", {"at_down": None, "more": np.zeros(1, np.float32)}),
    ("more tensors", {"more": np.zeros(1, np.float32)}),
    ("not finite", {"at_norm": np.full(64, np.nan, np.float32)}),
    ("other types or shapes", {"at_norm": np.zeros(64, np.float16)}),
    ("other types or shapes", {"at_gate_up": np.zeros((190, 64), np.float32)}),
    ("other types or shapes", {"at_feed_norm": np.zeros((64, 1), np.float32)}),
    ("sizes outside", {"at_down": np.zeros((64, 0), np.float32)}),
    ("sizes outside", {"at_down": np.zeros((), np.float32)}),
]


@pytest.mark.parametrize(("words", "change"), HOSTILE, ids=[f"{at} {words}" for at, (words, _) in enumerate(HOSTILE)])
def test_a_file_that_contradicts_itself_is_refused(
    start: Exits, tmp_path: Path, words: str, change: dict[str, Any]
) -> None:
    path = tmp_path / "exits.safetensors"
    save(path, start)
    spoil(path, **change)
    with pytest.raises(ModelError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_exits_is_refused(model: Path, tmp_path: Path, start: Exits) -> None:
    path = tmp_path / "exits.safetensors"
    save(path, start)
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole + b"\0", b"\xff" * 64, whole.replace(b'"fedge"', b'"other"')):
        path.write_bytes(data)
        with pytest.raises(ModelError):
            load(path)
    for wrong in (model / "model.safetensors", tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError):
            load(wrong)
    save(path, start)
    with pytest.raises(ModelError, match="layers"):
        load(path, LlmLimits(max_layers=2))
    (tmp_path / "plain").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        save(tmp_path / "plain" / "exits.safetensors", start)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), exits=st.integers(1, 3), n=st.integers(1, 20))
def test_a_row_is_what_counting_gives(data: st.DataObject, exits: int, n: int) -> None:
    """Token by token: the first exit that is sure enough answers, at 1 none does."""
    levels = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
    sure = [[data.draw(levels) for _ in range(n)] for _ in range(exits)]
    right = [[data.draw(st.booleans()) for _ in range(n)] for _ in range(exits)]
    bars = [data.draw(levels) for _ in range(exits)]
    answered: list[list[bool]] = [[] for _ in range(exits)]
    for at in range(n):
        for number in range(exits):
            if bars[number] < 1 and sure[number][at] >= bars[number]:
                answered[number].append(right[number][at])
                break
    found = row(Seen(np.array(sure), np.array(right)), bars)
    assert found.thresholds == tuple(bars)
    assert found.shares == pytest.approx([len(one) / n for one in answered])
    assert found.agreements == pytest.approx([np.mean(one) if one else 1.0 for one in answered])
    assert found.cloud == pytest.approx(1 - sum(map(len, answered)) / n)
    assert found.agreement == pytest.approx(1 - sum(len(one) - sum(one) for one in answered) / n)


def seen(n: int, seed: int) -> Seen:
    """Two exits that are right as often as they believe; the second believes more."""
    random = np.random.default_rng(seed)
    sure = np.stack([random.beta(1, 1.5, n), random.beta(2, 1, n)])
    return Seen(sure, random.random((2, n)) < sure)


@pytest.mark.parametrize("agreement", [0.9, 0.95, 0.98])
def test_the_chosen_threshold_keeps_the_agreement_on_new_positions(agreement: float) -> None:
    bar = threshold_for(seen(4000, 1), agreement)
    found, again = row(seen(4000, 1), (bar, bar)), row(seen(4000, 2), (bar, bar))
    lost = np.repeat([1.0, 0.0], [round(4000 * (1 - found.agreement)), round(4000 * found.agreement)])
    assert loss_bound(lost) <= 1 - agreement
    assert again.agreement >= agreement
    grid = itertools.product(np.linspace(0.4, 1, 13), repeat=2)
    best = min(one.cloud for bars in grid if (one := row(seen(4000, 1), bars)).agreement >= agreement)
    assert found.cloud <= best + 0.08  # the price of being sure, and of one threshold for all


def test_a_laxer_goal_asks_the_cloud_less_and_few_positions_prove_nothing() -> None:
    bars = [threshold_for(seen(4000, 1), wanted) for wanted in (1.0, 0.99, 0.95, 0.8, 0.0)]
    asked = [row(seen(4000, 1), (bar, bar)).cloud for bar in bars]
    assert asked == sorted(asked, reverse=True)
    assert (bars[0], asked[0], asked[-1]) == (1.0, 1.0, 0.0)
    sure = Seen(np.full((1, 20), 0.999), np.ones((1, 20), bool))
    assert threshold_for(sure, 0.98) == 1.0


def test_exits_that_are_certain_can_answer() -> None:
    """A confidence of 1 to the last bit is at or above a threshold below 1."""
    certain = Seen(np.ones((1, 4000)), np.ones((1, 4000), bool))
    bar = threshold_for(certain, 0.98)
    assert bar < 1
    assert row(certain, (bar,)).cloud == 0
    assert [one.cloud for one in table(certain)] == [0] * 7 + [1]


def test_no_positions_are_refused() -> None:
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(DataError, match="calibration set is empty"):
            Seen(np.zeros(shape), np.zeros(shape, bool))
    with pytest.raises(DataError, match="confidences"):
        Seen(np.full((1, 3), np.nan), np.ones((1, 3), bool))
    with pytest.raises(ExperimentError, match="agreement of 1.5"):
        threshold_for(seen(100, 1), 1.5)


@pytest.mark.parametrize(("vocab", "fewer"), [(200, 201), (512, 513), (513, 514), (3000, 1 + 512 + 39)])
def test_few_logits_have_the_probabilities_and_the_temperature_of_all(vocab: int, fewer: int) -> None:
    random = np.random.default_rng(vocab)
    steep = -2 * np.log1p(random.permuted(np.tile(np.arange(vocab), (400, 1)), axis=1))  # few tokens are likely
    raw = (steep + random.standard_normal((400, vocab))).astype(np.float32)
    labels = (raw / 1.4 + random.gumbel(size=raw.shape)).argmax(axis=1)
    few, zeros = compact(raw, labels), np.zeros(400, np.int64)
    assert few.shape == (400, fewer)
    np.testing.assert_array_equal(few[:, 0], raw[np.arange(400), labels])
    np.testing.assert_array_equal(few.max(axis=1), raw.max(axis=1))
    np.testing.assert_allclose(np.exp(few).sum(axis=1), np.exp(raw).sum(axis=1), rtol=1e-4)
    assert calibration_error(few, zeros) == pytest.approx(calibration_error(raw, labels), abs=1e-4)
    assert temperature(few, zeros) == pytest.approx(temperature(raw, labels), rel=0.05)


def reference_states(model: Path, ids: list[int], layers: tuple[int, ...]) -> list[np.ndarray]:
    with open_folder(model) as opened:
        x, found, eps = opened.embed(ids), [], opened.config.eps
        for layer in range(opened.config.layers):
            name = f"model.layers.{layer}."
            x = x + attention(opened, name + "self_attn.", norm(x, opened.tensor(name + "input_layernorm.weight"), eps))
            x = x + ffn(opened, name + "mlp.", norm(x, opened.tensor(name + "post_attention_layernorm.weight"), eps))
            if layer + 1 in layers:
                found.append(x)
    return found


def test_the_teacher_has_the_models_states_and_writes_its_texts(model: Path) -> None:
    texts = [[1, *RANDOM.integers(3, 320, 9).tolist()], [1, *RANDOM.integers(3, 320, 4).tolist()]]
    with open_folder(model) as opened, teacher(opened, (1, 2)) as one:
        got = one.states_of(texts)
        written, again, other = one.write(40, 5), one.write(40, 5), one.write(40, 6)
    wanted = [np.concatenate(rows) for rows in zip(*(reference_states(model, ids, (1, 2, 3)) for ids in texts))]
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    assert len(written) == 40
    assert written == again != other
    assert all(ids[0] == 1 and 2 <= len(ids) <= 32 for ids in written)
    assert len({tuple(ids) for ids in written}) == 40
    assert all(len(ids) == 32 or ids[-1] == 2 for ids in written)
    assert any(ids[-1] == 2 for ids in written)
    assert not any(2 in ids[:-1] for ids in written)


def test_a_text_becomes_sequences_that_begin_as_texts_do() -> None:
    assert pieces(range(10), 99, 4) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert pieces(range(9), None, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert pieces(range(2), 99, 4) == []


def lesson(model: Path, n: int = 600) -> tuple[Exits, Lesson]:
    with open_folder(model) as opened:
        start = untrained(opened, (1, 2))
        texts = [[1, *np.random.default_rng(at).integers(3, 320, 29).tolist()] for at in range(n // 30)]
        with teacher(opened, (1, 2)) as one:
            *states, final = one.states_of(texts)
        return start, Lesson(states, norm(final, opened.tensor(NORM), start.eps), opened.tensor(HEAD), start.eps)


def distances(exits: Exits, taught: Lesson) -> list[float]:
    """KL of each exit from the model, over the whole vocabulary."""

    def logs(raw: np.ndarray) -> np.ndarray:
        shifted = raw - raw.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    full = logs(taught.final @ taught.head.T)
    said = [logs(logits(one, x, lambda z: z @ taught.head.T, taught.eps)) for one, x in zip(exits.exits, taught.states)]
    return [float((np.exp(full) * (full - one)).sum(axis=1).mean()) for one in said]


@pytest.mark.parametrize(("frequent", "drawn"), [(2048, 512), (100, 40)], ids=["all tokens", "drawn tokens"])
def test_training_brings_exits_nearer_to_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, frequent: int, drawn: int
) -> None:
    monkeypatch.setattr("fedge.edge.llm.collab.fit.FREQUENT", frequent)
    monkeypatch.setattr("fedge.edge.llm.collab.fit.DRAWN", drawn)
    start, taught = lesson(model)
    told: list[float] = []
    trained = fit(start.exits, taught, Effort(60, tokens=128), 1, told.append)
    before, after = distances(start, taught), distances(replace(start, exits=trained), taught)
    assert all(now < 0.85 * then for now, then in zip(after, before, strict=True))
    assert told == sorted(told)
    assert (len(told), told[-1]) == (60, 1.0)


def test_drawn_tokens_stand_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On average over draws the sum of exp(logits) is that over the whole vocabulary."""
    monkeypatch.setattr("fedge.edge.llm.collab.fit.FREQUENT", 50)
    monkeypatch.setattr("fedge.edge.llm.collab.fit.DRAWN", 100)
    chance = torch.Generator().manual_seed(1)
    head, x = torch.randn(400, 8, generator=chance) / 4, torch.randn(5, 8, generator=chance)
    vocabulary = Vocabulary(head, x, chance)
    draws = [vocabulary.draw(chance) for _ in range(200)]
    sums = torch.stack([(x @ rows.T + raised).exp().sum(1) for rows, raised in draws]).mean(0)
    torch.testing.assert_close(sums, (x @ head.T).exp().sum(1), rtol=0.02, atol=0)


def test_what_chooses_does_not_judge() -> None:
    sequences = [[at] for at in range(50)]
    groups = divide(sequences, 3)
    assert [len(group) for group in groups] == [40, 5, 5]
    assert sorted(ids[0] for group in groups for ids in group) == list(range(50))


def test_training_is_the_same_for_the_same_seed_and_leaves_the_start_alone(model: Path) -> None:
    start, taught = lesson(model, 300)
    kept = start.exits[0].down.copy()
    one, same, other = (fit(start.exits, taught, Effort(5, tokens=64), seed)[0].down for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(start.exits[0].down, kept)


def test_training_that_runs_away_is_refused(model: Path) -> None:
    start, taught = lesson(model, 300)
    with pytest.raises(ModelError, match="beyond all bounds"):
        fit(start.exits, replace(taught, final=np.full_like(taught.final, np.nan)), Effort(2, tokens=8), 0)


@pytest.mark.parametrize("tied", [False, True])
def test_exits_are_trained_from_a_text_or_from_the_models_own(tmp_path: Path, tied: bool) -> None:
    model = folder(tmp_path, layers=3, vocab=320, context=32, tied=tied)
    told: list[tuple[str, float]] = []
    text = "" if tied else "the other one is not here and that is it. " * 40
    found = train_exits(
        model,
        text,
        (1, 2),
        tmp_path / "exits.safetensors",
        effort=Effort(4, tokens=32),
        generate=24 if tied else 0,
        agreement=0.5,
        progress=lambda what, share: told.append((what, share)),
    )
    again = load(tmp_path / "exits.safetensors")
    with open_folder(model) as opened:
        assert again.model == found.model == opened.digest
        start = untrained(opened, (1, 2))
        assert opened.config.tied is tied
        assert (EMBEDDING in promised(opened.config), HEAD in promised(opened.config)) == (True, not tied)
    assert not np.array_equal(again.exits[0].down, start.exits[0].down)
    assert again.table == found.table
    assert [one.temperature for one in again.exits] != [1.0, 1.0]
    assert all(one.figures.ece_before != one.figures.ece for one in again.exits)
    assert again.table[-1].thresholds == tuple(one.threshold for one in again.exits)
    assert (again.table[-2].cloud, again.table[-2].agreement) == (1.0, 1.0)
    assert {what for what, _ in told} == {"states", "train", "calibrate"} | ({"write"} if tied else set())
    assert all(0 < share <= 1 for _, share in told)


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ExperimentError, "rising", {"layers": (2, 1)}),
    (DataError, f"{FEWEST} are needed", {"text": "short"}),
    (DataError, f"0 sequences of 32 tokens to learn from, {FEWEST} are needed", {"text": ""}),
    (ExperimentError, "agreement 1.5", {"agreement": 1.5}),
    (ExperimentError, "-1 sequences", {"generate": -1}),
    (ExperimentError, "No exit is trained in 0", {"effort": Effort(0)}),
    (ExperimentError, "No exit is trained in nan", {"effort": Effort(seconds=float("nan"))}),
    (ExperimentError, "with 0 tokens", {"effort": Effort(tokens=0)}),
]


@pytest.mark.parametrize(("kind", "words", "changed"), BAD, ids=[words for _, words, _ in BAD])
def test_what_cannot_be_trained_is_refused(
    model: Path, tmp_path: Path, kind: type[Exception], words: str, changed: dict[str, Any]
) -> None:
    asked = {"text": "a text " * 100, "layers": (1, 2), "effort": Effort(1, tokens=8), **changed}
    with pytest.raises(kind, match=words) as caught:
        train_exits(model, asked.pop("text"), asked.pop("layers"), tmp_path / "out", **asked)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_or_beginning_is_refused(tmp_path: Path) -> None:
    bare = folder(tmp_path, layers=2, vocab=320, context=32, bos_token_id=None)
    with pytest.raises(ExperimentError, match="no token that begins a text"):
        train_exits(bare, "", (1,), tmp_path / "out", effort=Effort(1), generate=20)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        train_exits(bare, "a text " * 100, (1,), tmp_path / "out", effort=Effort(1))


@pytest.mark.slow
def test_exits_learn_what_the_whole_model_says(tmp_path: Path) -> None:
    """At the end the last exit names the model's own token more often than before, on texts it has not seen."""
    model = folder(tmp_path, layers=3, vocab=320, context=64)
    short, long = (
        train_exits(model, "", (1, 2), tmp_path / "out", effort=Effort(steps, tokens=256), generate=120)
        for steps in (1, 400)
    )
    assert long.exits[1].figures.agreement > short.exits[1].figures.agreement + 0.05
    assert long.exits[1].figures.agreement > long.exits[0].figures.agreement
    ids = [1, *RANDOM.integers(3, 320, 40).tolist()]
    x = reference_states(model, ids, (2,))[0]
    with open_folder(model) as opened:
        head = opened.tensor(HEAD)
    said = logits(long.exits[1], x, lambda z: z @ head.T, long.eps)
    assert (said.argmax(axis=1) == whole(model, ids).argmax(axis=1)).mean() > 0.3
