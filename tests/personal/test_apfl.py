import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.personal import apfl
from tests.personal import personal_oracles as oracles

RATE, EPOCHS = 0.2, 3


def kernel(loss_fn=oracles.loss_fn, **options):
    return apfl(loss_fn, optax.sgd(RATE), **{"batch_size": oracles.BATCH, "num_epochs": EPOCHS} | options)


def client_data(i):
    return jax.tree.map(lambda x: x[0], cj.core.take_clients(oracles.make_dataset(), jnp.array([i])).data)


def mix(alpha, v, w):
    return oracles.tree(lambda a, b: alpha * a + (1 - alpha) * b, v, w)


def reference(alpha_rate, personal_rate=RATE, clipped=None):
    """All three move from where they stood before the step."""

    def work(w, state, client):
        v, alpha = state
        for _ in range(oracles.num_steps(client, EPOCHS)):
            at_w, at_mixture = oracles.gradient(w, client), oracles.gradient(mix(alpha, v, w), client)
            slope = sum(np.sum((v[k] - w[k]) * at_mixture[k]) for k in w)
            w, v, moved = (
                oracles.tree(lambda p, g: p - RATE * g, w, at_w),
                oracles.tree(lambda p, g, a=alpha: p - personal_rate * a * g, v, at_mixture),
                alpha - alpha_rate * slope,
            )
            alpha = min(max(moved, 0.0), 1.0)
            if clipped is not None:
                clipped.append(alpha != moved)
        return w, (v, alpha)

    params = oracles.make_params()
    return oracles.federate(work, params, [(params, 0.5)] * 5)


@pytest.mark.parametrize("alpha_rate", [0.0, 0.02, 200.0])
def test_rounds_are_those_of_the_reference(alpha_rate, x64):
    local = kernel(alpha_rate=alpha_rate)
    shared, states, infos = oracles.run(local, oracles.make_params())
    clipped = []
    want, wanted_states = reference(alpha_rate, clipped=clipped)
    oracles.assert_close(shared, want)
    alphas = [alpha for _, alpha in wanted_states]
    np.testing.assert_allclose(states.alpha, alphas, rtol=1e-10)
    for i, (v, alpha) in enumerate(wanted_states):
        state = oracles.state_of(states, i)
        oracles.assert_close(state.personal, v)
        oracles.assert_close(local.model(shared, state), mix(alpha, v, want))
    assert any(clipped) == (alpha_rate == 200.0)
    assert (alphas == [0.5] * 5) == (alpha_rate == 0.0)
    np.testing.assert_array_equal(infos[-1].alpha, states.alpha[jnp.asarray(oracles.COHORTS[-1])])
    assert infos[0].num_steps.tolist() == [3, 1, 3]


def test_the_personal_model_may_have_an_optimiser_of_its_own(x64):
    shared, states, _ = oracles.run(kernel(alpha_rate=0.1, personal_tx=optax.sgd(0.05)), oracles.make_params())
    want, wanted_states = reference(0.1, personal_rate=0.05)
    oracles.assert_close(shared, want)
    oracles.assert_close(oracles.state_of(states, 2).personal, wanted_states[2][0])


def test_the_shared_model_is_that_of_federated_averaging(x64):
    params = oracles.make_params()
    plain = cj.local.sgd(oracles.loss_fn, optax.sgd(RATE), batch_size=oracles.BATCH, num_epochs=EPOCHS)
    oracles.assert_close(
        oracles.run(kernel(alpha_rate=0.3), params)[0],
        jax.tree.map(np.asarray, oracles.run(plain, params)[0]),
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_mixture(alpha, x64):
    """With 0 the client deploys the shared model and its own never moves; with 1 it trains alone."""
    local = kernel(alpha=alpha, alpha_rate=0.0)
    params = oracles.make_params()
    shared, states, _ = oracles.run(local, params)
    for i, client in enumerate(oracles.make_clients()):
        state, visits = oracles.state_of(states, i), sum(i in cohort for cohort in oracles.COHORTS)
        alone = oracles.descend(params, client, RATE, visits * oracles.num_steps(client, EPOCHS))
        oracles.assert_close(state.personal, alone if alpha else params)
        oracles.assert_close(local.model(shared, state), alone if alpha else jax.tree.map(np.asarray, shared))


def test_the_share_stays_at_least_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), oracles.as_arrays(oracles.make_params()))
    local = kernel(alpha=0.1, alpha_rate=0.1)
    data = client_data(0)
    data = data._replace(
        examples=jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, data.examples
        )
    )
    upload, state, _ = jax.jit(local.update)(params, local.init(params), data, jax.random.key(0))
    assert local.init(params).alpha == jnp.float32(0.1) and state.alpha.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((upload.delta, state.personal))} == {jnp.dtype(jnp.bfloat16)}
    assert state.alpha != jnp.float32(0.1)


def test_a_share_at_an_end_may_leave_it_again(x64):
    """`f = (w - s)^2 / 2` with v on the example: alpha grows from 0, although v then has no gradient."""

    def quadratic(w, x, key):
        return 0.5 * jnp.mean((w - x) ** 2)

    local = apfl(quadratic, optax.sgd(0.1), batch_size=1, alpha=0.0, alpha_rate=0.1)
    data = cj.ClientData(jnp.array([2.0]), jnp.int32(1), jnp.int32(0))
    state = local.init(jnp.float64(2.0))
    _, state, _ = jax.jit(local.update)(jnp.float64(1.0), state, data, jax.random.key(0))
    np.testing.assert_allclose(state.alpha, 0.1 * (2.0 - 1.0) * (2.0 - 1.0), rtol=1e-12)
    assert state.personal == 2.0


def test_share_and_rate_can_be_swept():
    params, data = oracles.as_arrays(oracles.make_params()), client_data(0)

    def state(alpha, alpha_rate):
        local = kernel(alpha=alpha, alpha_rate=alpha_rate)
        return jax.jit(local.update)(params, local.init(params), data, jax.random.key(0))[1]

    swept = jax.vmap(state)(jnp.array([0.2, 0.8]), jnp.array([0.0, 0.3]))
    for i, pair in enumerate([(0.2, 0.0), (0.8, 0.3)]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-5), swept, state(*pair))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie within \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha must lie within \[0, 1\], got -0.1"),
        ({"alpha_rate": -1}, "alpha_rate must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        kernel(**options)
