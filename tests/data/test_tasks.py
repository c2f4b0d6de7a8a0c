"""Classification tasks as clients, and disjoint pools."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cedarjax import data

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 20))
ROWS = np.stack([np.arange(120), LABELS], axis=1)  # an "image" that tells its row and its class


def build(**changes):
    arguments = {"num_clients": 15, "num_classes": 4, "num_support": 2, "num_query": 3, "seed": 0} | changes
    return data.class_tasks(ROWS, LABELS, **arguments)


def clients(dataset):
    x, y = (np.asarray(dataset.examples[name]) for name in ("x", "y"))
    for start, stop in zip(np.asarray(dataset.offsets)[:-1], np.asarray(dataset.offsets)[1:], strict=True):
        yield x[start:stop], y[start:stop]


def test_every_client_is_a_balanced_task():
    dataset = build()
    assert dataset.num_clients == 15 and dataset.max_examples == 20
    np.testing.assert_array_equal(dataset.num_support, np.full(15, 8))
    assert dataset.examples["y"].dtype == np.int32
    for x, y in clients(dataset):
        np.testing.assert_array_equal(np.bincount(y[:8]), [2] * 4)
        np.testing.assert_array_equal(np.bincount(y[8:]), [3] * 4)
        assert len(np.unique(x[:, 0])) == 20
        # The private label names exactly one class, and no class has two names.
        assert len({(int(name), int(kind)) for name, kind in zip(y, x[:, 1], strict=True)}) == 4
        assert len(np.unique(x[:, 1])) == 4


def test_private_orders_differ_and_cover_all_classes():
    dataset = build(num_clients=600, num_classes=3, num_support=1, num_query=1)
    named = np.stack([[x[y == name, 1][0] for name in range(3)] for x, y in clients(dataset)])
    for column in named.T:
        counts = np.bincount(column, minlength=6)
        np.testing.assert_allclose(counts, 100, atol=5 * np.sqrt(600 * (1 / 6) * (5 / 6)))
    assert len(np.unique(named, axis=0)) > 90  # of 6 * 5 * 4 = 120 ordered triples, 119 are expected


def test_rows_are_not_sorted_by_label():
    firsts = np.array([(y[0], y[8]) for _, y in clients(build(num_clients=400))])
    for column in firsts.T:
        np.testing.assert_allclose(np.bincount(column, minlength=4), 100, atol=5 * np.sqrt(400 * 0.25 * 0.75))


def test_clients_draw_from_their_pool_alone():
    train, test = data.split_pools(LABELS, [0.5, 0.5], seed=0)
    for pool, seed in ((train, 1), (test, 2)):
        dataset = build(pool=pool, seed=seed)
        assert set(np.asarray(dataset.examples["x"])[:, 0]) <= set(pool)


def test_a_pool_of_some_classes_gives_tasks_of_those_classes():
    dataset = build(pool=np.flatnonzero(LABELS < 4))
    assert set(np.asarray(dataset.examples["x"])[:, 1]) == {0, 1, 2, 3}


def test_all_images_of_a_class_can_be_used():
    dataset = build(num_support=15, num_query=5, num_clients=1, num_classes=6)
    np.testing.assert_array_equal(np.sort(np.asarray(dataset.examples["x"])[:, 0]), np.arange(120))


def test_seed_decides_the_tasks():
    a, b, c = (np.asarray(build(seed=seed).examples["x"]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_labels_may_be_strings():
    names = np.array(["ant", "bee"])[np.arange(8) % 2]
    dataset = data.class_tasks(np.arange(8), names, num_clients=2, num_classes=2, num_support=1, num_query=1, seed=0)
    for x, y in clients(dataset):
        assert len({(int(name), str(names[row])) for name, row in zip(y, x, strict=True)}) == 2


@hypothesis.given(seed=st.integers(0, 100), cut=st.floats(0.1, 0.9))
def test_pools_partition_every_class(seed, cut):
    pools = data.split_pools(LABELS, [cut, 1.0 - cut], seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(pools)), np.arange(120))
    for pool, share in zip(pools, (cut, 1.0 - cut), strict=True):
        assert np.abs(np.bincount(LABELS[pool], minlength=6) - 20 * share).max() <= 0.5 + 1e-6


def test_pools_may_leave_examples_out():
    pools = data.split_pools(LABELS, [0.5, 0.25], seed=0)
    assert [len(pool) for pool in pools] == [60, 30]
    assert not set(pools[0]) & set(pools[1])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"num_clients": 0}, ValueError, "num_clients >= 1, got 0"),
        ({"num_classes": 7}, ValueError, r"1 <= num_classes <= 6 \(classes\), got 7"),
        ({"num_support": 0}, ValueError, "num_support >= 1, got 0"),
        ({"num_query": 0}, ValueError, "num_query >= 1, got 0"),
        ({"num_query": 19}, ValueError, r"num_support \+ num_query <= 20 .*got 21"),
        ({"pool": [0, 0]}, ValueError, "pool must name"),
        ({"pool": []}, ValueError, "pool must name"),
        ({"pool": [120]}, ValueError, "pool must hold indices between 0 and 119"),
        ({"seed": None}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_tasks_name_the_argument(changes, error, match):
    with pytest.raises(error, match=match):
        build(**changes)


@pytest.mark.parametrize(
    ("fractions", "match"),
    [
        ([0.7, 0.7], "sum"),
        ([], "sum"),
        ([0.5, 0.0], r"fractions\[1\] must be finite"),
        ([0.99, 0.01], r"fractions\[1\] must leave an example of every class"),
    ],
)
def test_bad_pools_name_the_argument(fractions, match):
    with pytest.raises(ValueError, match=match):
        data.split_pools(LABELS, fractions, seed=0)


def test_mismatched_labels():
    with pytest.raises(ValueError, match="labels must have n"):
        data.class_tasks(ROWS[:5], LABELS, num_clients=1, num_classes=1, num_support=1, num_query=1, seed=0)
