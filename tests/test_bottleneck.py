"""Bottlenecks and prefilters: that they learn, that surgery computes what torch computes, and what is refused."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from fedge.core.errors import CannotCut, DataError
from fedge.edge.coding.codings import decode, encode
from fedge.edge.split import bottleneck as bn
from fedge.edge.split import inject, prefilter
from fedge.edge.split.graph import cuts, open_graph


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(size=16):
    """x -> early -> late -> two ways -> y: `late` is read twice, as by a detector's neck."""
    torch.manual_seed(1)
    parts = {
        "early": (nn.Conv2d(3, 6, 3, 2, padding=1), "x"),
        "middle": (nn.Conv2d(6, 8, 3, padding=1), "early"),
        "late": (nn.ReLU(), "middle"),
        "deep": (nn.Conv2d(8, 4, 3, padding=1), "late"),
        "side": (nn.Conv2d(8, 4, 1), "late"),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [], "tiny", [value("x", TensorProto.FLOAT, ["N", 3, size, size])],
        [value("y", TensorProto.FLOAT, ["N", 4, size // 2, size // 2])],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)
    for name, (layer, source) in parts.items():
        made.graph.node.extend(inject._translate(made, nn.Sequential(layer), source, name))
    made.graph.node.append(helper.make_node("Add", ["deep", "side"], ["y"], name="y"))
    onnx.checker.check_model(made)
    return made


def run(made, feed, *outputs):
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    known = {value.name for value in copy.graph.output}
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs if name not in known)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(copy.SerializeToString(), options).run(list(outputs), {"x": feed})


def pictures(count=64, size=16, seed=0):
    """Smooth random pictures: what a bottleneck can learn."""
    coarse = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3, 3, 3)).astype(np.float32))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").numpy()


def features(seed=0, *names):
    return run(model(), pictures(seed=seed), *(names or ("early", "late")))


def error(network, source, target):
    """Mean squared error in units of the channels' mean variance, with the code sent as `u8`."""
    encoder, decoder = network
    with torch.no_grad():
        code = encoder(torch.from_numpy(source)).numpy()
        sent = np.concatenate([received(code[row : row + 1]) for row in range(len(code))])
        back = decoder(torch.from_numpy(sent)).numpy()
    return float(((back - target) ** 2).mean() / target.var(axis=(0, 2, 3)).mean())


def received(code):
    from fedge.edge.bundle import Tensor

    return decode(encode("z", code, "u8"), Tensor("z", "float32", code.shape))


@pytest.mark.parametrize("stride", [1, 2])
def test_head_network_distillation_reproduces_features_of_images_it_has_not_seen(stride):
    network = bn.train_bottleneck(*features(), 3, stride=stride, steps=120, width=16, rate=1e-2)
    untrained = bn.networks(6, 8, 3, 1, stride, 16)
    assert error(network, *features(7)) < 0.45 < 1 < error(untrained, *features(7))
    with torch.no_grad():
        assert network[0](torch.from_numpy(features()[0])).shape == (64, 3, 8 // stride, 8 // stride)


def test_training_is_its_seed_s_to_the_bit():
    once, again, other = (bn.train_bottleneck(*features(), 2, steps=5, seed=seed)[0] for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters()))
    assert not torch.equal(once[0].weight, other[0].weight)


