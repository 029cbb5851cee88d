"""Laws of the partitions: disjoint, covering, non-empty, reproducible, and as skewed as their settings say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.client.data import PARTITIONS, counts, load
from fedge.client.data.partitions import ByClass, Dirichlet, DualDirichlet, Iid, Natural
from fedge.core.errors import DataError, ExperimentError

SEEDS = st.integers(0, 2**63)
FASHION = load("fashion-mnist")


def labels_of(sizes, seed=0):
    """Labels in mixed order, sizes[k] of class k."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)


@st.composite
def cases(draw):
    """A partition and labels that it can share out in full."""
    clients = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(20, 200), min_size=2, max_size=12))
    classes = len(sizes)
    least = -(-classes // clients)  # so that the clients can hold all classes
    most = draw(st.integers(least, classes))
    kind = draw(
        st.sampled_from(
            [
                Iid(clients),
                ByClass(clients, draw(st.integers(1, most)), most),
                Dirichlet(clients, draw(st.floats(0.3, 1e4)), min_examples=1),
                DualDirichlet(clients, draw(st.none() | st.floats(clients, 1e4)), draw(st.floats(0.5, 1e4))),
            ]
        )
    )
    return kind, labels_of(sizes, draw(st.integers(0, 100)))


@given(cases(), SEEDS)
def test_shards_are_disjoint_covering_sorted_and_non_empty(case, seed):
    partition, labels = case
    shards = partition.split(labels, {}, seed)
    assert len(shards) == partition.clients
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    for shard in shards:
        assert shard.dtype == np.int64
        assert len(shard) > 0
        assert (np.diff(shard) > 0).all()


@given(cases(), SEEDS)
def test_the_same_seed_gives_the_same_shards(case, seed):
    partition, labels = case
    first, second = partition.split(labels, {}, seed), partition.split(labels, {}, seed)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "partition", [Iid(5), ByClass(5), Dirichlet(5), DualDirichlet(5)], ids=lambda p: type(p).__name__
)
def test_another_seed_gives_other_shards(partition):
    first, second = (partition.split(FASHION.y_train, {}, seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second))


