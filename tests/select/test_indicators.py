import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cedarjax as cj
from tests.select import select_oracles as oracles

LABELS = [0, 1, 1, 2, 0, 0, 2]
OWNER = [0, 0, 1, 2, 2, 2, 1]


def make_dataset():
    return cj.data.federated_dataset(np.array(LABELS, np.int32), client_id=np.array(OWNER))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_counts_of_labels_and_examples():
    dataset = make_dataset()
    want = np.zeros((3, 3), int)
    np.add.at(want, (OWNER, LABELS), 1)
    np.testing.assert_array_equal(cj.select.label_counts(dataset, dataset.examples, num_classes=3), want)
    np.testing.assert_array_equal(cj.select.data_size(dataset), np.bincount(OWNER))


def test_labels_that_are_no_class_are_not_counted():
    dataset = make_dataset()
    labels = jnp.where(dataset.examples == 1, -1, dataset.examples)
    counts = cj.select.label_counts(dataset, labels, num_classes=2)
    assert counts.tolist() == [[1, 0], [0, 0], [2, 0]]


@given(st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=1, max_size=5))
def test_entropy_by_the_formula(counts):
    want = []
    for row in np.array(counts, np.float64):
        q = row[row > 0] / max(row.sum(), 1)
        want.append(-(q * np.log(q)).sum())
    got = cj.select.label_entropy(jnp.array(counts, jnp.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_entropy_of_even_classes_is_the_logarithm_of_their_number():
    np.testing.assert_allclose(cj.select.label_entropy(jnp.full((1, 8), 3.0)), np.log(8), rtol=1e-6)


def test_softmax_of_scaled_indicators():
    """By hand: scaled to [0, 1/2, 1] and [1, 0, 1/4]."""
    got = cj.select.softmax_indicator(jnp.array([1.0, 2.0, 3.0]), jnp.array([50, 10, 20]))
    want = (softmax(np.array([0, 0.5, 1])) + softmax(np.array([1, 0, 0.25]))) / 2
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert float(got.sum()) == pytest.approx(1, abs=1e-6)


def test_a_constant_indicator_is_uniform():
    np.testing.assert_allclose(cj.select.softmax_indicator(jnp.full(4, 7.0)), 0.25)
    np.testing.assert_allclose(cj.select.softmax_indicator(jnp.full(1, 7.0)), 1.0)


def test_indicators_that_are_drawn_by():
    dataset = make_dataset()
    counts = cj.select.label_counts(dataset, dataset.examples, num_classes=3)
    p = cj.select.softmax_indicator(cj.select.label_entropy(counts), cj.select.data_size(dataset))
    entropy = [np.log(2), np.log(2), np.log(3) - 2 / 3 * np.log(2)]
    scaled = (np.array(entropy) - min(entropy)) / (max(entropy) - min(entropy))
    want = (softmax(scaled) + softmax(np.array([0.0, 0.0, 1.0]))) / 2
    np.testing.assert_allclose(p, want, rtol=1e-5)
    selection, _ = oracles.draw(cj.select.weighted(1, p), 3, 10_000)
    assert oracles.chi_square(oracles.rows(selection.client_id), {(i,): want[i] for i in range(3)}) > 1e-3


def test_indicators_are_traced_and_keep_wider_numbers(x64):
    counts = jnp.array([[1.0, 3.0]], jnp.float64)
    entropy = jax.jit(cj.select.label_entropy)(counts)
    assert entropy.dtype == jnp.float64
    np.testing.assert_allclose(entropy, -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: cj.select.label_counts(d, d.examples, num_classes=0), ValueError, "num_classes must be at least 1"),
        (
            lambda d: cj.select.label_counts(d, jnp.zeros(3, int), num_classes=2),
            ValueError,
            r"labels must have shape \[n\] = \[7\]",
        ),
        (lambda d: cj.select.label_counts(d, jnp.zeros(7), num_classes=2), TypeError, "labels must be integers"),
        (lambda d: cj.select.label_entropy(jnp.zeros(3)), ValueError, r"counts must have shape \[N, K\], got \(3,\)"),
        (lambda d: cj.select.softmax_indicator(), ValueError, "indicators must be at least one array"),
        (lambda d: cj.select.softmax_indicator(jnp.zeros(2), jnp.zeros(3)), ValueError, r"got \(2,\), \(3,\)"),
        (lambda d: cj.select.softmax_indicator(jnp.zeros((2, 2))), ValueError, r"shape \[N\], got \(2, 2\)"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(make_dataset())
