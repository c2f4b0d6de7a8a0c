import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import batch_indices, shuffled_epochs

LENGTH = 6


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ w["w"] + w["b"] - batch["y"]) ** 2)


def client(count, seed=0):
    """A client whose padding is NaN."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(LENGTH, 3)), rng.normal(size=LENGTH)
    x[count:], y[count:] = np.nan, np.nan
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    return cj.ClientData(examples, jnp.int32(count), jnp.int32(count // 2)), x, y


def start(seed=9):
    w = np.random.default_rng(seed).normal(size=4)
    return {"w": jnp.asarray(w[:3], jnp.float32), "b": jnp.float32(w[3])}, w


def oracle(w, x, y, batches, rate, mu=0.0, momentum=0.0):
    """SGD in float64 over given batches; parameters, and losses before each step."""
    shared, velocity, losses = w.copy(), np.zeros_like(w), []
    for rows in batches:
        design = np.column_stack([x[rows], np.ones(len(rows))])
        error = design @ w - y[rows]
        losses.append(0.5 * np.mean(error**2))
        velocity = momentum * velocity + design.T @ error / len(rows) + mu * (w - shared)
        w = w - rate * velocity
    return w, losses


def batches_of(key, count, batch_size, num_epochs, steps):
    """The stream itself has an oracle of its own in the tests of core."""
    order_key = jax.random.split(key, 3)[0]
    stream = shuffled_epochs(order_key, jnp.int32(0), jnp.int32(count), length=LENGTH, num_epochs=num_epochs)
    return [np.asarray(batch_indices(stream, jnp.int32(i), batch_size)) for i in range(steps)]


def check(local, data, x, y, steps, rate, batch_size, num_epochs, **options):
    params, w = start()
    key = jax.random.key(4)
    upload, state, info = jax.jit(local.update)(params, (), data, key)
    count = int(data.num_examples)
    after, losses = oracle(w, x, y, batches_of(key, count, batch_size, num_epochs, steps), rate, **options)
    got = np.concatenate([upload.delta["w"], upload.delta["b"][None]])
    np.testing.assert_allclose(got, w - after, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(info.loss, np.mean(losses) if losses else 0.0, rtol=1e-5)
    assert info.num_steps == steps and state == () and upload.mask is None


@pytest.mark.parametrize(
    ("count", "batch_size", "num_epochs", "steps"), [(6, 2, 1, 3), (5, 2, 3, 8), (1, 4, 2, 1), (4, 4, 1, 1)]
)
def test_steps_follow_the_stream(count, batch_size, num_epochs, steps):
    data, x, y = client(count)
    local = cj.local.sgd(loss_fn, optax.sgd(0.1, momentum=0.9), batch_size=batch_size, num_epochs=num_epochs)
    check(local, data, x, y, steps, 0.1, batch_size, num_epochs, momentum=0.9)


def test_proximal_steps_follow_the_stream():
    data, x, y = client(5)
    local = cj.local.prox(0.7, loss_fn, optax.sgd(0.1), batch_size=2, num_epochs=3)
    check(local, data, x, y, 8, 0.1, 2, 3, mu=0.7)


@pytest.mark.parametrize(("wanted", "steps"), [(0, 0), (2, 2), (99, 8), (-1, 0)])
def test_stragglers_do_fewer_steps_and_never_more(wanted, steps):
    data, x, y = client(5)
    local = cj.local.sgd(
        loss_fn, optax.sgd(0.1), batch_size=2, num_epochs=3, num_steps_fn=lambda data, key: jnp.int32(wanted)
    )
    check(local, data, x, y, steps, 0.1, 2, 3)


def test_a_straggler_may_depend_on_its_data_and_on_chance():
    def num_steps_fn(data, key):
        return jax.random.randint(key, (), 0, data.num_examples + 1)

    local = cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=1, num_steps_fn=num_steps_fn)
    steps = jax.vmap(lambda key: local.update(start()[0], (), client(6)[0], key)[2].num_steps)
    assert set(steps(jax.random.split(jax.random.key(0), 60)).tolist()) == set(range(7))


@pytest.mark.parametrize("mu", [0.0, 0.5, 4.0])
def test_the_proximal_optimum(mu):
    """For one quadratic, `argmin (w - x)^2 / 2 + mu / 2 (w - s)^2 = (x + mu s) / (1 + mu)`."""

    def quadratic(w, batch, key):
        return 0.5 * jnp.mean((w - batch) ** 2)

    local = cj.local.prox(mu, quadratic, optax.sgd(0.2), batch_size=1, num_epochs=200)
    data = cj.ClientData(jnp.array([3.0]), jnp.int32(1), jnp.int32(1))
    delta = local.update(jnp.float32(1.0), (), data, jax.random.key(0))[0].delta
    np.testing.assert_allclose(1.0 - delta, (3.0 + mu * 1.0) / (1 + mu), rtol=1e-6)


def test_the_strength_of_the_pull_can_be_swept():
    data, _, _ = client(5)

    def delta(mu):
        return (
            cj.local.prox(mu, loss_fn, optax.sgd(0.1), batch_size=2)
            .update(start()[0], (), data, jax.random.key(0))[0]
            .delta
        )

    swept = jax.vmap(delta)(jnp.array([0.0, 2.0]))
    for i, mu in enumerate([0.0, 2.0]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-5), swept, delta(mu))


def test_every_step_has_a_key_of_its_own():
    def noise(w, batch, key):
        return w * jax.random.normal(key, ())  # the gradient is the draw

    local = cj.local.sgd(noise, optax.sgd(1.0), batch_size=1)
    data = cj.ClientData(jnp.zeros(400), jnp.int32(400), jnp.int32(0))
    delta = local.update(jnp.float32(0.0), (), data, jax.random.key(0))[0].delta
    assert abs(delta) < 5 * 20  # 400 equal draws would be 400 times one normal, one of 20 standard deviations
    one = (
        cj.local.sgd(noise, optax.sgd(1.0), batch_size=400)
        .update(jnp.float32(0.0), (), data, jax.random.key(0))[0]
        .delta
    )
    assert abs(delta / 400 - one) > 1e-3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=0), "batch_size must be at least 1, got 0"),
        (
            lambda: cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=1, num_epochs=0),
            "num_epochs must be at least 1, got 0",
        ),
        (lambda: cj.local.prox(-0.1, loss_fn, optax.sgd(0.1), batch_size=1), "mu must be at least 0, got -0.1"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
