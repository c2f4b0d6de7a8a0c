import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import core, robust
from cedarjax.robust import centered_clipping
from tests.robust import robust_oracles as oracles

NUM_CLIENTS = 9
WEIGHTS = np.array([1.0, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 2.0, 1.0])
PRESENT = np.array([0, 1, 2, 4, 5, 7, 8])


def make_updates(seed=0, offset=0.5, scale=1.0):
    """Row 3 is absent and holds NaN, row 6 holds one Inf, row 5 is an attacker's."""
    x = offset + scale * np.random.default_rng(seed).normal(size=(NUM_CLIENTS, 10))
    x[5] *= 1e4
    x[3], x[6, 2] = np.nan, np.inf
    x = x.astype(np.float32)
    return {"a": x[:, :6].reshape(NUM_CLIENTS, 2, 3), "b": x[:, 6:]}


@functools.cache
def compiled(radius, num_iters):
    rule = centered_clipping(radius, num_iters)
    return jax.jit(lambda updates, state, weights: rule.update(updates, state, weights=weights))


def rounds(radius, num_iters, cohorts, weights=WEIGHTS, center=None):
    """Aggregates and infos of one round after another."""
    state = centered_clipping(radius, num_iters).init(jax.tree.map(lambda x: x[0], cohorts[0]))
    if center is not None:
        state = state._replace(center=jax.tree.map(jnp.asarray, center))
    for updates in cohorts:
        out, state = compiled(radius, num_iters)(updates, core.take_info(state)[0], jnp.asarray(weights, jnp.float32))
        yield oracles.flat_one(out), state


@pytest.mark.parametrize("num_iters", [1, 2, 5])
@pytest.mark.parametrize("radius", [0.3, 2.0, 1e6])
def test_loop_on_vectors_over_rounds(radius, num_iters):
    cohorts = [make_updates(seed, 0.5 * seed) for seed in range(3)]
    center = None
    for (got, state), updates in zip(rounds(radius, num_iters, cohorts), cohorts, strict=True):
        x, w = oracles.flat(updates)[PRESENT], WEIGHTS[PRESENT]
        before = np.zeros(10) if center is None else center
        center = oracles.centered_clipping(x, w, radius, num_iters, center)
        np.testing.assert_allclose(got, center, rtol=0, atol=2e-6 * max(1, np.abs(center).max()))
        # The same expression twice in one program, which the compiler may round differently.
        np.testing.assert_allclose(oracles.flat_one(state.center), got, rtol=3e-7)
        # The coefficients are of the updates; what they lack of 1 is the share of the centre before.
        told = np.asarray(state.info.coefficients, np.float64)
        again = told[PRESENT] @ x + (1 - told.sum()) * before
        np.testing.assert_allclose(again, center, rtol=0, atol=2e-6 * max(1, np.abs(center).max()))
        assert state.info.ok and not np.any(told[[3, 6]])
    assert state.num_nonfinite == 3


@pytest.mark.parametrize("num_iters", [1, 3])
def test_a_centre_far_from_the_clients(num_iters):
    """It walks towards them a radius at a time; distances to it are large, those between clients are not."""
    updates = make_updates(1, offset=0.0, scale=0.1)
    center = {"a": np.full((2, 3), 30.0, np.float32), "b": np.full(4, -30.0, np.float32)}
    x, w = oracles.flat(updates)[PRESENT], WEIGHTS[PRESENT]
    ((got, _),) = rounds(1.0, num_iters, [updates], center=center)
    start = np.concatenate([np.full(6, 30.0), np.full(4, -30.0)])
    want = oracles.centered_clipping(x, w, 1.0, num_iters, start)
    np.testing.assert_allclose(got, want, rtol=0, atol=6e-5)  # 2e-6 of the centre
    assert np.linalg.norm(got - start) <= num_iters


def test_several_steps_are_as_many_rounds_of_one():
    updates = make_updates(2)
    *_, (want, _) = rounds(0.5, 1, [updates] * 4)
    ((got, _),) = rounds(0.5, 4, [updates])
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("num_iters", [1, 3])
def test_an_attacker_whose_square_overflows_is_absent(num_iters):
    updates = make_updates(3)
    updates["b"][5] = 1e30
    ((got, state),) = rounds(1.0, num_iters, [updates])
    rest = np.array([0, 1, 2, 4, 7, 8])
    want = oracles.centered_clipping(oracles.flat(updates)[rest], WEIGHTS[rest], 1.0, num_iters)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    assert state.info.nonfinite.tolist() == [i in (5, 6) for i in range(NUM_CLIENTS)]


