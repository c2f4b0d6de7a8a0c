"""Dissimilarity matrices and their agreement, against numpy in float64 and the published correlation restated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.robust import euclidean_rdm, rdm, rdm_similarity


def numpy_rdm(logits):
    x = np.asarray(logits, np.float64)
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    u = p / np.linalg.norm(p, axis=1, keepdims=True)
    return 1 - u @ u.T


def published_correlation(similarity_a, similarity_b):
    a, b = (x - x.sum() / len(x) for x in (similarity_a, similarity_b))
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def pearson_above_the_diagonal(a, b):
    above = np.triu_indices(len(a), 1)
    return np.corrcoef(np.asarray(a, np.float64)[above], np.asarray(b, np.float64)[above])[0, 1]


def make_logits(seed, num_stimuli=10, num_classes=7, scale=2.0):
    return (scale * np.random.default_rng(seed).normal(size=(num_stimuli, num_classes))).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_rdm_formula(scale, transform):
    logits = make_logits(0, scale=scale)
    got = np.asarray(transform(rdm)(logits))
    np.testing.assert_allclose(got, numpy_rdm(logits), rtol=1e-5, atol=1e-14)
    np.testing.assert_array_equal(got, got.T)
    np.testing.assert_array_equal(np.diag(got), 0)
    assert got.min() >= 0 and got.max() <= 1 + 1e-6


def test_rdm_keeps_the_digits_of_nearly_equal_rows():
    # Rows differ by 5e-4: rounding the unit vectors to float32 costs 3e-4 of their distance. 1 - cos loses half.
    logits = np.array([[0.0, 0.0, 0.0], [1e-3, 0.0, 0.0], [0.0, 2e-3, 0.0]], np.float32)
    np.testing.assert_allclose(rdm(logits), numpy_rdm(logits), rtol=1e-3, atol=1e-15)


@pytest.mark.parametrize("logits", [np.full((4, 3), 1e30), np.array([[1e30, -1e30], [-1e30, 1e30], [0, 0]])])
def test_extreme_logits_stay_finite(logits):
    got = np.asarray(rdm(logits.astype(np.float32)))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, numpy_rdm(logits), atol=1e-6)


def test_euclidean_rdm_formula():
    outputs = make_logits(1, num_classes=1)
    got = np.asarray(euclidean_rdm(outputs))
    np.testing.assert_allclose(got, np.abs(outputs - outputs.T), rtol=1e-6)
    np.testing.assert_array_equal(np.diag(got), 0)


@pytest.mark.parametrize("fun", [rdm, euclidean_rdm])
def test_rdm_shapes_dtypes_and_transformations(fun):
    logits = np.stack([make_logits(i) for i in range(3)])
    np.testing.assert_allclose(jax.jit(jax.vmap(fun))(logits), np.stack([fun(x) for x in logits]), rtol=1e-5)
    assert fun(logits[0].astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"\[S, K\], got the shape \(3, 10, 7\)"):
        fun(logits)


@pytest.mark.parametrize("seed", range(6))
def test_similarity_is_pearson_above_the_diagonal(seed):
    a, b = rdm(make_logits(seed)), rdm(make_logits(seed + 100))
    wanted = pearson_above_the_diagonal(a, b)
    np.testing.assert_allclose(rdm_similarity(a, b), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rdm_similarity(b, a), wanted, rtol=1e-5, atol=1e-7)
    spoiled = a.at[jnp.diag_indices(10)].set(7.0).at[jnp.tril_indices(10, -1)].set(-3.0)
    np.testing.assert_allclose(rdm_similarity(spoiled, b), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_compat_is_the_published_number(seed):
    logits_a, logits_b = make_logits(seed), make_logits(seed + 100)
    a, b = numpy_rdm(logits_a), numpy_rdm(logits_b)
    got = rdm_similarity(rdm(logits_a), rdm(logits_b), compat=True)
    np.testing.assert_allclose(got, published_correlation(1 - a, 1 - b), rtol=1e-5)
    assert got > 0.9 > rdm_similarity(rdm(logits_a), rdm(logits_b))  # unrelated models that it holds to be alike


def test_similarity_limits():
    a = rdm(make_logits(0))
    np.testing.assert_allclose(rdm_similarity(a, a), 1, rtol=1e-6)
    np.testing.assert_allclose(rdm_similarity(a, 3 - 2 * a), -1, rtol=1e-6)
    np.testing.assert_allclose(rdm_similarity(1e-20 * a, 1e15 * a), 1, rtol=1e-5)
    np.testing.assert_allclose(rdm_similarity(a, a, compat=True), 1, rtol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 3e38])
def test_a_constant_triangle_scores_zero(constant):
    a, flat = rdm(make_logits(0)), jnp.full((10, 10), constant)
    assert rdm_similarity(a, flat) == 0 and rdm_similarity(flat, a) == 0 and rdm_similarity(flat, flat) == 0


def test_the_smallest_matrices():
    a, b = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([[0.0, 5.0], [5.0, 0.0]])
    assert rdm_similarity(a, b) == 0  # one pair has no correlation
    assert rdm_similarity(jnp.ones((2, 2)), jnp.ones((2, 2)), compat=True) == 0
    assert np.isnan(rdm_similarity(jnp.full((3, 3), jnp.nan), jnp.eye(3)))


def test_similarity_under_jit_vmap_and_x64(x64):
    a = np.stack([numpy_rdm(make_logits(i)) for i in range(3)])
    b = numpy_rdm(make_logits(9))
    for compat in (False, True):
        got = jax.jit(jax.vmap(lambda x, c=compat: rdm_similarity(x, b, c)))(a)
        wanted = [published_correlation(1 - x, 1 - b) if compat else pearson_above_the_diagonal(x, b) for x in a]
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_similarity_rejects_bad_shapes():
    with pytest.raises(ValueError, match=r"\[S, S\] with one S >= 2, got the shapes \(3, 3\) and \(4, 4\)"):
        rdm_similarity(jnp.ones((3, 3)), jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"\(1, 1\)"):
        rdm_similarity(jnp.ones((1, 1)), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        rdm_similarity(jnp.ones((3, 2)), jnp.ones((3, 2)))
