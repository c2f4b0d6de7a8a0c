import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import testing

RATE = 0.3
ROUNDS = 6


@functools.cache
def gradients():
    """Pseudo-gradients of several rounds, that shrink, so that the rules for the second moment differ."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=5) * 0.4**r for r in range(ROUNDS)]


def steps(tx, dtype=jnp.float32):
    params = {"a": jnp.zeros(3, dtype), "b": jnp.zeros((1, 2), dtype)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for d in gradients():
        tree = {"a": jnp.asarray(d[:3], dtype), "b": jnp.asarray(d[3:], dtype).reshape(1, 2)}
        step, state = update(tree, state, params)
        params = optax.apply_updates(params, step)
        yield np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)]), state


def adagrad(v, delta, b2):
    return v + delta**2


def adam(v, delta, b2):
    return b2 * v + (1 - b2) * delta**2


def yogi(v, delta, b2):
    return v - (1 - b2) * delta**2 * np.sign(v - delta**2)


RULES = {
    "fedadagrad": (cj.server.fedadagrad, adagrad),
    "fedadam": (functools.partial(cj.server.fedadam, b2=0.8), adam),
    "fedyogi": (functools.partial(cj.server.fedyogi, b2=0.8), yogi),
}


@pytest.mark.parametrize("initial", [None, 0.25])
@pytest.mark.parametrize("b1", [0.0, 0.6])
@pytest.mark.parametrize("name", RULES)
def test_rounds_follow_the_paper(name, b1, initial):
    """In the paper's `Delta = -d` and its signs."""
    build, rule = RULES[name]
    tau = 1e-2
    x, m, v = np.zeros(5), np.zeros(5), np.full(5, tau**2 if initial is None else initial)
    for d, (got, state) in zip(
        gradients(), steps(build(RATE, b1=b1, tau=tau, initial_accumulator=initial)), strict=True
    ):
        delta = -d
        m = b1 * m + (1 - b1) * delta
        v = rule(v, delta, 0.8)
        x = x + RATE * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.ravel(state[0].second["a"]), v[:3], rtol=1e-4)


def test_momentum():
    x, m = np.zeros(5), np.zeros(5)
    for d, (got, _) in zip(gradients(), steps(cj.server.fedavgm(RATE, 0.7)), strict=True):
        m = 0.7 * m + d
        x = x - RATE * m
        np.testing.assert_allclose(got, x, rtol=1e-5)


def test_defaults_are_the_papers():
    first = gradients()[0]
    root = np.sqrt(0.99 * 1e-6 + 0.01 * first**2)
    got, _ = next(steps(cj.server.fedadam(1.0)))
    np.testing.assert_allclose(got, -0.1 * first / (root + 1e-3), rtol=1e-4)
    got, _ = next(steps(cj.server.fedadagrad(1.0)))
    np.testing.assert_allclose(got, -first / (np.sqrt(1e-6 + first**2) + 1e-3), rtol=1e-4)
    got, _ = next(steps(cj.server.fedavgm()))
    np.testing.assert_allclose(got, -first, rtol=1e-6)


BUILDERS = {
    "fedavgm": lambda rate: cj.server.fedavgm(rate, 0.5),
    **{name: lambda rate, build=build: build(rate, b1=0.5) for name, (build, _) in RULES.items()},
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_schedule_over_rounds(name):
    moved = [np.zeros(5), *(got for got, _ in steps(BUILDERS[name](lambda count: jnp.where(count < 2, 0.3, 0.0))))]
    plain = [np.zeros(5), *(got for got, _ in steps(BUILDERS[name](0.3)))]
    np.testing.assert_allclose(moved[2], plain[2], rtol=1e-6)
    np.testing.assert_array_equal(moved[2], moved[-1])


@pytest.mark.parametrize("name", BUILDERS)
def test_rates_can_be_swept(name):
    updates = jnp.asarray(gradients()[0], jnp.float32)

    def step(rate):
        tx = BUILDERS[name](rate)
        return tx.update(updates, tx.init(updates))[0]

    swept = jax.vmap(step)(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(swept, [step(0.1), step(0.2)], rtol=1e-6)


def test_decays_and_tau_can_be_swept():
    updates = jnp.asarray(gradients()[0], jnp.float32)

    def step(b1, b2, tau):
        tx = cj.server.fedyogi(1.0, b1=b1, b2=b2, tau=tau)
        return tx.update(updates, tx.init(updates))[0]

    swept = jax.vmap(step)(jnp.array([0.1, 0.2]), jnp.array([0.5, 0.9]), jnp.array([1e-1, 1e-2]))
    np.testing.assert_allclose(swept, [step(0.1, 0.5, 1e-1), step(0.2, 0.9, 1e-2)], rtol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_gradient_of_zero_is_no_step(name):
    tx, zeros = BUILDERS[name](1.0), jnp.zeros(4)
    step, _ = tx.update(zeros, tx.init(zeros))
    np.testing.assert_array_equal(step, 0)


def test_sums_run_in_float32():
    """With a decay of 0.99 a bfloat16 could not take in squares that are a hundredth of what it holds."""
    one = jnp.ones(2, jnp.bfloat16)
    tx = cj.server.fedadam(1.0, b1=0.0, b2=0.999, tau=1e-3, initial_accumulator=4.0)
    state, update = tx.init(one), jax.jit(tx.update)
    for _ in range(500):
        step, state = update(one, state)
    assert step.dtype == jnp.bfloat16 and state[0].second.dtype == jnp.float32
    np.testing.assert_allclose(state[0].second, 4 * 0.999**500 + 1 - 0.999**500, rtol=1e-4)


@pytest.mark.parametrize("name", [*BUILDERS, "feddyn"])
def test_laws_of_a_server(name, mesh):
    rng = np.random.default_rng(1)
    server = cj.server.feddyn(0.5) if name == "feddyn" else BUILDERS[name](RATE)
    params = {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "b": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)}
    updates = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(5, *p.shape)), jnp.float32), params)
    testing.check_aggregator(
        optax.chain(cj.robust.mean(), server),
        updates,
        params=params,
        weights=jnp.arange(1.0, 6.0),
        mesh=mesh,
        dtypes=(jnp.bfloat16, jnp.float64),
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cj.server.fedavgm(1.0, 1.0), "momentum must satisfy 0 <= momentum < 1, got 1.0"),
        (lambda: cj.server.fedadagrad(1.0, b1=-0.1), "b1 must satisfy 0 <= b1 < 1, got -0.1"),
        (lambda: cj.server.fedadam(1.0, b2=1.0), "b2 must satisfy 0 <= b2 < 1, got 1.0"),
        (lambda: cj.server.fedyogi(1.0, tau=0.0), "tau must be above 0, got 0.0"),
        (
            lambda: cj.server.fedadam(1.0, initial_accumulator=-1.0),
            "initial_accumulator must be at least 0, got -1.0",
        ),
        (lambda: cj.server.feddyn(0.0), "participation must satisfy 0 < participation <= 1, got 0.0"),
        (lambda: cj.server.feddyn(2), "participation must satisfy 0 < participation <= 1, got 2"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
