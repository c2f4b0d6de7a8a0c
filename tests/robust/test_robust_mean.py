"""The mean rule, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.robust import mean

NUM_CLIENTS = 5


def make_updates(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (NUM_CLIENTS, 3, 2), "b": {"c": (NUM_CLIENTS, 4), "d": (NUM_CLIENTS,)}}
    return jax.tree.map(lambda s: rng.normal(size=s).astype(dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


RULE = mean()
UPDATE = jax.jit(RULE.update)


def aggregate(updates, **extra):
    return UPDATE(updates, RULE.init(None), **extra)


def numpy_mean(x, weights):
    weights = np.asarray(weights, np.float64)
    rows = [w * x[i].astype(np.float64) for i, w in enumerate(weights) if w > 0]
    return np.sum(rows, axis=0) / weights.sum() if rows else np.zeros(x.shape[1:])


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 1e-3, 400.0]), min_size=NUM_CLIENTS, max_size=NUM_CLIENTS))
def test_weighted_mean_with_nan_where_nobody_is(weights):
    updates = make_updates()
    holed = jax.tree.map(
        lambda x: np.where(np.reshape(weights, (-1,) + (1,) * (x.ndim - 1)) == 0, np.float32(np.nan), x), updates
    )
    got, state = aggregate(holed, weights=jnp.array(weights))
    wanted = jax.tree.map(lambda x: numpy_mean(x, weights), updates)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, wanted)
    assert state.num_nonfinite == 0


def test_no_weights_are_equal_weights():
    updates = make_updates()
    got, _ = aggregate(updates)
    jax.tree.map(lambda g, x: np.testing.assert_allclose(g, x.mean(axis=0), rtol=1e-5, atol=1e-6), got, updates)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_client_with_one_bad_number_is_absent_everywhere_and_counted(bad):
    updates = make_updates()
    updates["b"]["c"][2, 1] = bad
    got, state = aggregate(updates, weights=jnp.arange(5, dtype=jnp.float32))
    wanted = jax.tree.map(lambda x: numpy_mean(np.nan_to_num(x), [0, 1, 0, 3, 4]), updates)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, wanted)
    assert state.num_nonfinite == 1
    _, state = UPDATE(updates, state, weights=jnp.ones(5))
    assert state.num_nonfinite == 2


def test_layer_weights():
    updates = make_updates()
    updates["b"]["c"][3] = np.nan  # a layer that client 3 left out
    weights = {"a": jnp.zeros(5), "b": {"c": jnp.array([1.0, 0, 2, 0, 0]), "d": jnp.array([0.0, 0, 0, 7, 0])}}
    got, state = aggregate(updates, weights=weights)
    np.testing.assert_array_equal(got["a"], np.zeros((3, 2)))
    np.testing.assert_allclose(got["b"]["c"], numpy_mean(updates["b"]["c"], [1, 0, 2, 0, 0]), rtol=1e-5)
    np.testing.assert_allclose(got["b"]["d"], updates["b"]["d"][3], rtol=1e-6)
    assert state.num_nonfinite == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_same_dtype_out_accumulated_in_float32(dtype):
    updates = {"a": jnp.full((300, 2), 1.0078125, dtype)}
    got, _ = aggregate(updates, weights=jnp.ones(300))
    assert got["a"].dtype == dtype
    np.testing.assert_allclose(got["a"].astype(jnp.float32), 1.0078125, rtol=1e-6)


def test_float64(x64):
    got, _ = aggregate(make_updates(dtype=np.float64), weights=jnp.ones(5, jnp.float64))
    assert got["a"].dtype == jnp.float64
    np.testing.assert_allclose(got["a"], make_updates(dtype=np.float64)["a"].mean(axis=0), rtol=1e-12)


def test_jit_permutation_one_client_and_a_bare_array():
    updates, weights = make_updates(), jnp.array([0.5, 1.0, 0.0, 2.0, 4.0])
    plain, _ = RULE.update(updates, RULE.init(None), weights=weights)
    jitted, _ = aggregate(updates, weights=weights)
    order = np.array([3, 0, 4, 2, 1])
    permuted, _ = aggregate(jax.tree.map(lambda x: x[order], updates), weights=weights[order])
    for other in (jitted, permuted):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other)
    np.testing.assert_array_equal(aggregate(jnp.array([[1.0, 2.0]]), weights=jnp.array([0.25]))[0], [1.0, 2.0])


def test_in_a_chain_it_is_fedavg():
    tx = optax.with_extra_args_support(optax.chain(mean(), optax.sgd(1.0)))
    params = jnp.array([1.0, 1.0])
    updates = jnp.array([[0.5, 0.0], [0.0, 1.0]])
    step, state = tx.update(updates, tx.init(params), params, weights=jnp.array([3.0, 1.0]), key=None, byzantine=None)
    np.testing.assert_allclose(params + step, [1 - 0.375, 1 - 0.25])
    assert state[0].num_nonfinite == 0


def test_mean_rejects_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weights must be \[C\] with C = 5.*\(4,\)"):
        aggregate(make_updates(), weights=jnp.ones(4))
    with pytest.raises(ValueError, match="weights must be one .C. vector or a tree"):
        aggregate(make_updates(), weights={"a": jnp.ones(5)})
    with pytest.raises(ValueError, match="got 4 at 'b'"):
        aggregate({"a": jnp.ones((5, 1)), "b": jnp.ones((4, 1))})
