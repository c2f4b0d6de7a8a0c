import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import batch_indices, shuffled_epochs
from tests.meta import meta_oracles as oracle

MODES = ("exact", "fo", "hf")


@pytest.mark.parametrize("mode", MODES)
def test_one_step_on_a_quadratic_in_closed_form(mode, x64):
    """`w - b (1 - a c)^2 c (w - s)`; without the Hessian `(1 - a c)` once; a central difference is exact here."""
    curvature, alpha, beta, w, s = np.array([0.5, 1.0, 3.0]), 0.2, 0.7, np.array([1.0, -2.0, 0.5]), np.ones(3)

    def quadratic(w, batch, key):
        return 0.5 * jnp.mean(((w[None] - batch) ** 2) @ jnp.asarray(curvature))

    data = cj.ClientData(jnp.asarray(s)[None], jnp.int32(1), jnp.int32(0))
    local = cj.meta.per_fedavg(quadratic, alpha, optax.sgd(beta), num_steps=1, batch_size=2, mode=mode)
    delta, info = oracle.update(local, jnp.asarray(w), data)
    shrink = 1 - alpha * curvature
    np.testing.assert_allclose(delta, beta * shrink ** (1 if mode == "fo" else 2) * curvature * (w - s), rtol=1e-10)
    np.testing.assert_allclose(info.loss, 0.5 * np.sum(curvature * (shrink * (w - s)) ** 2), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 7])
def test_three_independent_streams_of_batches(mode, count, x64):
    rng = np.random.default_rng(count)
    everything, w, num_steps, batch_size = oracle.rows(rng, count), rng.normal(size=oracle.NUM_FEATURES), 4, 3
    data = oracle.client({k: v[:1] for k, v in everything.items()}, {k: v[1:] for k, v in everything.items()})
    options = {"alpha": 0.6, "mode": mode, "delta": 0.05}
    local = cj.meta.per_fedavg(oracle.loss_fn, tx=optax.sgd(0.4), num_steps=num_steps, batch_size=batch_size, **options)
    delta, info = oracle.update(local, jnp.asarray(w), data, seed=5)

    streams = [
        shuffled_epochs(key, jnp.int32(0), jnp.int32(count), length=count + 2, num_epochs=num_steps)
        for key in jax.random.split(jax.random.key(5), 4)[:3]
    ]
    rows = [[np.asarray(batch_indices(s, jnp.int32(t), batch_size)) for s in streams] for t in range(num_steps)]
    batches = [[{k: v[at] for k, v in everything.items()} for at in step] for step in rows]
    np.testing.assert_allclose(w - delta, oracle.per_fedavg(w, batches, beta=0.4, **options), rtol=1e-8)
    if count == 7:
        assert any(set(a) != set(b) for a, b, _ in rows) and any(set(b) != set(c) for _, b, c in rows)
    losses, v = [], w
    for step in batches:
        losses.append(oracle.loss(v - 0.6 * oracle.grad(v, step[0]), step[1]))
        v = oracle.per_fedavg(v, [step], beta=0.4, **options)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-9)


def test_exact_step_against_finite_differences(x64):
    """With all rows in every batch a step of rate 1 is the gradient of `f(w - alpha grad f(w))`."""
    everything, _, w = oracle.problem(2)
    data = oracle.client(everything, {k: v[:0] for k, v in everything.items()})
    local = cj.meta.per_fedavg(oracle.loss_fn, 1.3, optax.sgd(1.0), num_steps=1, batch_size=5)
    delta, _ = oracle.update(local, jnp.asarray(w), data)

    def objective(v):
        return oracle.loss(v - 1.3 * oracle.grad(v, everything), everything)

    np.testing.assert_allclose(delta, oracle.slopes(objective, w), rtol=1e-7, atol=1e-9)


def test_hessian_free_comes_near_the_exact_step(x64):
    everything, query, w = oracle.problem(3)
    data = oracle.client(everything, query)

    def delta(mode, step=1e-3):
        local = cj.meta.per_fedavg(
            oracle.loss_fn, 1.3, optax.sgd(1.0), num_steps=2, batch_size=3, mode=mode, delta=step
        )
        return oracle.update(local, jnp.asarray(w), data)[0]

    errors = [np.abs(delta("hf", step) - delta("exact")).max() for step in (1.0, 0.1, 0.01)]
    assert errors[0] > 50 * errors[1] > 50 * 50 * errors[2] > 0  # of second order in the step
    assert np.abs(delta("fo") - delta("exact")).max() > 1e-2


def test_rates_may_be_swept(x64):
    everything, query, w = oracle.problem(4)
    data = oracle.client(everything, query)

    def delta(alpha, step):
        local = cj.meta.per_fedavg(
            oracle.loss_fn, alpha, optax.sgd(1.0), num_steps=1, batch_size=3, mode="hf", delta=step
        )
        return local.update(jnp.asarray(w), (), data, jax.random.key(0))[0].delta

    swept = jax.jit(jax.vmap(delta))(jnp.array([0.5, 1.0]), jnp.array([0.1, 0.01]))
    np.testing.assert_allclose(swept, [delta(0.5, 0.1), delta(1.0, 0.01)], rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"alpha": -0.1}, "alpha must be at least 0, got -0.1"),
        ({"delta": 0.0}, "delta must be positive, got 0.0"),
        ({"mode": "fd"}, "mode must be .* got 'fd'"),
    ],
)
def test_options_out_of_range(options, message):
    options = {"alpha": 0.1, "num_steps": 1, "batch_size": 1, **options}
    with pytest.raises(ValueError, match=message):
        cj.meta.per_fedavg(oracle.loss_fn, tx=optax.sgd(0.1), **options)
