import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import robust
from cedarjax.robust import bulyan, bulyan_selection
from tests.robust import robust_oracles as oracles

NUM_CLIENTS = 12


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def compiled(f):
    rule = bulyan(f)
    return jax.jit(lambda x, w: rule.update(x, rule.init(x[0]), weights=w))


def run(f, x, weights):
    out, state = compiled(f)(jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32))
    return np.asarray(out), state.info


@pytest.mark.parametrize("f", [1, 2])
@hypothesis.given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_both_stages_by_brute_force(f, seed, weighted, attacked):
    rng = np.random.default_rng(seed)
    x = 3 + rng.normal(size=(NUM_CLIENTS, 5)).astype(np.float32)
    if attacked:
        x[:f] = 1e4 * x[0]
    there = rng.permutation(NUM_CLIENTS) < rng.integers(4 * f + 3, NUM_CLIENTS + 1)
    weights = there * (rng.integers(1, 4, NUM_CLIENTS) if weighted else 1.0)
    out, info = run(f, np.where(there[:, None], x, np.inf), weights)
    wide = x[there].astype(np.float64)
    assert info.ok
    np.testing.assert_array_equal(np.flatnonzero(info.selected), np.flatnonzero(there)[oracles.bulyan_rows(wide, f)])
    np.testing.assert_allclose(out, oracles.bulyan(wide, weights[there], f), rtol=0, atol=5e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_two_that_are_each_others_neighbour_tie_and_the_first_goes(offset):
    """Near the end one neighbour counts. Distances are the same from both sides, to the last bit."""
    for seed in range(20):
        x = offset + np.random.default_rng(seed).normal(size=(7, 4)).astype(np.float32)
        centred = jnp.asarray(x - x.mean(axis=0))
        got = bulyan_selection(centred @ centred.T, jnp.ones(7), 1)
        assert np.flatnonzero(got).tolist() == oracles.bulyan_rows(x.astype(np.float64), 1)


def test_the_same_where_rows_are_mixed():
    """Inner products of mixtures are products of three matrices, which rounding leaves a bit asymmetric."""
    rng = np.random.default_rng(0)
    rule = jax.jit(lambda x: robust.clip(2.0, bulyan(1)).update(x, robust.clip(2.0, bulyan(1)).init(x[0]))[0])
    for _ in range(10):
        x = rng.normal(size=(9, 10)).astype(np.float32)
        want = oracles.bulyan(oracles.clip(x.astype(np.float64), 2.0), np.ones(9), 1)
        np.testing.assert_allclose(rule(jnp.asarray(x)), want, rtol=0, atol=5e-6)


def test_without_attackers_it_is_the_mean():
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(NUM_CLIENTS, 5)), rng.integers(0, 4, NUM_CLIENTS)
    out, info = run(0, x, weights)
    np.testing.assert_array_equal(info.selected, weights > 0)
    np.testing.assert_allclose(out, oracles.mean(x[weights > 0], weights[weights > 0]), atol=2e-6)


@pytest.mark.parametrize("num_present", [1, 2, 5, 10])
def test_too_few_by_values_give_the_median(num_present):
    rng = np.random.default_rng(num_present)
    x = rng.normal(size=(NUM_CLIENTS, 5)).astype(np.float32)
    weights = rng.integers(1, 4, NUM_CLIENTS) * (rng.permutation(NUM_CLIENTS) < num_present)
    out, info = run(2, x, weights)
    assert not info.ok
    want = oracles.median(x[weights > 0].astype(np.float64), weights[weights > 0])
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)


def test_equal_rows():
    out, info = run(2, np.full((NUM_CLIENTS, 5), 0.3), np.ones(NUM_CLIENTS))
    np.testing.assert_allclose(out, 0.3, rtol=1e-6)
    assert int(info.selected.sum()) == 8


def test_too_few_by_shape():
    message = r"f must satisfy 4 \* f \+ 3 <= num_clients, got f = 2 and num_clients = 10"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: bulyan(2).update(x, bulyan(2).init(x))[0], jnp.ones((10, 3)))
    with pytest.raises(ValueError, match="f must be at least 0"):
        bulyan(-1)
    with pytest.raises(TypeError, match="f must be an int"):
        bulyan(1.0)


def test_double_precision(x64):
    x = np.random.default_rng(3).normal(size=(NUM_CLIENTS, 4))
    out, _ = jax.jit(lambda x: bulyan(2).update(x, bulyan(2).init(x)))(jnp.asarray(x))
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, oracles.bulyan(x, np.ones(NUM_CLIENTS), 2), rtol=0, atol=1e-12)
