"""The auto-weighted geometric median against numpy in float64, with a bisection for the level of the shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.robust.autogm import autogm, shares_by_distance


def shares_by_bisection(distances, weights, penalty):
    low, high = 0.0, distances.max() + penalty
    for _ in range(200):
        level = (low + high) / 2
        filled = (weights * np.maximum(level - distances, 0)).sum() / penalty
        low, high = (level, high) if filled < 1 else (low, level)
    shares = weights * np.maximum(high - distances, 0)
    return shares / shares.sum()


def by_hand(rows, weights, penalty, smoothing, num_iters, num_rounds):
    def median(shares, point):
        for _ in range(num_iters):
            pull = shares / np.maximum(np.linalg.norm(rows - point, axis=1), smoothing)
            point = pull @ rows / pull.sum()
        return point

    weights = weights / weights.mean()
    point = median(weights, weights @ rows / weights.sum())
    for _ in range(num_rounds):
        shares = shares_by_bisection(np.linalg.norm(rows - point, axis=1), weights, penalty)
        point = median(shares, point)
    return point, shares


def aggregate(rule, rows, weights=None, dtype=jnp.float32):
    out, state = jax.jit(rule.update)({"a": jnp.asarray(rows, dtype)}, rule.init(None), weights=weights)
    return np.asarray(out["a"], np.float64), state


SHARES = jax.jit(shares_by_distance)


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 7.0, 1e4]), min_size=6, max_size=6),
    st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=6, max_size=6),
    st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_shares_fill_up_to_one_level(distances, weights, penalty):
    distances, weights = np.array(distances), np.array(weights)
    got = SHARES(jnp.asarray(distances, jnp.float32), jnp.asarray(weights, jnp.float32), jnp.float32(penalty))
    if not weights.any():
        assert not got.any()
        return
    here = weights > 0
    wanted = np.zeros(6)
    wanted[here] = shares_by_bisection(distances[here], weights[here], penalty)
    np.testing.assert_allclose(got, wanted, atol=2e-4)


@pytest.mark.parametrize("penalty", [None, 2.0, 1000.0])
def test_against_numpy(x64, penalty):
    rng = np.random.default_rng(1)
    rows, weights = rng.normal(size=(8, 5)), np.array([1, 2, 1, 1, 1, 3, 1, 0.5])
    rows[:2] += 40
    out, state = aggregate(autogm(penalty, 1e-3, 30, 4), rows, jnp.asarray(weights), jnp.float64)
    wanted, shares = by_hand(rows, weights, penalty or 8.0, 1e-3, 30, 4)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-9)
    assert (shares[:2] < 1e-9).all() == (penalty != 1000.0)
    assert state.info.ok


def test_absent_and_broken_clients():
    rows = np.random.default_rng(3).normal(size=(7, 5)).astype(np.float32)
    broken, here = rows.copy(), [0, 1, 2, 4, 5]
    broken[3], broken[6, 0] = np.nan, np.inf
    out, state = aggregate(autogm(None, 1e-3, 20, 3), broken, jnp.ones(7).at[3].set(0))
    wanted, _ = by_hand(rows[here].astype(np.float64), np.ones(5), 5.0, 1e-3, 20, 3)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    assert state.num_nonfinite == 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [np.ones((4, 2)), np.zeros((1, 2)), np.eye(3, 2)])
def test_few_and_equal_updates_and_their_gradients(rows):
    rule = autogm(1.0, 1e-3, 5, 2)
    out, _ = aggregate(rule, rows)
    assert np.isfinite(out).all()
    if len(rows) != 3:
        np.testing.assert_allclose(out, rows[0], atol=1e-6)
    slope = jax.jit(jax.grad(lambda x: rule.update({"a": x}, rule.init(None))[0]["a"].sum()))
    grad = slope(jnp.asarray(rows, jnp.float32))
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("wrong", [{"penalty": 0.0}, {"smoothing": -1.0}, {"num_iters": 0}, {"num_rounds": 0}])
def test_arguments_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        autogm(**wrong)
