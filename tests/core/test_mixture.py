"""A mixture is the rows that it stands for: every function of the client axis reads it as it reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core import LowRank, dense, gram, num_clients, sq_norms, weighted_sum
from cedarjax.core.axis import tree_structure
from cedarjax.core.columns import map_columns
from cedarjax.core.inner import centered_gram, with_inner
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import finite_rows, inner_with

NUM_CLIENTS, NUM_ROWS = 6, 4


def make_updates(dtype=np.float32, offset=0.0):
    """Row 2 is read by nobody and holds NaN."""
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(NUM_CLIENTS, 2, 3)), "b": {"c": rng.normal(size=(NUM_CLIENTS, 5))}}
    x = jax.tree.map(lambda x: (x + offset).astype(dtype), x)
    x["a"][2], x["b"]["c"][2] = np.nan, np.inf
    return jax.tree.map(jnp.asarray, x)


def make_matrix(rows=NUM_ROWS, columns=NUM_CLIENTS, seed=1, means=False):
    matrix = np.random.default_rng(seed).uniform(0.1, 1, size=(rows, columns)).astype(np.float32)
    matrix[:, 2 % columns] = 0
    matrix[0, : columns // 2] = 0
    return jnp.asarray(matrix / matrix.sum(axis=1, keepdims=True) if means else matrix)


def rows_of(matrix, updates):
    """`[K, D]` float64."""
    x = np.concatenate(
        [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(dense(updates))], 1
    )
    matrix = np.asarray(matrix, np.float64)
    return matrix @ np.where((matrix != 0).any(axis=0)[:, None], x, 0)


def flat_one(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def check(mixture, want, tol=1e-5):
    """All that can be asked of the rows, against the rows in float64."""
    count = len(want)
    assert num_clients(mixture) == mixture.num_rows == count
    assert finite_rows(mixture).tolist() == [True] * count
    close = dict(rtol=tol, atol=tol * np.abs(want).max() ** 2 * want.shape[1])
    np.testing.assert_allclose(gram(mixture), want @ want.T, **close)
    np.testing.assert_allclose(sq_norms(mixture), np.square(want).sum(axis=1), **close)
    centring = np.eye(count) - 1 / count  # about which centre the inner products are is left open
    got = centring @ np.asarray(centered_gram(mixture, jnp.ones(count, bool)), np.float64) @ centring
    np.testing.assert_allclose(got, centring @ want @ want.T @ centring, **close)
    coefficients = np.random.default_rng(5).normal(size=count).astype(np.float32)
    close = dict(rtol=tol, atol=tol * np.abs(want).max())
    np.testing.assert_allclose(flat_one(weighted_sum(jnp.asarray(coefficients), mixture)), coefficients @ want, **close)
    np.testing.assert_allclose(flat_one(map_columns(lambda x: x.max(axis=0), mixture)), want.max(axis=0), **close)
    written = dense(mixture)
    assert tree_structure(written) == tree_structure(mixture)
    np.testing.assert_allclose(rows_of(np.eye(count), written), want, **close)
    vector = jax.tree.map(lambda x: jnp.linspace(-1, 1, x[0].size, dtype=x.dtype).reshape(x[0].shape), written)
    np.testing.assert_allclose(inner_with(mixture, vector), want @ flat_one(vector), rtol=tol, atol=10 * tol)


@pytest.mark.parametrize("means", [False, True])
def test_rows_of_updates(means):
    updates, matrix = make_updates(), make_matrix(means=means)
    check(Mixture.of(matrix, updates, means=means), rows_of(matrix, updates))


@pytest.mark.parametrize("known", [False, True])
def test_rows_of_rows(known):
    """What is known of inner products is kept."""
    updates, inside, outside = make_updates(), make_matrix(), make_matrix(3, NUM_ROWS, seed=2)
    mixture = Mixture.of(inside, updates)
    if known:
        mixture = with_inner(mixture, jnp.ones(NUM_ROWS, bool))
    nested = Mixture.of(outside, mixture)
    assert (nested.inner is mixture.inner) and (nested.inner is not None) == known
    check(nested, np.asarray(outside, np.float64) @ rows_of(inside, updates))


def test_rows_far_from_the_origin_keep_their_distances():
    """Rows that are means have all of a common offset and nothing of it between them, to the last bit."""
    updates, matrix = make_updates(offset=3e4), make_matrix(means=True)
    exact = np.asarray(matrix, np.float64)
    want = rows_of(exact / exact.sum(axis=1, keepdims=True), updates)  # float32 adds up to 1 only up to rounding
    mixture = Mixture.of(make_matrix(3, NUM_ROWS, 2, means=True), Mixture.of(matrix, updates, means=True), means=True)
    np.testing.assert_array_equal(mixture.sums, 1)
    got = np.asarray(centered_gram(Mixture.of(matrix, updates, means=True), jnp.ones(NUM_ROWS, bool)), np.float64)
    distances = np.diag(got)[:, None] + np.diag(got) - 2 * got
    np.testing.assert_allclose(distances, np.square(want[:, None] - want[None]).sum(axis=2), rtol=2e-5, atol=1e-6)


def test_an_empty_row_is_no_mean():
    matrix = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    x = {"a": jnp.array([[1.0], [3.0], [jnp.nan]])}
    mixture = Mixture.of(matrix, x, means=True)
    assert mixture.sums.tolist() == [1.0, 0.0]
    np.testing.assert_allclose(gram(mixture), [[4.0, 0.0], [0.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_vector_beside_the_rows(low_rank):
    updates, matrix = make_updates(), make_matrix()
    if low_rank:
        updates["a"] = low_rank_leaf()
    vector = {"a": jnp.full((2, 3), 2.0), "b": {"c": jnp.arange(5.0)}}
    mixture = Mixture.of(matrix, updates).beside(vector)
    check(mixture, np.concatenate([rows_of(matrix, updates), flat_one(vector)[None]]))


def low_rank_leaf():
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(NUM_CLIENTS, 2, 2)), rng.normal(size=(NUM_CLIENTS, 2, 3))
    left[2] = np.nan
    return LowRank.of((jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)))


def test_rows_of_factors():
    updates, matrix = {**make_updates(), "a": low_rank_leaf()}, make_matrix()
    check(Mixture.of(matrix, updates), rows_of(matrix, updates))


def test_half_precision_is_mixed_wide():
    updates, matrix = make_updates(jnp.bfloat16), make_matrix()
    mixture = Mixture.of(matrix, updates)
    want = rows_of(matrix, updates)
    np.testing.assert_allclose(gram(mixture), want @ want.T, rtol=1e-5, atol=1e-4)
    out = weighted_sum(jnp.ones(NUM_ROWS), mixture)
    assert {x.dtype for x in jax.tree.leaves((out, dense(mixture)))} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(flat_one(out), want.sum(axis=0), rtol=2**-7, atol=2**-7)
    seen = []
    map_columns(lambda block: seen.append(block.dtype) or block.max(axis=0), mixture)
    assert set(seen) == {jnp.dtype("float32")}


def test_double_precision(x64):
    updates, matrix = make_updates(np.float64), make_matrix()
    check(Mixture.of(matrix.astype(jnp.float64), updates), rows_of(matrix, updates), tol=1e-13)


def test_it_goes_through_transformations():
    updates, matrix = make_updates(), make_matrix()
    mixture = jax.jit(lambda m, u: with_inner(Mixture.of(m, u), jnp.ones(NUM_ROWS, bool)))(matrix, updates)
    check(mixture, rows_of(matrix, updates))
    stretched = jax.vmap(lambda s: gram(Mixture.of(s * matrix, updates)))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(stretched[1], 4 * stretched[0], rtol=1e-5)
