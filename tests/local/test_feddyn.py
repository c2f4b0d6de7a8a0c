import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from tests.local import local_oracles as oracles

RATE, ALPHA = 0.2, 0.7


def build(tx=None, **options):
    options = {"batch_size": 2, "num_epochs": 3} | options
    return cj.local.feddyn(oracles.loss_fn, optax.sgd(RATE) if tx is None else tx, ALPHA, **options)


@pytest.mark.parametrize("stragglers", [False, True])
def test_rounds_follow_the_paper(stragglers):
    """The paper's algorithm with `h` itself, minimised by steps of SGD."""
    _, xs, ys = oracles.federation()
    _, theta = oracles.start()
    h, gradients = np.zeros(4), np.zeros((oracles.NUM_CLIENTS, 4))
    local = build(num_steps_fn=oracles.half if stragglers else None)
    server = optax.chain(cj.robust.mean(), cj.server.feddyn(oracles.PARTICIPATION))
    for r, ids, _, shared, states, _ in oracles.rounds(local, server):
        trained = []
        for i in ids:
            count = oracles.COUNTS[i]
            own = theta.copy()
            for rows in oracles.rows_of(oracles.client_key(r, i), count, 2, 3, count // 2 if stragglers else None):
                slope = oracles.gradient(own, xs[i], ys[i], rows) - gradients[i] + ALPHA * (own - theta)
                own = own - RATE * slope
            gradients[i] = gradients[i] - ALPHA * (own - theta)
            trained.append(own)
        h = h - ALPHA / oracles.NUM_CLIENTS * sum(own - theta for own in trained)
        theta = np.mean(trained, axis=0) - h / ALPHA
        np.testing.assert_allclose(oracles.flat(shared), theta, rtol=1e-4, atol=1e-5)
        for i in range(oracles.NUM_CLIENTS):
            own = oracles.flat(jax.tree.map(lambda leaf, i=i: leaf[i], states.gradient))
            np.testing.assert_allclose(own, gradients[i], rtol=1e-4, atol=1e-5)


def test_it_reaches_the_optimum_where_averaging_does_not():
    options = {"batch_size": 1, "num_epochs": 10}
    plain = oracles.two_quadratics(
        lambda loss: cj.local.prox(1.0, loss, optax.sgd(0.1), **options), optax.chain(cj.robust.mean(), optax.sgd(1.0))
    )
    dynamic = oracles.two_quadratics(
        lambda loss: cj.local.feddyn(loss, optax.sgd(0.1), 1.0, **options),
        optax.chain(cj.robust.mean(), cj.server.feddyn()),
    )
    assert abs(plain - 4.0) > 0.4
    np.testing.assert_allclose(dynamic, 4.0, atol=1e-4)


def test_at_the_minimum_the_state_is_the_clients_gradient():
    """For `(w - x)^2 / 2` the minimum is known; the penalty is the squared distance, not the distance."""
    x, s, g = 3.0, 1.0, 0.5
    local = cj.local.feddyn(
        lambda w, batch, key: 0.5 * jnp.mean((w - batch) ** 2), optax.sgd(0.3), ALPHA, batch_size=1, num_epochs=100
    )
    data = cj.ClientData(jnp.array([x]), jnp.int32(1), jnp.int32(0))
    state = cj.local.FedDynState(jnp.float32(g))
    upload, state, info = local.update(jnp.float32(s), state, data, jax.random.key(0))
    minimum = (x + g + ALPHA * s) / (1 + ALPHA)
    np.testing.assert_allclose(s - upload.delta, minimum, rtol=1e-5)
    np.testing.assert_allclose(state.gradient, minimum - x, rtol=1e-5)
    assert info.num_steps == 100


def test_the_strength_can_be_swept():
    data = jax.tree.map(lambda x: x[0], oracles.federation()[0])
    params = oracles.start()[0]
    state = cj.local.FedDynState(jax.tree.map(jnp.ones_like, params))

    def work(alpha):
        local = cj.local.feddyn(oracles.loss_fn, optax.sgd(RATE), alpha, batch_size=2)
        return local.update(params, state, data, jax.random.key(1))[:2]

    swept = jax.vmap(work)(jnp.array([0.1, 2.0]))
    for i, alpha in enumerate([0.1, 2.0]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-5), swept, work(alpha))


@pytest.mark.slow
def test_laws():
    oracles.check_laws(build(optax.sgd(RATE, momentum=0.5), num_steps_fn=oracles.half))


@pytest.mark.parametrize(
    ("alpha", "batch_size", "message"),
    [(0.0, 1, "alpha must be above 0, got 0.0"), (1.0, 0, "batch_size must be at least 1, got 0")],
)
def test_options_out_of_range(alpha, batch_size, message):
    with pytest.raises(ValueError, match=message):
        cj.local.feddyn(oracles.loss_fn, optax.sgd(0.1), alpha, batch_size=batch_size)