@given(st.integers(1, 40), SEEDS)
def test_iid_sizes_differ_by_one_at_most(clients, seed):
    sizes = [len(shard) for shard in Iid(clients).split(FASHION.y_train, {}, seed)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_clients_hold_every_class_in_proportion():
    table = counts(FASHION.y_train, Iid(4).split(FASHION.y_train, {}, 3), 10)
    assert abs(table - 200).max() < 60  # 5 standard deviations of a hypergeometric draw


@given(st.data())
def test_class_partition_keeps_to_its_number_of_classes(data):
    clients = data.draw(st.integers(2, 12))
    most = data.draw(st.integers(-(-10 // clients), 10))
    fewest = data.draw(st.integers(1, most))
    labels = labels_of([3000] * 10)  # of few examples, a holder with a small part might get none
    held = (counts(labels, ByClass(clients, fewest, most).split(labels, {}, data.draw(SEEDS)), 10) > 0).sum(axis=1)
    assert held.max() <= most
    # Where all clients together would hold too few classes, some hold more than the fewest: never one less.
    assert held.min() >= fewest


def test_class_partition_draws_every_number_of_classes_equally_often():
    table = [ByClass(5, 4, 6).split(FASHION.y_train, {}, seed) for seed in range(200)]
    held = np.concatenate([(counts(FASHION.y_train, shards, 10) > 0).sum(axis=1) for shards in table])
    shares = np.bincount(held, minlength=7)[4:] / len(held)
    assert np.allclose(shares, 1 / 3, atol=0.08)  # 5 standard deviations of 1000 draws


def test_class_partition_gives_one_class_each_where_asked():
    table = counts(FASHION.y_train, ByClass(10, 1, 1).split(FASHION.y_train, {}, 0), 10)
    assert sorted(table.argmax(axis=1)) == list(range(10))
    assert table.max(axis=1).tolist() == [800] * 10


def test_class_partition_cuts_a_class_by_normal_lengths():
    """All hold all: the parts of a class are |N(10, 3)| normalised, so they vary by about 0.3 of their mean."""
    table = counts(FASHION.y_train, ByClass(20, 10, 10).split(FASHION.y_train, {}, 0), 10)
    assert table.mean() == 40
    assert 0.25 < table.std() / table.mean() < 0.36


def test_dirichlet_with_a_large_alpha_approaches_iid():
    table = counts(FASHION.y_train, Dirichlet(8, alpha=1e6).split(FASHION.y_train, {}, 0), 10)
    assert abs(table - 100).max() <= 3


def test_dirichlet_alpha_is_the_concentration_of_each_component():
    """A share of Dir(alpha * ones(m)) has mean 1/m and variance (1/m)(1-1/m)/(m alpha + 1)."""
    m, alpha = 5, 2.0
    tables = [counts(FASHION.y_train, Dirichlet(m, alpha).split(FASHION.y_train, {}, seed), 10) for seed in range(60)]
    shares = np.stack(tables) / 800
    assert np.isclose(shares.var(), (1 / m) * (1 - 1 / m) / (m * alpha + 1), rtol=0.15)


def test_dirichlet_keeps_drawing_until_every_client_has_enough():
    shards = Dirichlet(10, alpha=0.1, min_examples=60).split(FASHION.y_train, {}, 0)
    assert min(map(len, shards)) >= 60


def test_dual_dirichlet_with_a_small_alpha2_gives_few_classes():
    few = counts(FASHION.y_train, DualDirichlet(10, alpha2=0.05).split(FASHION.y_train, {}, 0), 10)
    many = counts(FASHION.y_train, DualDirichlet(10, alpha2=1e6).split(FASHION.y_train, {}, 0), 10)
    assert np.median((few > 0.02 * few.sum(axis=1, keepdims=True)).sum(axis=1)) <= 2
    assert (many > 0).sum(axis=1).min() == 10


def test_dual_dirichlet_sizes_follow_alpha1():
    equal = DualDirichlet(10, alpha1=1e7, alpha2=1e6).split(FASHION.y_train, {}, 0)
    assert abs(np.array(list(map(len, equal))) - 800).max() <= 20
    # The default is alpha1 = clients: Dir(1, ..., 1), whose components vary by (1/m)(1-1/m)/(m+1).
    m = 5
    draws = [DualDirichlet(m, alpha2=1e8).split(FASHION.y_train, {}, seed) for seed in range(150)]
    shares = np.array([[len(shard) for shard in shards] for shards in draws]) / 8000
    assert np.isclose(shares.var(), (1 / m) * (1 - 1 / m) / (m + 1), rtol=0.2)


def test_dual_dirichlet_scales_the_mix_by_the_class_prior():
    """alpha2 is the sum of the concentrations, so ten equal classes have 0.05 each by default. A single client's mix is
    hidden by normalisation; of two clients of equal weight the shares of a class are mix_1 / (mix_1 + mix_2), which for
    so small a concentration lie near 0 or 1."""
    tables = [
        counts(FASHION.y_train, DualDirichlet(2, alpha1=1e7).split(FASHION.y_train, {}, seed), 10) for seed in range(40)
    ]
    share = np.stack(tables)[:, 0] / 800
    assert ((share < 0.02) | (share > 0.98)).mean() > 0.75  # it would be about 0.2 at 0.5 per class


@given(st.integers(1, 4), SEEDS)
def test_the_smallest_concentrations_do_not_underflow(clients, seed):
    """Shares of 1e-1000 and less: none is lost to 0 / 0. Each client has one class that is nearly all of its mix; a
    class is shared only where it is that of two clients, and goes whole to one otherwise."""
    table = counts(FASHION.y_train, DualDirichlet(clients, 1e3, 1e-5).split(FASHION.y_train, {}, seed), 10)
    assert table.sum(axis=0).tolist() == [800] * 10
    assert (table.max(axis=0) < 800).sum() <= clients // 2


def test_labels_need_not_begin_at_zero_or_be_dense():
    labels = labels_of([50, 50]) * 7 + 3
    for partition in (Iid(3), ByClass(3, 1, 2), Dirichlet(3), DualDirichlet(3, alpha2=5.0)):
        assert sum(map(len, partition.split(labels, {}, 0))) == 100


def test_natural_gives_one_client_per_value():
    labels = labels_of([30, 30])
    writer = np.array(["c", "a", "b"])[np.arange(60) % 3]
    shards = Natural("writer").split(labels, {"writer": writer}, 0)
    assert [set(writer[shard]) for shard in shards] == [{"a"}, {"b"}, {"c"}]
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(60))
    assert all((np.diff(shard) > 0).all() for shard in shards)


def test_natural_with_a_number_of_clients_takes_the_largest():
    site = np.array([3] * 5 + [1] * 20 + [2] * 10)
    shards = Natural("site", clients=2).split(np.zeros(35, np.int64), {"site": site}, 0)
    assert [(set(site[shard]), len(shard)) for shard in shards] == [({1}, 20), ({2}, 10)]


def test_counts_by_hand():
    table = counts(np.array([0, 2, 2, 1, 0]), [np.array([0, 1, 2]), np.array([3, 4])], 4)
    assert table.dtype == np.int64
    assert table.tolist() == [[1, 0, 2, 0], [1, 1, 0, 0]]


def test_the_registry_builds_every_kind_from_plain_settings():
    settings = [
        {"kind": "iid", "clients": 3},
        {"kind": "class", "clients": 5, "min_classes": 2, "max_classes": 4},
        {"kind": "dirichlet", "clients": 3, "alpha": 1},
        {"kind": "dual-dirichlet", "clients": 3, "alpha1": 8, "alpha2": 0.5},
        {"kind": "natural", "column": "writer"},
    ]
    assert {entry["kind"] for entry in settings} == set(PARTITIONS.entries)
    columns = {"writer": np.arange(8000) % 4}
    made = [PARTITIONS.build(entry).split(FASHION.y_train, columns, 0) for entry in settings]
    assert [len(shards) for shards in made] == [3, 5, 3, 3, 4]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kind": "iid", "clients": 0}, "clients"),
        ({"kind": "iid", "client": 3}, "did you mean 'clients'"),
        ({"kind": "iid", "clients": "3"}, "int"),
        ({"kind": "class", "clients": 3, "min_classes": 0}, "min_classes"),
        ({"kind": "class", "clients": 3, "min_classes": 4, "max_classes": 3}, "max_classes"),
        ({"kind": "dirichlet", "clients": 3, "alpha": 0}, "alpha"),
        ({"kind": "dirichlet", "clients": 3, "alpha": float("nan")}, "alpha"),
        ({"kind": "dirichlet", "clients": 3, "min_examples": 0}, "min_examples"),
        ({"kind": "dual-dirichlet", "clients": 3, "alpha1": -1}, "alpha1"),
        ({"kind": "dual-dirichlet", "clients": 3, "alpha2": float("inf")}, "alpha2"),
        ({"kind": "natural", "column": "writer", "clients": -1}, "clients"),
        ({"kind": "dual-dirichlett", "clients": 3}, "did you mean 'dual-dirichlet'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, word):
    with pytest.raises(ExperimentError, match=word):
        PARTITIONS.build(settings)


@pytest.mark.parametrize(
    ("partition", "word"),
    [
        (ByClass(2, 3, 11), "at most 10"),
        (ByClass(2, 1, 4), "at least 5"),
        (Natural("hospital"), "no column 'hospital'"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(partition, word):
    with pytest.raises(ExperimentError, match=word):
        partition.split(FASHION.y_train, {}, 0)


@pytest.mark.parametrize(
    ("partition", "columns", "word"),
    [
        (Iid(9), {}, "fewer clients"),
        (Dirichlet(2), {}, "fewer clients"),
        (Dirichlet(8, alpha=1e-6, min_examples=1), {}, "larger alpha"),
        (DualDirichlet(9), {}, "fewer clients"),
        (Natural("site", clients=4), {"site": np.arange(8) % 3}, "at most 3"),
        (Natural("site"), {"site": np.zeros((8, 2))}, "one value per training example"),
    ],
)
def test_too_few_examples_are_refused_with_a_remedy(partition, columns, word):
    with pytest.raises(DataError, match=word):
        partition.split(labels_of([4, 4]), columns, 0)