def test_training_leaves_the_caller_s_chance_alone():
    pair, (maps, contains) = features(), blobs(8, 0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    for train in (
        lambda: bn.train_bottleneck(*pair, 2, steps=1),
        lambda: prefilter.train_prefilter(maps, contains, steps=1),
    ):
        torch.manual_seed(5)
        train()
        assert torch.equal(torch.rand(3), expected)


def test_the_generalised_form_cares_for_what_comes_behind():
    source, target = features()
    stage = nn.Sequential(nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        stage[0].weight[:, 2:] = 0  # the next stage looks at two channels of eight
    plain, general = (
        bn.train_bottleneck(source, target, 1, later=later, steps=80, width=16, rate=1e-2)
        for later in ((), (stage,))
    )  # fmt: skip

    def behind(network):
        with torch.no_grad():
            student = stage(network[1](network[0](torch.from_numpy(source))))
            return float(((student - stage(torch.from_numpy(target))) ** 2).mean())

    assert behind(general) < 0.7 * behind(plain)


def test_training_on_crops_does_for_whole_maps():
    source, target = run(model(32), pictures(size=32), "early", "late")
    network = bn.train_bottleneck(source, target, 3, stride=2, crop=8, steps=80, width=16, rate=1e-2)
    assert error(network, source, target) < 0.6


def test_rounding_in_training_is_the_coding_s_and_its_gradient_passes():
    code = torch.randn(1, 3, 5, 5, requires_grad=True)
    out = bn.rounded(code)
    np.testing.assert_allclose(out.detach().numpy(), received(code.detach().numpy()), atol=1e-5)
    (out * torch.arange(75.0).reshape(1, 3, 5, 5)).sum().backward()
    assert torch.equal(code.grad.flatten(), torch.arange(75.0))


@pytest.mark.parametrize("factor", range(1, 7))
def test_code_sizes_are_exact(factor):
    encoder, decoder = bn.networks(4, 5, 2, 1, factor)
    whole = torch.zeros(1, 4, 4 * factor, 2 * factor)
    assert encoder(whole).shape == (1, 2, 4, 2)
    assert decoder(encoder(whole)).shape == (1, 5, 4 * factor, 2 * factor)
    assert bn.networks(4, 5, 2, factor, 1)[0](whole).shape == (1, 2, 4, 2)


@pytest.mark.parametrize(
    ("source", "target", "stride"),
    [
        ((4, 3, 8), (4, 3, 8), 1),
        ((4, 3, 8, 8), (3, 3, 8, 8), 1),
        ((0, 3, 8, 8), (0, 3, 8, 8), 1),
        ((4, 3, 8, 8), (4, 3, 3, 3), 1),
        ((4, 3, 4, 4), (4, 3, 8, 8), 1),
        ((4, 3, 9, 9), (4, 3, 9, 9), 2),
    ],
)
def test_features_that_do_not_fit_are_refused(source, target, stride):
    with pytest.raises(DataError):
        bn.train_bottleneck(np.zeros(source, np.float32), np.zeros(target, np.float32), 2, stride=stride, steps=1)


def test_features_must_be_finite_floats():
    good, bad = np.zeros((2, 3, 4, 4), np.float32), np.full((2, 3, 4, 4), np.nan, np.float32)
    for pair in ((good, bad), (good.astype(np.float64), good)):
        with pytest.raises(DataError):
            bn.train_bottleneck(*pair, 2, steps=1)


# Surgery


@pytest.mark.parametrize("source", ["early", "late"])
@pytest.mark.parametrize("stride", [1, 2])
def test_an_injected_bottleneck_computes_what_torch_computes(source, stride):
    x, tail = pictures(5), model()
    encoder, decoder = bn.networks({"early": 6, "late": 8}[source], 8, 2, 1, stride, 4)
    made = inject.bottleneck(tail, source, "late", encoder, decoder)
    with torch.no_grad():
        code = encoder(torch.from_numpy(run(tail, x, source)[0]))
        late = decoder(code)
        layers = {node.name: node for node in tail.graph.node}
        weights = {
            each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in tail.graph.initializer
        }
        ways = [nn.functional.conv2d(late, *(weights[name] for name in layers[way].input[1:]), padding=pad)
                for way, pad in (("deep", 1), ("side", 0))]  # fmt: skip
    found, answer = run(made, x, "bottleneck", "y")
    np.testing.assert_allclose(found, code.numpy(), atol=1e-5)
    np.testing.assert_allclose(answer, sum(ways).numpy(), atol=1e-5)
    assert ("middle" in {node.name for node in made.graph.node}) == (source == "late")
    assert {each.name for each in made.graph.initializer} == {
        name for node in made.graph.node for name in node.input
    } - {value for node in made.graph.node for value in node.output} - {"x"}


@pytest.mark.parametrize("padded", [0, 1, (1, 0)])
def test_a_transposed_convolution_has_the_size_that_torch_gives_it(padded):
    x, tail = pictures(2), model()
    decoder = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, 2, padding=1, output_padding=padded))
    made = inject.bottleneck(tail, "early", "late", nn.Sequential(nn.ReLU()), decoder)
    with torch.no_grad():
        wanted = decoder(torch.relu(torch.from_numpy(run(tail, x, "early")[0]))).numpy()
    (found,) = run(made, x, "bottleneck/restored")
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_bottleneck_is_a_cut_of_few_channels(tmp_path):
    made = inject.bottleneck(model(), "early", "late", *bn.networks(6, 8, 2, 1, 2, 4))
    onnx.save(made, tmp_path / "m.onnx")
    cut = {each.name: each for each in cuts(open_graph(tmp_path / "m.onnx"))}["bottleneck"]
    assert [tensor.shape for tensor in cut.tensors] == [(-1, 2, 4, 4)]


def test_surgery_leaves_the_model_it_was_given_alone():
    made = model()
    before = made.SerializeToString()
    inject.bottleneck(made, "early", "late", *bn.networks(6, 8, 2, 1, 1))
    inject.branch(made, "late", nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 2)), "filter")
    assert made.SerializeToString() == before


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [("late", "early", "z"), ("early", "nowhere", "z"), ("nowhere", "late", "z"), ("early", "y", "z"),
     ("early", "late", "deep")],
)  # fmt: skip
def test_what_cannot_be_replaced_is_refused(source, target, name):
    with pytest.raises(CannotCut):
        inject.bottleneck(model(), source, target, *bn.networks(6, 8, 2, 1, 1), name)


