"""Support and query splits, training and held-out clients."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cedarjax import data


def make(counts, num_classes=3, seed=0):
    """A federation whose `x` numbers the rows, sorted by label inside each client."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.sort(rng.integers(0, num_classes, count)) for count in counts])
    examples = {"x": np.arange(sum(counts)), "y": labels}
    return examples, data.federated_dataset(examples, np.repeat(np.arange(len(counts)), counts))


def rows_of(dataset, client):
    start, stop = np.asarray(dataset.offsets)[client : client + 2]
    return np.asarray(dataset.examples["x"])[start:stop]


@hypothesis.given(
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=6),
    fraction=st.floats(0.01, 0.99),
    order=st.sampled_from(["shuffle", "keep"]),
)
def test_every_client_keeps_its_rows_and_both_parts(counts, fraction, order):
    examples, dataset = make(counts)
    split = data.split_support_query(dataset, support_fraction=fraction, order=order, seed=1)
    np.testing.assert_array_equal(split.offsets, dataset.offsets)
    assert split.max_examples == dataset.max_examples
    for client, count in enumerate(counts):
        np.testing.assert_array_equal(np.sort(rows_of(split, client)), rows_of(dataset, client))
        assert split.num_support[client] == min(max(int(count * fraction + 1e-9), 1), count - 1)
    np.testing.assert_array_equal(split.examples["y"], examples["y"][np.asarray(split.examples["x"])])


@pytest.mark.parametrize(("fraction", "count", "expected"), [(0.5, 5, 2), (0.29, 100, 29), (0.7, 10, 7), (0.9, 2, 1)])
def test_the_fraction_rounds_down(fraction, count, expected):
    split = data.split_support_query(make([count])[1], support_fraction=fraction, seed=0)
    assert split.num_support.tolist() == [expected]


def test_half_is_the_default():
    split = data.split_support_query(make([10, 4])[1], seed=0)
    assert split.num_support.tolist() == [5, 2]


def test_keep_leaves_the_order():
    _, dataset = make([4, 6])
    split = data.split_support_query(dataset, num_support=2, order="keep")
    np.testing.assert_array_equal(split.examples["x"], dataset.examples["x"])
    assert split.num_support.tolist() == [2, 2]


def test_shuffling_gives_both_halves_the_same_classes():
    _, dataset = make([1000], num_classes=2)
    split = data.split_support_query(dataset, seed=0)
    labels = np.asarray(split.examples["y"])
    # Half of 1000 rows near p = 0.5: five standard deviations of a hypergeometric share are 0.08.
    assert abs(labels[:500].mean() - labels[500:].mean()) < 2 * 0.08
    kept = np.asarray(data.split_support_query(dataset, order="keep").examples["y"])
    assert kept[:500].mean() < 0.1 and kept[500:].mean() > 0.9


def test_shuffle_is_uniform_over_positions():
    _, dataset = make([5, 3])
    first = [int(rows_of(data.split_support_query(dataset, seed=seed), 0)[0]) for seed in range(1000)]
    counts = np.bincount(first, minlength=5)
    assert len(counts) == 5
    np.testing.assert_allclose(counts, 200, atol=5 * np.sqrt(1000 * 0.2 * 0.8))


def test_seed_decides_the_split():
    _, dataset = make([20, 20])
    a, b, c = (np.asarray(data.split_support_query(dataset, seed=seed).examples["x"]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("order", ["shuffle", "keep"])
@hypothesis.given(
    counts=st.lists(st.integers(8, 20), min_size=1, max_size=5), shots=st.integers(1, 2), seed=st.integers(0, 50)
)
def test_per_class_takes_the_first_of_each_class(order, counts, shots, seed):
    _, dataset = make(counts, seed=seed)
    split = data.split_support_query(dataset, per_class=shots, order=order, seed=seed)
    labels = np.asarray(split.examples["y"])
    for client, count in enumerate(counts):
        start, size = int(dataset.offsets[client]), int(split.num_support[client])
        mine = labels[start : start + count]
        expected = np.minimum(np.bincount(mine, minlength=3), shots)
        np.testing.assert_array_equal(np.bincount(mine[:size], minlength=3), expected)
        np.testing.assert_array_equal(np.sort(rows_of(split, client)), rows_of(dataset, client))
        if order == "keep":
            original = rows_of(dataset, client)
            all_labels = np.asarray(dataset.examples["y"])
            firsts = [row for c in range(3) for row in original[all_labels[original] == c][:shots]]
            np.testing.assert_array_equal(rows_of(split, client)[:size], np.sort(firsts))
            np.testing.assert_array_equal(rows_of(split, client)[size:], np.setdiff1d(original, firsts))


def test_per_class_reads_labels_where_it_is_told():
    examples = (np.arange(4.0), np.array([7, 7, 9, 9]))
    dataset = data.federated_dataset(examples, np.zeros(4, int))
    split = data.split_support_query(dataset, per_class=1, label_fn=lambda e: e[1], order="keep")
    np.testing.assert_array_equal(split.examples[0], [0, 2, 1, 3])


@hypothesis.given(
    num_clients=st.integers(3, 60),
    held_out=st.floats(0.01, 0.45),
    validation=st.one_of(st.none(), st.floats(0.01, 0.2)),
    seed=st.integers(0, 100),
)
def test_split_ids_partitions_the_clients(num_clients, held_out, validation, seed):
    parts = data.split_ids(num_clients, held_out=held_out, validation=validation, seed=seed)
    assert len(parts) == (2 if validation is None else 3)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_clients))
    for part, share in zip(parts[1:], (held_out, validation), strict=False):
        assert len(part) == max(1, int(num_clients * share + 0.5))
        assert (np.diff(part) > 0).all()


