import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import batch_indices, shuffled_epochs

LENGTH = 9


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def client(num_support, num_examples):
    """A client whose padding is NaN."""
    rng = np.random.default_rng(num_examples)
    x, y = rng.normal(size=(LENGTH, 3)), rng.normal(size=LENGTH)
    x[num_examples:], y[num_examples:] = np.nan, np.nan
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    return cj.ClientData(examples, jnp.int32(num_examples), jnp.int32(num_support)), x, y


class Adam:
    """Kingma and Ba's update in float64."""

    def __init__(self, rate):
        self.rate, self.m, self.v, self.t = rate, 0.0, 0.0, 0

    def step(self, g):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return -self.rate * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


class Sgd:
    def __init__(self, rate):
        self.rate = rate

    def step(self, g):
        return -self.rate * g


def oracle(w, x, y, pairs, inner, outer):
    losses = []
    for support, query in pairs:
        w = w + inner.step(x[support].T @ (x[support] @ w - y[support]) / len(support))
        error = x[query] @ w - y[query]
        losses.append(0.5 * np.mean(error**2))
        w = w + outer.step(x[query].T @ error / len(query))
    return w, losses


def pairs_of(key, num_support, num_examples, batch_size, num_epochs, count):
    support_key, query_key, _ = jax.random.split(key, 3)
    epochs = {"length": LENGTH, "num_epochs": num_epochs}
    support = shuffled_epochs(support_key, jnp.int32(0), jnp.int32(num_support), **epochs)
    query = shuffled_epochs(query_key, jnp.int32(num_support), jnp.int32(num_examples - num_support), **epochs)
    return [
        tuple(np.asarray(batch_indices(s, jnp.int32(i), batch_size)) for s in (support, query)) for i in range(count)
    ]


OPTIMISERS = {
    "adam": (lambda: optax.adam(0.05), lambda: optax.adam(0.02), lambda: Adam(0.05), lambda: Adam(0.02)),
    "sgd": (lambda: optax.sgd(0.1), lambda: optax.sgd(0.3), lambda: Sgd(0.1), lambda: Sgd(0.3)),
    "mixed": (lambda: optax.sgd(0.1), lambda: optax.adam(0.02), lambda: Sgd(0.1), lambda: Adam(0.02)),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("optimisers", OPTIMISERS)
@pytest.mark.parametrize(
    ("num_support", "num_examples", "batch_size", "num_epochs", "pairs"),
    [(4, 9, 2, 1, 2), (3, 6, 2, 3, 5), (1, 2, 4, 1, 1), (4, 5, 2, 2, 1)],
)
def test_pairs_of_steps(optimisers, num_support, num_examples, batch_size, num_epochs, pairs):
    inner_tx, outer_tx, inner, outer = (make() for make in OPTIMISERS[optimisers])
    data, x, y = client(num_support, num_examples)
    local = cj.meta.cedar(loss_fn, inner_tx, outer_tx, batch_size=batch_size, num_epochs=num_epochs)
    w = np.array([0.4, -1.0, 2.0])
    key = jax.random.key(num_support)
    upload, state, info = jax.jit(local.update)(jnp.asarray(w, jnp.float32), (), data, key)
    batches = pairs_of(key, num_support, num_examples, batch_size, num_epochs, pairs)
    for support, query in batches:
        assert (support < num_support).all() and (query >= num_support).all() and (query < num_examples).all()
    after, losses = oracle(w, x, y, batches, inner, outer)
    np.testing.assert_allclose(upload.delta, w - after, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-4)
    assert info.num_steps == pairs and state == ()


@pytest.mark.parametrize(("num_support", "num_examples"), [(0, 5), (5, 5), (0, 1), (1, 1)])
def test_a_client_without_support_or_query_changes_nothing(num_support, num_examples):
    data, _, _ = client(num_support, num_examples)
    local = cj.meta.cedar(loss_fn, optax.sgd(0.1), optax.sgd(0.1), batch_size=2)
    upload, _, info = local.update(jnp.ones(3), (), data, jax.random.key(0))
    assert not upload.delta.any() and info.loss == 0 and info.num_steps == 0


def test_neither_maml_nor_fomaml_nor_plain_training():
    """On one quadratic per set: `theta - a (theta - s)`, then `theta - b (theta - q)`, and nothing is rolled back."""

    def quadratic(w, batch, key):
        return 0.5 * jnp.mean((w - batch) ** 2)

    data = cj.ClientData(jnp.array([4.0, 8.0]), jnp.int32(2), jnp.int32(1))
    args = (jnp.float32(0.0), (), data, jax.random.key(0))
    delta = cj.meta.cedar(quadratic, optax.sgd(0.5), optax.sgd(0.25), batch_size=1).update(*args)[0].delta
    assert delta == -(2.0 + 0.25 * (8.0 - 2.0))
    fomaml = 0.25 * cj.meta.maml(quadratic, optax.sgd(0.5), 1, first_order=True).update(*args)[0].delta
    assert fomaml == 0.25 * (2.0 - 8.0) and fomaml != delta


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_epochs": 0}])
def test_options_out_of_range(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        cj.meta.cedar(loss_fn, optax.sgd(0.1), optax.sgd(0.1), **options)
