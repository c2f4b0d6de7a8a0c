"""Neighbours of a trusted client, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.robust.monna import monna


def aggregate(rule, rows, weights=None, dtype=jnp.float32):
    out, state = jax.jit(rule.update)({"a": jnp.asarray(rows, dtype)}, rule.init(None), weights=weights)
    return np.asarray(out["a"], np.float64), state


def by_hand(rows, weights, f, trusted):
    here = np.flatnonzero(weights)
    near = sorted(here, key=lambda i: (np.linalg.norm(rows[i] - rows[trusted]), i))[: len(here) - f]
    return weights[near] @ rows[near] / weights[near].sum(), sorted(near)


@pytest.mark.parametrize("f, trusted", [(0, 2), (1, 0), (2, 6), (3, 3)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_against_numpy(f, trusted, scale):
    rng = np.random.default_rng(f)
    rows = rng.normal(size=(8, 5)).astype(np.float32).astype(np.float64)
    rows[[1, 5]] *= scale
    for weights in (np.ones(8), np.array([1, 2, 3, 1, 1, 1, 4, 0.5]), np.array([1, 1, 3, 1, 1, 1, 1, 0])):
        wanted, near = by_hand(rows, weights, f, trusted)
        out, state = aggregate(monna(f, trusted), rows, jnp.asarray(weights, jnp.float32))
        np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
        assert np.flatnonzero(state.info.coefficients).tolist() == near and state.info.ok


def test_double_precision(x64):
    rows = np.random.default_rng(9).normal(size=(7, 5)) + 9
    out, _ = aggregate(monna(2, 4), rows, dtype=jnp.float64)
    np.testing.assert_allclose(out, by_hand(rows, np.ones(7), 2, 4)[0], rtol=1e-13)


def test_of_equally_near_ones_the_first_are_taken():
    rows = np.array([[2.0], [0], [-2], [2], [-2], [0], [9]])
    assert np.flatnonzero(aggregate(monna(3, 1), rows)[1].info.coefficients).tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("why", ["absent", "nan", "too few"])
def test_without_the_trusted_client_it_is_the_median(why):
    rows = np.random.default_rng(5).normal(size=(6, 3)).astype(np.float32)
    weights, here = np.ones(6, np.float32), np.arange(6)
    if why == "absent":
        weights[2], here = 0, [0, 1, 3, 4, 5]
    elif why == "too few":
        weights[[0, 1]], here = 0, [2, 3, 4, 5]
    expected = np.median(np.delete(rows, 2, axis=0) if why == "nan" else rows[here], axis=0)
    if why == "nan":
        rows[2, 1] = np.nan
    out, state = aggregate(monna(2, 2), rows, jnp.asarray(weights))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert not state.info.ok and not state.info.coefficients.any()
    assert int(state.num_nonfinite) == (why == "nan")


def test_equal_rows_and_the_smallest_cohort():
    out, state = aggregate(monna(1, 2), np.full((3, 4), 7.0))
    np.testing.assert_allclose(out, 7, rtol=1e-6)
    assert state.info.ok


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="trusted must be at least 0"):
        monna(1, -1)
    with pytest.raises(ValueError, match="f must be at least 0"):
        monna(-1, 0)
    with pytest.raises(ValueError, match="0 <= trusted < num_clients, got 5 and 5"):
        aggregate(monna(1, 5), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="2 \\* f < num_clients, got f = 3 and num_clients = 6"):
        aggregate(monna(3, 0), np.zeros((6, 2)))