def test_split_ids_with_names_and_shares():
    train, held_out, validation = data.split_ids(10, held_out=0.2, validation=[3, 0], seed=0)
    assert validation.tolist() == [0, 3] and len(held_out) == 2 and len(train) == 6
    assert not set(held_out) & {0, 3}
    again = data.split_ids(10, held_out=0.2, validation=[3, 0], seed=0)
    np.testing.assert_array_equal(held_out, again[1])


def test_held_out_clients_are_drawn_uniformly():
    drawn = [int(data.split_ids(5, held_out=0.2, seed=seed)[1][0]) for seed in range(1000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5), 200, atol=5 * np.sqrt(1000 * 0.2 * 0.8))


def test_split_clients_follows_split_ids():
    _, dataset = make([2, 9, 4, 3, 5])
    dataset = data.split_support_query(dataset, seed=0)
    parts = data.split_clients(dataset, held_out=0.4, validation=0.2, seed=3)
    ids = data.split_ids(5, held_out=0.4, validation=0.2, seed=3)
    assert len(parts) == 3
    for part, chosen in zip(parts, ids, strict=True):
        assert part.num_clients == len(chosen)
        for row, client in enumerate(chosen):
            np.testing.assert_array_equal(rows_of(part, row), rows_of(dataset, client))
            assert part.num_support[row] == dataset.num_support[client]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"support_fraction": 0.5, "num_support": 1, "seed": 0}, ValueError, "at most one of"),
        ({"support_fraction": 1.0, "seed": 0}, ValueError, "0 < support_fraction < 1, got 1.0"),
        ({"support_fraction": np.nan, "seed": 0}, ValueError, "0 < support_fraction < 1, got nan"),
        ({"num_support": 0, "seed": 0}, ValueError, "num_support >= 1, got 0"),
        ({"num_support": 3, "seed": 0}, ValueError, "client 1 must keep at least one query .* 3 examples"),
        ({"per_class": 0, "seed": 0}, ValueError, "per_class >= 1, got 0"),
        ({"per_class": 9, "seed": 0}, ValueError, "client 0 must keep at least one query"),
        ({"per_class": 1, "seed": 0, "label_fn": lambda e: e["x"][:2]}, ValueError, "label_fn must return"),
        ({"per_class": 1, "seed": 0, "label_fn": lambda e: np.asarray(e["x"]) * 0.5}, TypeError, "must be discrete"),
        ({"order": "sort", "seed": 0}, ValueError, "order must be one of"),
        ({}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_support_splits_name_the_argument(arguments, error, match):
    with pytest.raises(error, match=match):
        data.split_support_query(make([6, 3])[1], **arguments)


def test_a_client_of_one_example_cannot_be_split():
    with pytest.raises(ValueError, match="client 1 must keep at least one query example, got 1 examples"):
        data.split_support_query(make([6, 1])[1], seed=0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"held_out": 0.0, "seed": 0}, ValueError, "0 < held_out < 1, got 0.0"),
        ({"held_out": 2, "seed": 0}, TypeError, "held_out must be a share"),
        ({"held_out": 0.99, "seed": 0}, ValueError, "left to train"),
        ({"held_out": 0.5, "validation": 0.5, "seed": 0}, ValueError, "left to train"),
        ({"held_out": [0, 4]}, ValueError, "held_out must hold indices between 0 and 3"),
        ({"held_out": [0, 0]}, ValueError, "held_out must name"),
        ({"held_out": []}, ValueError, "held_out must name"),
        ({"held_out": [0], "validation": [1, 0]}, ValueError, "validation must name .* already taken"),
        ({"held_out": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_client_splits_name_the_argument(arguments, error, match):
    with pytest.raises(error, match=match):
        data.split_clients(make([2, 2, 2, 2])[1], **arguments)
