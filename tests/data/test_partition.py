"""Partitioners: exact partitions, their limits in alpha, repair and errors."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cedarjax import data

PARTITIONERS = {
    "iid": lambda labels, num_clients, seed: data.iid(len(labels), num_clients, seed=seed),
    "dirichlet_by_class": lambda labels, num_clients, seed: data.dirichlet_by_class(
        labels, num_clients, alpha=0.3, seed=seed
    ),
    "dirichlet_by_client": lambda labels, num_clients, seed: data.dirichlet_by_client(
        labels, num_clients, alpha=0.3, seed=seed
    ),
    "shards": lambda labels, num_clients, seed: data.shards(labels, num_clients, shards_per_client=1, seed=seed),
    "quantity_skew": lambda labels, num_clients, seed: data.quantity_skew(
        len(labels), num_clients, alpha=0.3, seed=seed
    ),
}
BALANCED = np.random.default_rng(7).permutation(np.repeat(np.arange(10), 400))


def assert_partition(parts, num_examples, num_clients):
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and part.ndim == 1 and len(part) > 0 for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


def class_shares(parts, labels):
    """`[N, K]` share of each class inside each client."""
    table = np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])
    return table / table.sum(axis=1, keepdims=True)


def effective_classes(parts, labels):
    """`[N]` inverse Simpson index: the number of equally frequent classes that would be as concentrated."""
    return 1.0 / (class_shares(parts, labels) ** 2).sum(axis=1)


@pytest.mark.parametrize("name", PARTITIONERS)
@hypothesis.given(
    labels=st.lists(st.integers(-3, 4), min_size=1, max_size=60),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32),
)
def test_exact_partition_without_empty_clients(name, labels, share, seed):
    num_clients = max(1, round(share * len(labels)))
    assert_partition(PARTITIONERS[name](np.array(labels), num_clients, seed), len(labels), num_clients)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_seed_decides_everything(name):
    first, again = (PARTITIONERS[name](BALANCED, 7, 3) for _ in range(2))
    other = PARTITIONERS[name](BALANCED, 7, 4)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_a_generator_is_advanced_and_an_equal_seed_is_the_same_stream(name):
    rng = np.random.default_rng(3)
    first, second = PARTITIONERS[name](BALANCED, 7, rng), PARTITIONERS[name](BALANCED, 7, rng)
    for a, b in zip(first, PARTITIONERS[name](BALANCED, 7, 3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_rows_of_a_client_are_not_sorted_by_class(name):
    labels = np.repeat([0, 1], 500)
    parts = PARTITIONERS[name](labels, 2, 0) if name != "shards" else data.shards(labels, 1, seed=0)
    for part in parts:
        share = labels[part].mean()
        half = len(part) // 2
        # Hypergeometric: the share in the first half is off by at most 5 standard deviations.
        deviation = np.sqrt(share * (1 - share) / half)
        assert abs(labels[part[:half]].mean() - share) <= 5 * deviation


@pytest.mark.parametrize("name", ["iid", "dirichlet_by_client"])
def test_equal_sizes(name):
    sizes = sorted(len(part) for part in PARTITIONERS[name](BALANCED[:101], 7, 0))
    assert sizes == [14, 14, 14, 14, 15, 15, 15]


@pytest.mark.parametrize("alpha", [1e5, 1e200])
def test_dirichlet_by_class_nears_equal_shares_as_alpha_grows(alpha):
    parts = data.dirichlet_by_class(BALANCED, 8, alpha=alpha, seed=0)
    # A share of Dir_8(1e5) has standard deviation 3.7e-4, 0.15 of 400 examples; two roundings add at most 1.
    table = np.stack([np.bincount(BALANCED[part], minlength=10) for part in parts])
    assert np.abs(table - 50).max() <= 3


@pytest.mark.parametrize("alpha", [1e-3, 1e-300, 5e-324])
def test_dirichlet_by_class_gives_each_class_to_one_client_as_alpha_vanishes(alpha):
    parts = data.dirichlet_by_class(BALANCED, 8, alpha=alpha, seed=0)
    assert_partition(parts, len(BALANCED), 8)
    largest = np.stack([np.bincount(BALANCED[part], minlength=10) for part in parts]).max(axis=0)
    # At most 7 examples leave for empty clients. At alpha 1e-3 a class is split noticeably about once in fifty times.
    assert np.sort(largest)[2:].min() >= 400 - 7


def test_dirichlet_by_class_has_the_moments_of_its_proportions():
    alpha, num_clients, num_classes = 0.5, 4, 2000
    labels = np.repeat(np.arange(num_classes), 100)
    parts = data.dirichlet_by_class(labels, num_clients, alpha=alpha, seed=0)
    shares = np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts]) / 100
    # Var[p] = a (A - a) / (A^2 (A + 1)); the estimate from 2000 classes has a relative error near 2 %.
    total = alpha * num_clients
    variance = alpha * (total - alpha) / (total**2 * (total + 1))
    np.testing.assert_allclose(shares.mean(axis=1), 1 / num_clients, atol=4 * np.sqrt(variance / num_classes))
    np.testing.assert_allclose(shares.var(axis=1), variance, rtol=0.12)


def test_dirichlet_by_client_nears_the_whole_set_as_alpha_grows():
    parts = data.dirichlet_by_client(BALANCED, 10, alpha=1e6, seed=0)
    table = np.stack([np.bincount(BALANCED[part], minlength=10) for part in parts])
    # Nine clients draw freely: chi-square with 9 degrees of freedom each, 81 in all with standard deviation 12.7. One
    # gets what the others left, nine times their variance.
    chi_square = np.sort(((table - 40.0) ** 2 / 40.0).sum(axis=1))
    assert 81 - 5 * 12.7 < chi_square[:9].sum() < 81 + 5 * 12.7
    assert chi_square[9] < 9 * (9 + 5 * 4.3)


@pytest.mark.parametrize("alpha", [1e-3, 1e-300])
def test_dirichlet_by_client_gives_single_classes_as_alpha_vanishes(alpha):
    parts = data.dirichlet_by_client(BALANCED, 40, alpha=alpha, seed=0)
    # 400 examples a class, 100 a client: every class serves four clients exactly, so nothing is left over to mix.
    assert (effective_classes(parts, BALANCED) < 1.1).mean() >= 0.95


def test_dirichlet_by_client_skew_falls_with_alpha():
    means = [
        effective_classes(data.dirichlet_by_client(BALANCED, 40, alpha=alpha, seed=1), BALANCED).mean()
        for alpha in (0.1, 1.0, 10.0, 1000.0)
    ]
    assert means == sorted(means)
    assert means[0] < 3.0 < 8.0 < means[-1]


def test_dirichlet_by_client_follows_unequal_class_frequencies():
    labels = np.repeat([0, 1], [3600, 400])
    shares = class_shares(data.dirichlet_by_client(labels, 10, alpha=1e6, seed=0), labels)[:, 1]
    assert np.abs(shares - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 400)


def test_shards_bound_the_classes_of_a_client():
    parts = data.shards(BALANCED, 20, shards_per_client=2, seed=0)
    # 40 shards of 100 examples and classes of 400: no shard crosses a class.
    assert all(len(part) == 200 and len(np.unique(BALANCED[part])) <= 2 for part in parts)


def test_natural_follows_the_ids_and_keeps_the_order():
    parts = data.natural(np.array(["ben", "ann", "ben", "cid", "ann"]))
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2], [3]]
    assert [part.tolist() for part in data.natural([30, -1, 30])] == [[1], [0, 2]]


def test_quantity_skew_limits():
    even = [len(part) for part in data.quantity_skew(4000, 8, alpha=1e8, seed=0)]
    assert max(even) - min(even) <= 2
    skewed = [len(part) for part in data.quantity_skew(4000, 8, alpha=1e-3, min_examples=3, seed=0)]
    assert min(skewed) == 3 and max(skewed) > 3900 and sum(skewed) == 4000


@hypothesis.given(min_examples=st.integers(1, 6), seed=st.integers(0, 1000))
def test_repair_reaches_the_minimum_even_without_slack(min_examples, seed):
    labels = np.arange(10 * min_examples) % 3
    parts = data.dirichlet_by_class(labels, 10, alpha=0.01, min_examples=min_examples, seed=seed)
    assert_partition(parts, len(labels), 10)
    assert {len(part) for part in parts} == {min_examples}


def test_repair_takes_from_the_largest_clients_only():
    parts = data.quantity_skew(1000, 50, alpha=0.05, min_examples=5, seed=0)
    untouched = data.quantity_skew(1000, 50, alpha=0.05, seed=0)
    before, after = (np.array([len(part) for part in p]) for p in (untouched, parts))
    lowered = after < before
    assert lowered.any()
    # Water level: whoever gave stays at least as large, less one, as anybody who did not give.
    assert after[lowered].min() >= after[~lowered & (after > 5)].max(initial=0) - 1


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: data.iid(2, 3, seed=0), ValueError, r"num_clients \* min_examples <= 2 .*got 3 \* 1"),
        (lambda: data.iid(0, 1, seed=0), ValueError, "num_examples >= 1, got 0"),
        (lambda: data.iid(5, 0, seed=0), ValueError, "num_clients >= 1, got 0"),
        (lambda: data.iid(5, 2.0, seed=0), TypeError, "num_clients must be an integer, got 2.0"),
        (lambda: data.iid(5, 2, seed=None), TypeError, "seed must be an integer"),
        (lambda: data.quantity_skew(9, 5, alpha=1.0, min_examples=2, seed=0), ValueError, r"got 5 \* 2"),
        (lambda: data.quantity_skew(9, 5, alpha=1.0, min_examples=0, seed=0), ValueError, "min_examples >= 1, got 0"),
        (lambda: data.quantity_skew(9, 5, alpha=0.0, seed=0), ValueError, "alpha > 0, got 0.0"),
        (lambda: data.dirichlet_by_class([0, 1], 3, alpha=1.0, seed=0), ValueError, r"got 3 \* 1"),
        (lambda: data.dirichlet_by_class([0, 1], 1, alpha=np.nan, seed=0), ValueError, "alpha must be finite"),
        (lambda: data.dirichlet_by_class([0.5, 1.0], 1, alpha=1.0, seed=0), TypeError, "labels must be discrete"),
        (lambda: data.dirichlet_by_class([[0, 1]], 1, alpha=1.0, seed=0), ValueError, r"labels must have shape \[n\]"),
        (lambda: data.dirichlet_by_client([0, 1], 3, alpha=1.0, seed=0), ValueError, r"got 3 \* 1"),
        (lambda: data.dirichlet_by_client([0, 1], 1, alpha=-1.0, seed=0), ValueError, "alpha > 0, got -1.0"),
        (lambda: data.shards([0, 1, 2], 2, seed=0), ValueError, r"num_clients \* shards_per_client <= 3"),
        (lambda: data.natural([]), ValueError, "client_id must have shape"),
        (lambda: data.natural([0.0, np.nan]), TypeError, "client_id must be discrete"),
    ],
)
def test_bad_input_names_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
