import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.personal import pfedme
from tests.personal import personal_oracles as oracles

RATE, LAM, ETA = 0.2, 1.5, 0.4
OPTIONS = {"num_rounds": 3, "num_steps": 4, "batch_size": oracles.BATCH}


def kernel(lam=LAM, eta=ETA, loss_fn=oracles.loss_fn, **options):
    return pfedme(loss_fn, optax.sgd(RATE), lam, eta, **OPTIONS | options)


def client_data(i):
    return jax.tree.map(lambda x: x[0], cj.core.take_clients(oracles.make_dataset(), jnp.array([i])).data)


def test_rounds_are_those_of_the_reference(x64):
    """The server moves by beta towards the unweighted mean of the round's clients."""
    beta = 0.6
    local = kernel()
    shared, states, infos = oracles.run(local, oracles.make_params(), server_rate=beta, weighting="uniform")

    def work(w, theta, client):
        for _ in range(3):
            centre = w
            pull = lambda t, c=centre: oracles.tree(lambda a, b: LAM * (a - b), t, c)  # noqa: E731
            theta = oracles.descend(w, client, RATE, 4, extra=pull)
            w = oracles.tree(lambda a, b: a - ETA * LAM * (a - b), w, theta)
        return w, theta

    params = oracles.make_params()
    want, thetas = oracles.federate(work, params, [params] * 5, server_rate=beta, uniform=True)
    oracles.assert_close(shared, want)
    for i, theta in enumerate(thetas):
        state = oracles.state_of(states, i)
        oracles.assert_close(state.personal, theta)
        oracles.assert_close(local.model(shared, state), theta)
    assert infos[0].num_steps.tolist() == [12, 12, 12]


def quadratic(w, x, key):
    return 0.5 * jnp.mean((w - x) ** 2)


def test_many_steps_are_the_gradient_of_the_moreau_envelope(x64):
    """For `(theta - s)^2 / 2` it is `lam (w - s) / (1 + lam)`, where `theta = (s + lam w) / (1 + lam)`."""
    local = kernel(loss_fn=quadratic, num_rounds=1, num_steps=200, batch_size=1)
    data = cj.ClientData(jnp.array([3.0]), jnp.int32(1), jnp.int32(0))
    upload, state, _ = jax.jit(local.update)(jnp.float64(1.0), local.init(jnp.float64(0.0)), data, jax.random.key(0))
    np.testing.assert_allclose(state.personal, (3 + LAM) / (1 + LAM), rtol=1e-12)
    np.testing.assert_allclose(upload.delta, ETA * LAM * (1 - 3) / (1 + LAM), rtol=1e-12)


def test_every_local_round_has_a_batch_of_its_own_and_keeps_it(x64):
    """Without a pull each local round starts at `w = 0` and goes all the way in one step: the loss tells the path."""
    local = pfedme(quadratic, optax.sgd(1.0), 0.0, 0.0, num_rounds=4, num_steps=2, batch_size=1)
    examples = jnp.array([1.0, 10.0, 100.0, 1000.0, jnp.nan])
    data = cj.ClientData(examples, jnp.int32(4), jnp.int32(0))
    _, state, info = jax.jit(local.update)(jnp.float64(0.0), local.init(jnp.float64(0.0)), data, jax.random.key(0))
    # From w = 0 the first step of each local round costs x^2 / 2 and lands on x, where the second costs nothing.
    np.testing.assert_allclose(info.loss, np.sum(np.square(examples[:4]) / 2) / 8, rtol=1e-12)
    assert state.personal in (1.0, 10.0, 100.0, 1000.0)


def test_more_local_rounds_than_epochs_have_batches_read_no_padding():
    data = cj.ClientData(jnp.array([2.0, jnp.nan, jnp.nan]), jnp.int32(1), jnp.int32(0))
    local = kernel(loss_fn=quadratic, num_rounds=5, num_steps=2, batch_size=4)
    upload, state, info = jax.jit(local.update)(jnp.float32(0.0), local.init(jnp.float32(0.0)), data, jax.random.key(0))
    assert all(bool(jnp.isfinite(x)) for x in (upload.delta, state.personal, info.loss)) and info.num_steps == 10


def test_the_next_round_does_not_read_the_personal_model():
    params, data = oracles.as_arrays(oracles.make_params()), client_data(0)
    local = kernel()
    one = jax.jit(local.update)(params, local.init(params), data, jax.random.key(0))
    other = jax.jit(local.update)(params, local.init(jax.tree.map(jnp.zeros_like, params)), data, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_both_rates_can_be_swept():
    params, data = oracles.as_arrays(oracles.make_params()), client_data(0)

    def delta(lam, eta):
        local = kernel(lam, eta)
        return jax.jit(local.update)(params, local.init(params), data, jax.random.key(0))[0].delta

    swept = jax.vmap(delta)(jnp.array([0.5, 2.0]), jnp.array([0.1, 0.3]))
    for i, pair in enumerate([(0.5, 0.1), (2.0, 0.3)]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-5), swept, delta(*pair))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "lam must be at least 0, got -1.0"),
        ({"eta": -0.5}, "eta must be at least 0, got -0.5"),
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        kernel(**options)
