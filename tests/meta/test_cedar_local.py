"""Cedar's meta update against a numpy loop with Adam written from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax.core import ClientData, batch_indices, shuffled_epochs
from cedarjax.meta import cedar


def loss_fn(params, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def client(num_support, num_query, length, seed=0):
    rng = np.random.default_rng(seed)
    count = num_support + num_query
    x, y = rng.normal(size=(length, 4)).astype(np.float32), rng.normal(size=length).astype(np.float32)
    x[count:], y[count:] = np.nan, np.nan
    return ClientData({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.int32(count), jnp.int32(num_support))


class NumpyAdam:
    """Kingma and Ba, algorithm 1."""

    def __init__(self, rate, b1=0.9, b2=0.999, eps=1e-8):
        self.rate, self.b1, self.b2, self.eps, self.t, self.m, self.v = rate, b1, b2, eps, 0, 0.0, 0.0

    def step(self, grad):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * grad
        self.v = self.b2 * self.v + (1 - self.b2) * grad**2
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return -self.rate * m / (np.sqrt(v) + self.eps)


def numpy_cedar(data, key, start, inner, outer, batch_size, num_pairs, num_epochs):
    x, y = (np.asarray(data.examples[k], np.float64) for k in ("x", "y"))
    length, num_support = len(y), int(data.num_support)
    num_query = int(data.num_examples) - num_support
    support_key, query_key, _ = jax.random.split(key, 3)
    options = {"length": length, "num_epochs": num_epochs}
    support = shuffled_epochs(support_key, jnp.int32(0), jnp.int32(num_support), **options)
    query = shuffled_epochs(query_key, jnp.int32(num_support), jnp.int32(num_query), **options)
    theta, losses = start.astype(np.float64), []
    for pair in range(num_pairs):
        for stream, optimiser in ((support, inner), (query, outer)):
            rows = np.asarray(batch_indices(stream, jnp.int32(pair), batch_size))
            low, high = (0, num_support) if stream is support else (num_support, num_support + num_query)
            assert ((rows >= low) & (rows < high)).all()
            error = x[rows] @ theta - y[rows]
            if stream is query:
                losses.append(0.5 * np.mean(error**2))
            theta = theta + optimiser.step(x[rows].T @ error / len(rows))
    return start - theta, np.mean(losses)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("sizes", "batch_size", "num_epochs", "num_pairs"),
    [
        ((10, 10, 20), 10, 1, 1),
        ((10, 10, 25), 5, 2, 4),
        ((3, 9, 20), 4, 1, 1),
        ((9, 3, 12), 2, 2, 3),
        ((1, 1, 8), 10, 1, 1),
    ],
)
def test_equals_numpy_with_adam(sizes, batch_size, num_epochs, num_pairs):
    data, key = client(*sizes), jax.random.key(5)
    start = np.linspace(-1, 1, 4).astype(np.float32)
    local = cedar(loss_fn, optax.adam(0.03), optax.adam(0.01), batch_size=batch_size, num_epochs=num_epochs)
    upload, _, info = local.update(jnp.asarray(start), (), data, key)
    expected, loss = numpy_cedar(data, key, start, NumpyAdam(0.03), NumpyAdam(0.01), batch_size, num_pairs, num_epochs)
    assert int(info.num_steps) == num_pairs
    np.testing.assert_allclose(upload.delta, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.loss, loss, rtol=1e-5)


def test_it_is_neither_maml_nor_first_order_maml():
    """The query step starts where the support step ended, and both displacements are uploaded."""
    data = ClientData(jnp.array([4.0, 8.0]), jnp.int32(2), jnp.int32(1))
    local = cedar(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(0.5), optax.sgd(0.25), batch_size=1)
    upload, _, _ = local.update(jnp.float32(0.0), (), data, jax.random.key(0))
    assert float(upload.delta) == -(2.0 + 0.25 * (8.0 - 2.0))  # first-order MAML would send 0.25 * (2 - 8) alone


@pytest.mark.parametrize("num_support", [0, 6])
def test_a_client_without_one_of_the_sets_changes_nothing(num_support):
    data = client(6, 0, 8)._replace(num_support=jnp.int32(num_support))
    upload, _, info = cedar(loss_fn, optax.sgd(0.1), optax.sgd(0.1), batch_size=2).update(
        jnp.ones(4), (), data, jax.random.key(0)
    )
    assert int(info.num_steps) == 0 and not upload.delta.any() and float(info.loss) == 0.0


def test_optimisers_start_afresh_in_every_round():
    data, key = client(4, 4, 8), jax.random.key(2)
    local = cedar(loss_fn, optax.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9), batch_size=2)
    first, state, _ = local.update(jnp.ones(4), local.init(jnp.ones(4)), data, key)
    second, _, _ = local.update(jnp.ones(4), state, data, key)
    np.testing.assert_array_equal(first.delta, second.delta)


@pytest.mark.parametrize("name", ["batch_size", "num_epochs"])
def test_bad_counts_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        cedar(loss_fn, optax.sgd(0.1), optax.sgd(0.1), **{name: 0})