def test_a_layer_without_translation_is_refused():
    with pytest.raises(CannotCut, match="Sigmoid"):
        inject.bottleneck(model(), "early", "late", nn.Sequential(nn.Sigmoid()), nn.Sequential(nn.ReLU()))


def test_a_tensor_that_a_loop_or_branch_reads_is_refused():
    made = model()
    body = helper.make_graph(
        [helper.make_node("Identity", ["late"], ["out"])], "b", [], [helper.make_empty_tensor_value_info("out")]
    )
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    made.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body))
    with pytest.raises(CannotCut, match="loop or branch"):
        inject.bottleneck(made, "early", "late", *bn.networks(6, 8, 2, 1, 1))


def test_encoder_size_is_counted_in_bits_of_parameters():
    assert inject.bits(nn.Conv2d(3, 4, 3)) == 32 * (4 * 3 * 9 + 4)


# Prefilter


def blobs(count, seed):
    """Feature maps of noise, every second one with a bright spot somewhere."""
    random = np.random.default_rng(seed)
    maps = random.normal(size=(count, 4, 12, 12)).astype(np.float32)
    contains = np.arange(count) % 2
    for row in np.flatnonzero(contains):
        top, left = random.integers(0, 9, 2)
        maps[row, :2, top : top + 3, left : left + 3] += 3
    return maps, contains


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return prefilter.train_prefilter(*blobs(128, 0), width=8, steps=150, rate=1e-2)


def test_a_prefilter_keeps_the_wanted_recall_and_spares_most_of_the_rest(trained):
    maps, contains = blobs(200, 1)
    threshold = prefilter.threshold_for(prefilter.scores(trained, maps), contains, 0.98)
    assert threshold > 0
    fresh, labels = blobs(400, 2)
    sent = prefilter.scores(trained, fresh) >= threshold
    assert sent[labels == 1].mean() > 0.95
    assert sent[labels == 0].mean() < 0.4


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=60), recall=st.floats(0.01, 1.0), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_threshold_keeps_the_recall_of_the_held_out_images_too(scores, recall, data):
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    scores, labels[0] = np.array(scores), True
    threshold = prefilter.threshold_for(scores, labels, recall)
    assert 0 <= threshold <= prefilter.MOST
    assert (scores[labels] >= threshold).mean() >= recall - 1e-9


@pytest.mark.parametrize(("count", "recall"), [(20, 0.9), (99, 0.99), (98, 0.99), (7, 0.5)])
def test_the_recall_of_new_images_is_the_wanted_one_on_average(count, recall):
    random = np.random.default_rng(0)
    rank = int((count + 1) * (1 - recall) + 1e-9)
    found = [
        1 - prefilter.threshold_for(random.uniform(0, 0.4, count), np.ones(count), recall) / 0.4 for _ in range(2000)
    ]
    assert np.mean(found) >= recall - 0.005
    np.testing.assert_allclose(np.mean(found), 1 - rank / (count + 1), atol=0.008)  # and no higher than need be


def test_a_threshold_needs_objects_and_a_recall():
    for labels, recall in (([0, 0], 0.9), ([0, 1], 0.0), ([0, 1], 1.1)):
        with pytest.raises(DataError):
            prefilter.threshold_for(np.array([0.1, 0.2]), np.array(labels), recall)


def test_a_prefilter_needs_both_kinds_of_images():
    maps, contains = blobs(8, 0)
    for labels in (contains * 0, contains[:4], contains + 1):
        with pytest.raises(DataError):
            prefilter.train_prefilter(maps, labels, steps=1)


@pytest.mark.parametrize("threshold", [0.01, 0.2, prefilter.MOST])
def test_as_an_exit_it_answers_only_nothing_and_exactly_below_the_threshold(trained, threshold):
    maps, _ = blobs(300, 3)
    network, confidence = prefilter.as_exit(trained, threshold)
    with torch.no_grad():
        shares = network(torch.from_numpy(maps)).double().softmax(1).numpy()
    answers = shares.max(axis=1) >= confidence
    p = prefilter.scores(trained, maps)
    np.testing.assert_array_equal(answers, p < threshold)
    assert 0 < answers.sum() < 300
    assert (shares[answers].argmax(axis=1) == prefilter.NOTHING).all()


def test_a_threshold_too_near_a_half_makes_no_exit(trained):
    for threshold in (0.5, -0.1, float("nan")):
        with pytest.raises(DataError):
            prefilter.as_exit(trained, threshold)


def test_a_branch_gives_the_logits_that_torch_gives():
    network = nn.Sequential(
        nn.Conv2d(8, 4, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    x, plain = pictures(6), model()
    made = inject.branch(plain, "late", network, "filter")
    late, y = run(plain, x, "late", "y")
    logits, same = run(made, x, "filter", "y")
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(torch.from_numpy(late)).numpy(), atol=1e-5)
    np.testing.assert_array_equal(same, y)