@pytest.mark.parametrize("num_iters", [1, 3])
def test_nobody_leaves_the_centre_where_it_is(num_iters):
    updates = make_updates(4)
    center = {"a": np.full((2, 3), 2.0, np.float32), "b": np.full(4, -1.0, np.float32)}
    ((got, state),) = rounds(1.0, num_iters, [updates], np.zeros(NUM_CLIENTS), center)
    assert not got.any() and not state.info.ok
    jax.tree.map(np.testing.assert_array_equal, state.center, center)


@pytest.mark.parametrize("num_iters", [1, 3])
def test_rows_that_are_not_written(num_iters):
    """Inside pre-aggregators, round after round."""
    rule = robust.clip(5.0, robust.nnm(2, centered_clipping(0.5, num_iters)))
    updates = make_updates(5)
    state = rule.init(jax.tree.map(lambda x: x[0], updates))
    x, w = oracles.flat(updates)[PRESENT], WEIGHTS[PRESENT]
    rows, center = oracles.nnm(oracles.clip(x, 5.0), w, 2), None
    step = jax.jit(lambda state: rule.update(updates, state, weights=jnp.asarray(WEIGHTS, jnp.float32)))
    for _ in range(2):
        got, state = step(core.take_info(state)[0])
        center = oracles.centered_clipping(rows, w, 0.5, num_iters, center)
        np.testing.assert_allclose(oracles.flat_one(got), center, rtol=0, atol=3e-6)


@pytest.mark.parametrize("num_iters", [1, 2])
def test_layers_that_clients_left_out(num_iters):
    """Lengths over what was uploaded, scaled to all parameters; a layer moves by those who uploaded it."""
    updates = make_updates(6)
    updates["a"][6, 0, 2] = 0.5
    flags = {"a": np.ones(NUM_CLIENTS), "b": np.ones(NUM_CLIENTS)}
    flags["a"][[3, 4]], flags["b"][[3, 7]] = 0, 0
    updates["a"][4], updates["b"][7] = np.nan, np.nan
    rule = centered_clipping(1.0, num_iters)
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), flags)
    got, state = jax.jit(rule.update)(updates, rule.init({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}), weights=weights)
    layers = [np.asarray(updates[k], np.float64).reshape(NUM_CLIENTS, -1) for k in "ab"]
    sent = [flags[k] > 0 for k in "ab"]
    v = [np.zeros(6), np.zeros(4)]
    for _ in range(num_iters):
        squares = sum(np.where(u, np.nansum((x - c) ** 2, axis=1), 0) for x, u, c in zip(layers, sent, v, strict=True))
        uploaded = sum(u * x.shape[1] for x, u in zip(layers, sent, strict=True))
        factors = np.minimum(1, 1 / np.sqrt(np.maximum(squares * 10 / np.maximum(uploaded, 1), 1e-30)))
        v = [c + (factors[u, None] * (x[u] - c)).sum(axis=0) / u.sum() for x, u, c in zip(layers, sent, v, strict=True)]
    np.testing.assert_allclose(oracles.flat_one(got), np.concatenate(v), rtol=0, atol=3e-6)
    assert state.info.ok and (state.info.coefficients > 0).tolist() == [i != 3 for i in range(NUM_CLIENTS)]


def test_half_precision_and_parameters_of_another_dtype():
    updates = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_updates(7))
    for num_iters in (1, 2):
        rule = centered_clipping(1.0, num_iters)
        state = rule.init({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)})
        out, state = jax.jit(rule.update)(updates, state, weights=jnp.asarray(WEIGHTS, jnp.float32))
        assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}
        assert {x.dtype for x in jax.tree.leaves(state.center)} == {jnp.dtype("float32")}
        x = oracles.flat(jax.tree.map(lambda x: x.astype(jnp.float32), updates))[PRESENT]
        want = oracles.centered_clipping(x, WEIGHTS[PRESENT], 1.0, num_iters)
        np.testing.assert_allclose(
            oracles.flat_one(jax.tree.map(lambda x: x.astype(jnp.float32), out)), want, atol=4e-3
        )


def test_double_precision(x64):
    x = np.random.default_rng(8).normal(size=(NUM_CLIENTS, 4))
    for num_iters in (1, 4):
        rule = centered_clipping(0.7, num_iters)
        out, _ = jax.jit(rule.update)(jnp.asarray(x), rule.init(jnp.asarray(x[0])))
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, oracles.centered_clipping(x, np.ones(NUM_CLIENTS), 0.7, num_iters), atol=1e-13)


def test_arguments():
    with pytest.raises(ValueError, match="radius must be above 0, got 0"):
        centered_clipping(0.0)
    with pytest.raises(ValueError, match="num_iters must be at least 1, got 0"):
        centered_clipping(1.0, 0)
