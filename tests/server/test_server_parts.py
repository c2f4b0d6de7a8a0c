"""What the servers of FedDyn and FedNova do by themselves; with their clients they are tested in `tests/local`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj


def test_feddyn_in_the_papers_signs():
    """`h` of the paper, over rounds in which clients come and go."""
    rng = np.random.default_rng(0)
    num_clients, alpha = 4, 0.3
    theta, h = rng.normal(size=3), np.zeros(3)
    tx = cj.server.feddyn(2 / num_clients)
    params = jnp.asarray(theta, jnp.float32)
    state = tx.init(params)
    for _ in range(4):
        trained = theta[None] + rng.normal(size=(2, 3))
        step, state = tx.update(params - jnp.asarray(trained.mean(axis=0), jnp.float32), state)
        params = optax.apply_updates(params, step)
        h = h - alpha / num_clients * (trained - theta[None]).sum(axis=0)
        theta = trained.mean(axis=0) - h / alpha
        np.testing.assert_allclose(params, theta, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.shift, h / alpha, rtol=1e-4, atol=1e-5)


def test_feddyn_keeps_its_sum_in_float32():
    tx = cj.server.feddyn()
    small = jnp.full(2, 2**-6, jnp.bfloat16)
    state = tx.init(small)
    for _ in range(100):
        step, state = tx.update(small, state)
    assert step.dtype == jnp.bfloat16
    np.testing.assert_allclose(state.shift, 100 * 2**-6, rtol=1e-6)


def test_feddyn_participation_can_be_swept():
    def step(participation):
        tx = cj.server.feddyn(participation)
        return tx.update(jnp.float32(2.0), tx.init(jnp.float32(0.0)))[0]

    np.testing.assert_allclose(jax.vmap(step)(jnp.array([0.5, 1.0])), [-3.0, -4.0])


def test_fednova_scales_every_layer_by_its_rate():
    tx = cj.server.fednova()
    mean = cj.local.FedNovaShared(
        {"a": jnp.ones(2), "b": jnp.full((), 3.0, jnp.bfloat16)}, {"a": jnp.float32(0.5), "b": jnp.float32(2.0)}
    )
    got, _ = tx.update(mean, tx.init(mean))
    np.testing.assert_array_equal(got.params["a"], [0.5, 0.5])
    assert got.params["b"] == 6 and got.params["b"].dtype == jnp.bfloat16
    assert got.total_rate["a"] == 0 and got.total_rate["b"] == 0


@pytest.mark.parametrize("updates", [{"a": jnp.ones(2)}, jnp.ones(3), cj.local.ScaffoldShared(1.0, 2.0)])
def test_fednova_reads_nothing_but_its_own_uploads(updates):
    tx = cj.server.fednova()
    with pytest.raises(TypeError, match="with the fields params and total_rate"):
        tx.update(updates, tx.init(updates))
