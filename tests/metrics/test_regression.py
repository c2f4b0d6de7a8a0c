"""Scores against scikit-learn in float64, which sees nothing but the present rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from cedarjax.metrics import Moments, moments


@jax.jit
def score(predictions, targets, mask):
    return moments(predictions, targets, mask).summarise()


def oracle(predictions, targets):
    predictions, targets = np.float64(predictions), np.float64(targets)
    return [
        error(targets, predictions)
        for error in (metrics.mean_squared_error, metrics.mean_absolute_error, metrics.r2_score)
    ]


def examples(seed, shape, offset=0.0):
    rng = np.random.default_rng(seed)
    targets = rng.normal(offset, 1.0, shape)
    predictions = targets + rng.normal(0.0, 0.5, shape)
    mask = rng.random(shape[0]) < 0.7
    mask[:2] = True
    return np.float32(predictions), np.float32(targets), mask


@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(12,), (12, 1), (12, 3)]))
def test_scores_agree_with_scikit_learn(seed, shape):
    predictions, targets, mask = examples(seed, shape)
    expected = oracle(predictions[mask], targets[mask])
    np.testing.assert_allclose(score(predictions, targets, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_column_meets_a_vector():
    predictions, targets, mask = examples(0, (10,))
    np.testing.assert_array_equal(score(predictions[:, None], targets, mask), score(predictions, targets, mask))


@pytest.mark.parametrize("num_parts", [1, 4])
def test_a_large_offset_does_not_cancel(num_parts):
    predictions, targets, _ = examples(3, (400,), offset=5000.0)
    parts = [
        moments(jnp.asarray(p), jnp.asarray(t))
        for p, t in zip(np.split(predictions, num_parts), np.split(targets, num_parts), strict=True)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    np.testing.assert_allclose(merged.summarise(), oracle(predictions, targets), rtol=1e-3)


@pytest.mark.parametrize("cut", [0, 1, 13, 30])
def test_merging_batches_is_scoring_them_at_once(cut):
    predictions, targets, mask = map(jnp.asarray, examples(1, (30, 2)))
    if cut in (0, 30):  # a part of rows that are all absent
        parts = [moments(predictions, targets, flag) for flag in (mask, jnp.zeros_like(mask))][:: 1 if cut else -1]
    else:
        parts = [moments(predictions[s], targets[s], mask[s]) for s in (slice(cut), slice(cut, None))]
    merged, whole = parts[0].merge(parts[1]), moments(predictions, targets, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, whole)


def test_clients_are_scored_under_vmap_and_pooled():
    predictions, targets, mask = map(jnp.asarray, examples(2, (30,)))
    mask = mask.at[10:20].set(False)
    stacked = jax.vmap(moments)(*(a.reshape(3, 10) for a in (predictions, targets, mask)))
    each = jax.vmap(Moments.summarise)(stacked)
    for client in (0, 2):
        rows = np.flatnonzero(mask[10 * client : 10 * client + 10]) + 10 * client
        expected = oracle(predictions[rows], targets[rows])
        np.testing.assert_allclose([value[client] for value in each], expected, rtol=1e-4)
    assert [float(value[1]) for value in each] == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(stacked.pool().summarise(), oracle(predictions[mask], targets[mask]), rtol=1e-4)


@pytest.mark.parametrize(("error", "r2"), [(0.0, 1.0), (0.25, 0.0)])
def test_a_constant_target_scores_as_in_scikit_learn(error, r2):
    targets = jnp.full(7, 0.1)
    scores = moments(targets + error, targets).summarise()
    assert metrics.r2_score(np.full(7, 0.5), np.full(7, 0.5) + error) == r2 == float(scores.r2)
    parts = moments(targets[:3] + error, targets[:3]).merge(moments(targets[3:] + error, targets[3:]))
    assert float(parts.summarise().r2) == r2


def test_one_example_and_none():
    one = moments(jnp.array([3.0, 9.0]), jnp.array([1.0, 9.0]), jnp.array([True, False])).summarise()
    assert [float(value) for value in one] == [4.0, 2.0, 0.0]
    none = moments(jnp.ones(2), jnp.zeros(2), jnp.zeros(2, bool)).summarise()
    assert [float(value) for value in none] == [0.0, 0.0, 0.0]


def test_rows_outside_the_mask_are_not_read():
    predictions, targets, mask = examples(4, (12, 2))
    mask[0] = False
    dirty = [np.where(mask[:, None], a, bad) for a, bad in ((predictions, np.nan), (targets, np.inf))]
    clean = moments(jnp.asarray(predictions[mask]), jnp.asarray(targets[mask]))
    masked = moments(*map(jnp.asarray, dirty), jnp.asarray(mask, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), masked, clean)


def test_dtypes(x64):
    half = moments(jnp.ones(3, jnp.bfloat16), jnp.zeros(3, jnp.float32))
    assert all(leaf.dtype == jnp.float32 for leaf in [*half, *half.summarise()])
    double = moments(jnp.ones(3), jnp.zeros(3))
    assert all(value.dtype == jnp.float64 for value in [*double[1:], *double.summarise()])


@pytest.mark.parametrize(
    ("predictions", "targets", "mask"),
    [
        ((4,), (5,), None),
        ((4, 2), (4,), None),
        ((2, 2), (4,), None),
        ((4, 1, 1), (4, 1, 1), None),
        ((4,), (4,), (4, 1)),
    ],
)
def test_bad_shapes(predictions, targets, mask):
    with pytest.raises(ValueError, match="must"):
        moments(jnp.ones(predictions), jnp.ones(targets), None if mask is None else jnp.ones(mask))
