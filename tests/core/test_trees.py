import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core import accumulator, finite_rows, gram, num_clients, sq_norms, weighted_mean, weighted_sum

SHAPES = {"a": (2, 3), "b": {"c": (), "d": (4,)}}


def draw(seed, count, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def make(shape):
        return rng.normal(size=(count, *shape)).astype(dtype)

    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple)), rng


def flat(tree):
    """`[C, D]` float64: the oracle may flatten."""
    return np.concatenate([np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)], axis=1)


def flat_one(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


clients = st.sampled_from([1, 2, 5])  # few shapes: each is compiled
seeds = st.integers(0, 1000)


@hypothesis.given(seeds, clients)
def test_gram_and_norms_are_inner_products(seed, count):
    updates, _ = draw(seed, count)
    rows = flat(updates)
    np.testing.assert_allclose(gram(jax.tree.map(jnp.asarray, updates)), rows @ rows.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sq_norms(jax.tree.map(jnp.asarray, updates)), (rows**2).sum(1), rtol=1e-5)


@hypothesis.given(seeds, clients)
def test_weighted_sum_and_mean(seed, count):
    updates, rng = draw(seed, count)
    weights = rng.uniform(0, 2, count).astype(np.float32) * (rng.random(count) < 0.7)
    rows, device = flat(updates), jax.tree.map(jnp.asarray, updates)
    np.testing.assert_allclose(
        flat_one(weighted_sum(jnp.asarray(weights), device)), weights @ rows, rtol=1e-5, atol=1e-5
    )
    total = weights.sum(dtype=np.float64)
    want = weights @ rows / total if total > 0 else np.zeros(rows.shape[1])
    np.testing.assert_allclose(flat_one(weighted_mean(device, jnp.asarray(weights))), want, rtol=1e-5, atol=1e-5)


@hypothesis.given(seeds, clients)
def test_weighted_mean_by_layer(seed, count):
    updates, rng = draw(seed, count)
    leaves, structure = jax.tree.flatten(updates)
    weights = [rng.uniform(0, 2, count).astype(np.float32) * (rng.random(count) < 0.6) for _ in leaves]
    got = weighted_mean(
        jax.tree.map(jnp.asarray, updates), jax.tree.unflatten(structure, list(map(jnp.asarray, weights)))
    )
    for out, x, w in zip(jax.tree.leaves(got), leaves, weights, strict=True):
        want = np.tensordot(w.astype(np.float64), x, axes=1) / (w.sum() or 1.0)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_of_coefficient_zero_may_hold_anything(bad):
    updates = {"a": jnp.array([[1.0, 2.0], [bad, 5.0], [3.0, bad]]), "b": jnp.array([bad, bad, 4.0])}
    got = weighted_sum({"a": jnp.array([2.0, 0.0, 0.0]), "b": jnp.array([0.0, 0.0, 0.5])}, updates)
    np.testing.assert_array_equal(got["a"], [2.0, 4.0])
    np.testing.assert_array_equal(got["b"], 2.0)


def test_absent_rows_are_masked_in_blocks(monkeypatch):
    monkeypatch.setattr("cedarjax.core.trees._BLOCK", 3 * 64)
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 29), "b": (64,), "c": (0,), "d": (65,)}
    updates = {name: rng.normal(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    want = {name: 2.0 * x[0].astype(np.float64) - x[2] for name, x in updates.items()}
    for x in updates.values():
        x[1] = np.nan
    got = weighted_sum(jnp.array([2.0, 0.0, -1.0]), jax.tree.map(jnp.asarray, updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_rows_that_count_keep_their_nan():
    got = weighted_sum(jnp.array([1.0, 1.0]), {"a": jnp.array([[1.0, 2.0], [jnp.nan, 5.0]])})
    np.testing.assert_array_equal(got["a"], [np.nan, 7.0])


def test_finite_rows():
    updates = {"a": jnp.array([[1.0, jnp.nan], [1.0, 2.0], [1.0, 2.0]]), "b": jnp.array([1.0, 1.0, -jnp.inf])}
    assert finite_rows(updates).tolist() == [False, True, False]


def test_narrow_dtypes_are_summed_wide():
    count = 1000  # a bfloat16 sum of ones stops at 256
    ones = {"a": jnp.ones((count, 3), jnp.bfloat16)}
    got = weighted_sum(jnp.ones(count), ones)["a"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), 1000.0)
    assert sq_norms({"a": jnp.ones((2, count), jnp.bfloat16)}).tolist() == [1000.0, 1000.0]
    assert gram(ones).dtype == jnp.float32


def test_wide_dtypes_stay_wide(x64):
    updates, _ = draw(0, 5, np.float64)
    rows, device = flat(updates), jax.tree.map(jnp.asarray, updates)
    weights = jnp.arange(5, dtype=jnp.float32)
    np.testing.assert_allclose(flat_one(weighted_sum(weights, device)), np.arange(5) @ rows, rtol=1e-13)
    np.testing.assert_allclose(gram(device), rows @ rows.T, rtol=1e-13, atol=1e-13)
    mixed = {"a": device["a"], "b": device["b"]["d"].astype(jnp.bfloat16)}
    assert gram(mixed).dtype == jnp.float64
    assert {x.dtype for x in jax.tree.leaves(weighted_mean(mixed, weights))} == {
        jnp.dtype("float64"),
        jnp.dtype("bfloat16"),
    }


def test_accumulator():
    small, wide = jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.int32)
    assert accumulator(small) == accumulator(wide) == accumulator(small, jnp.ones(1)) == jnp.float32


def test_num_clients_names_the_leaf():
    assert num_clients({"a": jnp.ones((3, 2)), "b": jnp.ones(3)}) == 3
    with pytest.raises(ValueError, match="got 2 at 'b/c', expected 3"):
        num_clients({"a": jnp.ones(3), "b": {"c": jnp.ones(2)}})
    with pytest.raises(ValueError, match="scalar at 'a'"):
        num_clients({"a": jnp.ones(())})
    with pytest.raises(ValueError, match="empty tree"):
        num_clients({})


def test_coefficients_must_fit():
    updates = {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"C = 3, got the shape \(2,\)"):
        weighted_sum(jnp.ones(2), updates)
    with pytest.raises(ValueError, match="tree of"):
        weighted_mean(updates, {"a": jnp.ones(3)})
