import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from tests.meta import meta_oracles as oracle

RATES = np.array([0.5, 1.0, 0.1, 2.0])


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_both_gradients_against_finite_differences(num_steps, mode, x64):
    s, q, w = oracle.problem(0)

    def objective(w, rates):
        for _ in range(num_steps):
            w = w - rates * oracle.grad(w, s)
        return oracle.loss(w, q)

    shared = cj.meta.MetaSgdParams(jnp.asarray(w), jnp.asarray(RATES))
    local = cj.meta.meta_sgd(oracle.loss_fn, num_steps, mode=mode)
    delta, info = oracle.update(local, shared, oracle.client(s, q))
    np.testing.assert_allclose(delta.params, oracle.slopes(lambda v: objective(v, RATES), w), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(delta.rates, oracle.slopes(lambda r: objective(w, r), RATES), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(info.loss, objective(w, RATES), rtol=1e-12)
    np.testing.assert_allclose(info.support_loss, oracle.loss(w, s), rtol=1e-12)


def test_equal_rates_are_maml(x64):
    s, q, w = oracle.problem(1)
    data = oracle.client(s, q)
    options = {"batch_size": 2, "query_batch_size": 3}
    for first_order in (False, True):
        local = cj.meta.meta_sgd(oracle.loss_fn, 3, 0.7, first_order=first_order, **options)
        delta, info = oracle.update(local, local.share(jnp.asarray(w)), data)
        maml = cj.meta.maml(oracle.loss_fn, optax.sgd(0.7), 3, first_order=first_order, **options)
        want, want_info = oracle.update(maml, jnp.asarray(w), data)
        np.testing.assert_allclose(delta.params, want, rtol=1e-12)
        np.testing.assert_allclose(info, want_info[:2], rtol=1e-12)


def test_first_order_takes_inner_gradients_as_constants(x64):
    s, q, w = oracle.problem(2)
    local = cj.meta.meta_sgd(oracle.loss_fn, 2, first_order=True)
    delta, _ = oracle.update(local, cj.meta.MetaSgdParams(jnp.asarray(w), jnp.asarray(RATES)), oracle.client(s, q))
    want, want_rates = oracle.maml(w, s, q, rates=RATES, num_steps=2, first_order=True)
    np.testing.assert_allclose(delta.params, want, rtol=1e-12)
    np.testing.assert_allclose(delta.rates, want_rates, rtol=1e-12)


def test_what_is_shared_and_what_is_deployed():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}
    local = cj.meta.meta_sgd(oracle.loss_fn, rate=0.25)
    shared = local.share(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shared.rates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert all(bool((r == 0.25).all()) for r in jax.tree.leaves(shared.rates))
    assert local.model(shared, local.init(params)) is params
    swept = jax.vmap(lambda rate: cj.meta.meta_sgd(oracle.loss_fn, rate=rate).share(params).rates["b"][0])
    assert (swept(jnp.array([0.5, 0.25])) == jnp.array([0.5, 0.25], jnp.bfloat16)).all()


def test_a_device_adapts_with_the_learnt_rates(x64):
    s, q, w = oracle.problem(3)
    adapt = cj.meta.adapt(oracle.loss_fn, cj.meta.elementwise_sgd(jnp.asarray(RATES)), 2)
    adapted, _ = adapt(jnp.asarray(w), oracle.client(s, q), jax.random.key(0))
    for _ in range(2):
        w = w - RATES * oracle.grad(w, s)
    np.testing.assert_allclose(adapted, w, rtol=1e-12)


def test_rounds_learn_rates(x64):
    """On a quadratic with curvatures 1 and 4 no common rate is right for both; learnt ones are 1 and 0.25."""
    curvature = jnp.array([1.0, 4.0])

    def loss_fn(w, batch, key):
        return 0.5 * jnp.mean(((w[None] - batch) ** 2) @ curvature)

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 1, 2))
    data = cj.ClientData(
        jnp.asarray(np.repeat(centres, 2, axis=1)), jnp.full(8, 2, jnp.int32), jnp.full(8, 1, jnp.int32)
    )
    algorithm = cj.federated_round(
        cj.meta.meta_sgd(loss_fn, 1, 0.05), optax.chain(cj.robust.mean(), optax.sgd(0.02, momentum=0.9))
    )
    state, step = algorithm.init(jnp.zeros(2)), jax.jit(algorithm.step)
    cohort = cj.Cohort(data, jnp.ones(8, jnp.float32), jnp.arange(8, dtype=jnp.int32))
    for i in range(400):
        state, _, _ = step(state, cohort, jax.random.key(i))
    np.testing.assert_allclose(state.params.rates, [1.0, 0.25], rtol=1e-2)


@pytest.mark.parametrize("name", ["num_steps", "batch_size", "query_batch_size"])
def test_options_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        cj.meta.meta_sgd(oracle.loss_fn, **{name: 0})
