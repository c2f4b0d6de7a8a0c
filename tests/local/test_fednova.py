import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.local import total_rate
from tests.local import local_oracles as oracles

RATE = 0.1
SERVER = optax.chain(cj.robust.mean(), cj.server.fednova(), optax.sgd(1.0))
AVERAGING = optax.chain(cj.robust.mean(), optax.sgd(1.0))


def work(tau, rho=0.0, mu=0.0):
    """The paper's `|a_i|_1`."""
    if mu:
        return (1 - (1 - RATE * mu) ** tau) / (RATE * mu)
    return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)


@pytest.mark.parametrize(("rho", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rounds_follow_the_paper(rho, mu, weighted):
    _, xs, ys = oracles.federation()
    _, x = oracles.start()
    tx = optax.sgd(RATE, momentum=rho) if rho else optax.sgd(RATE)
    local = cj.local.fednova(oracles.loss_fn, tx, mu=mu, batch_size=2, num_epochs=3)
    for r, ids, weights, shared, _, _ in oracles.rounds(local, SERVER, weighted=weighted):
        p = weights / weights.sum()
        lengths, directions = [], []
        for i in ids:
            batches = oracles.rows_of(oracles.client_key(r, i), oracles.COUNTS[i], 2, 3)
            y, velocity = x.copy(), np.zeros(4)
            for rows in batches:
                velocity = rho * velocity + oracles.gradient(y, xs[i], ys[i], rows) + mu * (y - x)
                y = y - RATE * velocity
            lengths.append(work(len(batches), rho, mu))
            directions.append((x - y) / (RATE * lengths[-1]))
        x = x - RATE * (p @ np.array(lengths)) * (p @ np.array(directions))
        np.testing.assert_allclose(oracles.flat(shared.params), x, rtol=1e-4, atol=1e-5)
        assert all(rate == 0 for rate in jax.tree.leaves(shared.total_rate))


@pytest.mark.parametrize("tau", [0, 1, 7])
def test_the_work_of_an_optimiser_is_the_papers(tau):
    def rate(tx, mu=0.0):
        return total_rate(tx, jnp.zeros(3), jnp.int32(tau), 9, mu)

    np.testing.assert_allclose(rate(optax.sgd(RATE)), RATE * work(tau), rtol=1e-5)
    np.testing.assert_allclose(rate(optax.sgd(RATE, momentum=0.9)), RATE * work(tau, rho=0.9), rtol=1e-5)
    np.testing.assert_allclose(rate(optax.sgd(RATE), 0.5), RATE * work(tau, mu=0.5), rtol=1e-5)


def coefficients(tau, step):
    """`eta a` of an optimiser, one gradient at a time: how far each alone moves the parameters."""
    moved = []
    for k in range(tau):
        y = velocity = 0.0
        for j in range(tau):
            y, velocity = step(y, velocity, float(j == k))
        moved.append(-y)
    return np.array(moved)


@pytest.mark.parametrize("tau", [1, 4])
def test_the_work_of_what_the_paper_has_no_formula_for(tau):
    rho, mu = 0.8, 0.3

    def heavy_ball(y, velocity, gradient):
        velocity = rho * velocity + gradient + mu * y
        return y - RATE * velocity, velocity

    def nesterov(y, velocity, gradient):
        velocity = rho * velocity + gradient
        return y - RATE * (gradient + rho * velocity), velocity

    got = total_rate(optax.sgd(RATE, momentum=rho), jnp.zeros(()), jnp.int32(tau), 9, mu)
    np.testing.assert_allclose(got, np.abs(coefficients(tau, heavy_ball)).sum(), rtol=1e-5)
    got = total_rate(optax.sgd(RATE, momentum=rho, nesterov=True), jnp.zeros(()), jnp.int32(tau), 9)
    np.testing.assert_allclose(got, np.abs(coefficients(tau, nesterov)).sum(), rtol=1e-5)


def test_each_layer_has_its_own_work():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.zeros(())}
    tx = optax.partition(
        {"fast": optax.sgd(0.5), "slow": optax.sgd(0.1), "still": optax.set_to_zero()},
        {"a": "fast", "b": "slow", "c": "still"},
    )
    rates = total_rate(tx, params, jnp.int32(3), 5)
    np.testing.assert_allclose([rates["a"], rates["b"], rates["c"]], [1.5, 0.3, 0.0], rtol=1e-6)


def test_a_frozen_layer_uploads_zeros():
    tx = cj.core.freeze(optax.sgd(RATE), "b")
    local = cj.local.fednova(oracles.loss_fn, tx, batch_size=2)
    data, params = jax.tree.map(lambda x: x[0], oracles.federation()[0]), oracles.start()[0]
    delta = local.update(local.share(params), (), data, jax.random.key(0))[0].delta
    assert delta.params["b"] == 0 and delta.total_rate["b"] == 0
    assert np.abs(delta.params["w"]).min() > 0


@pytest.mark.parametrize("tx", [optax.sgd(RATE), optax.sgd(RATE, momentum=0.9)])
def test_equal_work_is_federated_averaging(tx):
    equal = {"batch_size": 2, "num_epochs": 4, "num_steps_fn": lambda data, key: jnp.int32(2)}
    nova = cj.local.fednova(oracles.loss_fn, tx, mu=0.2, **equal)
    plain = cj.local.prox(0.2, oracles.loss_fn, tx, **equal)
    pairs = zip(
        oracles.rounds(nova, SERVER, weighted=True), oracles.rounds(plain, AVERAGING, weighted=True), strict=True
    )
    for (*_, got, _, _), (*_, want, _, _) in pairs:
        np.testing.assert_allclose(oracles.flat(got.params), oracles.flat(want), rtol=1e-5, atol=1e-6)


def test_unequal_work_does_not_change_the_objective():
    """Steps in proportion to the curvature, one against four, pull the plain average from 4 towards 80 / 17."""

    def steps(data, key):
        return jnp.round(data.examples["a"][0]).astype(jnp.int32)

    options = {"batch_size": 1, "num_epochs": 4, "num_steps_fn": steps}
    plain = oracles.two_quadratics(lambda f: cj.local.sgd(f, optax.sgd(0.01), **options), AVERAGING, 800)
    nova = oracles.two_quadratics(lambda f: cj.local.fednova(f, optax.sgd(0.01), **options), SERVER, 800)
    assert abs(plain - 80 / 17) < 0.05
    assert abs(nova - 4.0) < 0.06  # to first order in the rate
    nova = oracles.two_quadratics(lambda f: cj.local.fednova(f, optax.sgd(0.001), **options), SERVER, 8000)
    assert abs(nova - 4.0) < 0.006


def test_a_client_without_steps_uploads_zeros():
    local = cj.local.fednova(
        oracles.loss_fn, optax.sgd(RATE), batch_size=2, num_steps_fn=lambda data, key: jnp.int32(0)
    )
    data, params = jax.tree.map(lambda x: x[0], oracles.federation()[0]), oracles.start()[0]
    delta = local.update(local.share(params), (), data, jax.random.key(0))[0].delta
    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(delta))


def test_the_pull_and_the_rate_can_be_swept():
    data, params = jax.tree.map(lambda x: x[0], oracles.federation()[0]), oracles.start()[0]

    def delta(rate, mu):
        local = cj.local.fednova(oracles.loss_fn, optax.sgd(rate), mu=mu, batch_size=2)
        return local.update(local.share(params), (), data, jax.random.key(1))[0].delta

    swept = jax.vmap(delta)(jnp.array([0.1, 0.2]), jnp.array([0.0, 2.0]))
    for i, pair in enumerate([(0.1, 0.0), (0.2, 2.0)]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-4), swept, delta(*pair))


@pytest.mark.slow
def test_laws():
    tx = optax.sgd(RATE, momentum=0.5)
    oracles.check_laws(cj.local.fednova(oracles.loss_fn, tx, mu=0.1, batch_size=2, num_steps_fn=oracles.half))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mu": -1.0}, "mu must be at least 0, got -1.0"), ({"num_epochs": 0}, "num_epochs must be at least 1, got 0")],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        cj.local.fednova(oracles.loss_fn, optax.sgd(0.1), batch_size=2, **options)
