"""Exact 2-means on a line, against all assignments of clients to clusters."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from cedarjax.robust import two_means


def squared_error(scores, weights, labels):
    total = 0.0
    for label in (0, 1):
        s, w = scores[labels == label], weights[labels == label]
        if w.sum() > 0:
            total += (w * (s - (w * s).sum() / w.sum()) ** 2).sum()
    return total


def best_error(scores, weights):
    """Least squared error over every assignment, not over cuts alone."""
    assignments = itertools.product([0, 1], repeat=len(scores))
    return min(squared_error(scores, weights, np.array(labels)) for labels in assignments)


def check(scores, weights, labels, centers, rtol):
    present = (weights > 0) & np.isfinite(scores)
    labels, centers = np.asarray(labels), np.asarray(centers, np.float64)
    np.testing.assert_array_equal(labels[~present], 0)
    s, w, labels = scores[present].astype(np.float64), weights[present].astype(np.float64), labels[present]
    if len(s) == 0:
        np.testing.assert_array_equal(centers, 0)
    elif len(np.unique(s)) == 1:
        np.testing.assert_array_equal(labels, 1)
        np.testing.assert_allclose(centers, s[0], rtol=1e-6)
    else:
        spread = s.max() - s.min()
        assert squared_error(s, w, labels) <= best_error(s, w) + rtol * w.sum() * spread**2
        assert s[labels == 0].max() < s[labels == 1].min()
        for label in (0, 1):
            chosen = labels == label
            wanted = (w[chosen] * s[chosen]).sum() / w[chosen].sum()
            np.testing.assert_allclose(centers[label], wanted, rtol=1e-5, atol=1e-6 * np.abs(s).max())


SCORES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, np.nan]), st.floats(-1, 1, width=32))


@given(
    st.lists(st.tuples(SCORES, st.sampled_from([0.0, 1.0, 1.0, 2.0, 30.0])), min_size=8, max_size=8),
    st.sampled_from([0.0, 1000.0]),
)
def test_no_assignment_is_better(clients, offset):
    scores, weights = np.array(clients, np.float32).T
    scores = scores + np.float32(offset)
    labels, centers = two_means(scores, weights)
    assert labels.dtype == jnp.int32 and labels.shape == (8,) and centers.shape == (2,)
    check(scores, weights, labels, centers, rtol=1e-5)


@pytest.mark.parametrize("num_clients", [1, 2, 3, 5])
def test_small_cohorts(num_clients):
    for seed in range(5):
        scores = np.random.default_rng(seed).normal(size=num_clients).astype(np.float32)
        weights = np.ones(num_clients, np.float32)
        check(scores, weights, *two_means(scores, weights), rtol=1e-6)


def test_scikit_learn_is_not_better_on_many_clients():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.2, 0.1, 37), rng.normal(0.7, 0.1, 63)]).astype(np.float32)
    labels, centers = two_means(scores, jnp.ones(100))
    kmeans = KMeans(n_clusters=2, n_init=10, random_state=0).fit(scores[:, None])
    np.testing.assert_allclose(np.sort(kmeans.cluster_centers_[:, 0]), centers, rtol=1e-5)
    upper = np.argmax(kmeans.cluster_centers_[:, 0])
    np.testing.assert_array_equal(labels, kmeans.labels_ == upper)


@pytest.mark.parametrize("scale", [1e-35, 1e-6, 1e35])
def test_scale_changes_no_label(scale):
    scores = np.array([0.1, 0.9, 0.15, 0.85, 0.2], np.float32)
    labels, centers = two_means((scale * scores.astype(np.float64)).astype(np.float32), jnp.ones(5))
    np.testing.assert_array_equal(labels, [0, 1, 0, 1, 0])
    np.testing.assert_allclose(np.asarray(centers, np.float64) / scale, [0.15, 0.875], rtol=1e-5)


def test_degenerate_cohorts_have_one_cluster():
    for scores, weights, wanted, center in [
        ([0.3], [1.0], [1], 0.3),
        ([0.3, 0.3, 0.3], [1.0, 2.0, 0.0], [1, 1, 0], 0.3),
        ([0.3, 0.9], [1.0, 0.0], [1, 0], 0.3),
        ([0.3, np.nan, np.inf], [1.0, 1.0, 1.0], [1, 0, 0], 0.3),
        ([0.3, 0.9], [0.0, 0.0], [0, 0], 0.0),
    ]:
        labels, centers = two_means(jnp.array(scores), jnp.array(weights))
        np.testing.assert_array_equal(labels, wanted)
        np.testing.assert_allclose(centers, center, rtol=1e-6)


def test_equally_good_cuts_take_the_lowest():
    labels, centers = two_means(jnp.array([2.0, 0.0, 1.0]), jnp.ones(3))
    np.testing.assert_array_equal(labels, [1, 0, 1])
    np.testing.assert_allclose(centers, [0, 1.5])


def test_weights_pull_the_cut():
    scores = jnp.array([0.0, 1.0, 2.1])
    np.testing.assert_array_equal(two_means(scores, jnp.ones(3))[0], [0, 0, 1])
    np.testing.assert_array_equal(two_means(scores, jnp.array([100.0, 1.0, 1.0]))[0], [0, 1, 1])


def test_absent_clients_change_nothing_and_order_does_not_matter():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=9).astype(np.float32)
    labels, centers = two_means(scores, jnp.ones(9))
    padded = np.concatenate([scores, [np.nan, np.inf, 1e30]]).astype(np.float32)
    weights = jnp.concatenate([jnp.ones(9), jnp.zeros(3)])
    order = rng.permutation(12)
    got, got_centers = two_means(padded[order], weights[order])
    np.testing.assert_array_equal(np.asarray(got)[np.argsort(order)][:9], labels)
    np.testing.assert_allclose(got_centers, centers, rtol=1e-5)


def test_jit_vmap_and_x64(x64):
    scores = np.random.default_rng(0).normal(size=(4, 6))
    labels, centers = jax.jit(jax.vmap(two_means))(scores, jnp.ones((4, 6)))
    assert labels.dtype == jnp.int32 and centers.dtype == jnp.float64
    for i in range(4):
        check(scores[i], np.ones(6), labels[i], centers[i], rtol=1e-12)


def test_bad_shapes():
    for scores, weights in (
        (jnp.ones(3), jnp.ones(4)),
        (jnp.ones((2, 2)), jnp.ones((2, 2))),
        (jnp.ones(0), jnp.ones(0)),
    ):
        with pytest.raises(ValueError, match=r"scores and weights must be \[C\] with one C >= 1"):
            two_means(scores, weights)
