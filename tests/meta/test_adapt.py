import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import batch_indices, cohort_map, shuffled_epochs

RATE = 0.3


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def query_loss(w, data):
    rows = jnp.arange(6, dtype=jnp.int32)
    mask = (rows >= data.num_support) & (rows < data.num_examples)
    return cj.core.mean_loss(loss_fn, w, data.examples, mask, jax.random.key(0))


def client(num_support, num_examples=6, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=6)
    x[num_examples:], y[num_examples:] = np.nan, np.nan
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    return cj.ClientData(examples, jnp.int32(num_examples), jnp.int32(num_support)), x, y


def descend(w, x, y, batches):
    path = [w]
    for rows in batches:
        w = w - RATE * x[rows].T @ (x[rows] @ w - y[rows]) / len(rows)
        path.append(w)
    return path


W = np.array([1.0, -0.5, 2.0])
KEY = jax.random.key(5)


@pytest.mark.parametrize("eval_steps", [(0, 1, 5, 6), (6,), (0,)])
def test_told_steps_are_those_of_the_whole_history(eval_steps):
    data, _, _ = client(3, 5)
    start = jnp.asarray(W, jnp.float32)
    whole, told = (
        cj.meta.adapt(loss_fn, optax.sgd(RATE), 6, eval_fn=lambda w, data: w, eval_steps=steps)(start, data, KEY)[1]
        for steps in (None, eval_steps)
    )
    np.testing.assert_array_equal(told, whole[np.array(eval_steps)])


@pytest.mark.parametrize("eval_steps", [(0, 4), (2, 1), (-1,), ()])
def test_told_steps_out_of_range_are_named(eval_steps):
    with pytest.raises(ValueError, match=r"eval_steps must be increasing within \[0, num_steps\] = \[0, 3\]"):
        cj.meta.adapt(loss_fn, optax.sgd(RATE), 3, eval_steps=eval_steps)


@pytest.mark.parametrize("max_support", [None, 3, 4, 99])
def test_steps_on_the_whole_support_set(max_support):
    data, x, y = client(3, 5)
    run = cj.meta.adapt(
        loss_fn,
        optax.sgd(RATE),
        4,
        max_support=max_support,
        eval_fn=lambda w, data: {"w": w, "loss": query_loss(w, data)},
    )
    adapted, history = jax.jit(run)(jnp.asarray(W, jnp.float32), data, KEY)
    path = descend(W, x, y, [np.arange(3)] * 4)
    np.testing.assert_allclose(history["w"], path, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(adapted, path[-1], rtol=1e-4, atol=1e-6)
    want = [0.5 * np.mean((x[3:5] @ w - y[3:5]) ** 2) for w in path]
    np.testing.assert_allclose(history["loss"], want, rtol=1e-4)


def test_steps_on_batches_of_the_support_set():
    data, x, y = client(3)
    run = cj.meta.adapt(loss_fn, optax.sgd(RATE), 5, batch_size=2)
    adapted, history = jax.jit(run)(jnp.asarray(W, jnp.float32), data, KEY)
    stream = shuffled_epochs(jax.random.split(KEY)[0], jnp.int32(0), jnp.int32(3), length=6, num_epochs=5)
    batches = [np.asarray(batch_indices(stream, jnp.int32(i), 2)) for i in range(5)]
    assert max(map(np.max, batches)) < 3
    np.testing.assert_allclose(adapted, descend(W, x, y, batches)[-1], rtol=1e-4, atol=1e-6)
    assert history is None


@pytest.mark.standard_promotion
def test_any_optimiser_adapts():
    data, _, _ = client(3)
    adapted, losses = cj.meta.adapt(
        loss_fn,
        optax.adam(0.1),
        50,
        eval_fn=lambda w, data: loss_fn(w, jax.tree.map(lambda x: x[:3], data.examples), None),
    )(jnp.asarray(W, jnp.float32), data, KEY)
    assert losses.shape == (51,) and losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_device_without_support_keeps_the_model(batch_size):
    data, _, _ = client(0)
    run = cj.meta.adapt(loss_fn, optax.sgd(RATE), 3, batch_size=batch_size)
    np.testing.assert_array_equal(run(jnp.asarray(W, jnp.float32), data, KEY)[0], np.float32(W))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_query_rows_and_padding_are_not_read(batch_size):
    data, _, _ = client(2, 4)
    foul = data._replace(examples=jax.tree.map(lambda x: x.at[2:].set(jnp.nan), data.examples))
    run = cj.meta.adapt(loss_fn, optax.sgd(RATE), 3, batch_size=batch_size)
    np.testing.assert_array_equal(run(jnp.ones(3), foul, KEY)[0], run(jnp.ones(3), data, KEY)[0])


def test_no_steps():
    data, _, _ = client(3)
    adapted, history = cj.meta.adapt(loss_fn, optax.sgd(RATE), 0, eval_fn=query_loss)(jnp.ones(3), data, KEY)
    np.testing.assert_array_equal(adapted, 1.0)
    np.testing.assert_allclose(history, [query_loss(jnp.ones(3), data)])


def test_many_devices_at_once():
    clients = [client(s, n, seed)[0] for seed, (s, n) in enumerate([(1, 2), (3, 6), (2, 5)])]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *clients)
    run = cj.meta.adapt(loss_fn, optax.sgd(RATE), 3, eval_fn=query_loss)
    adapted, history = cohort_map(2)(run, jnp.ones(3), stacked, jax.random.split(KEY, 3))
    for i, data in enumerate(clients):
        alone, path = run(jnp.ones(3), data, jax.random.split(KEY, 3)[i])
        np.testing.assert_allclose(adapted[i], alone, rtol=1e-5)
        np.testing.assert_allclose(history[i], path, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_steps", "options", "message"),
    [
        (-1, {}, "num_steps must be at least 0, got -1"),
        (1, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (1, {"max_support": 0}, "max_support must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(num_steps, options, message):
    with pytest.raises(ValueError, match=message):
        cj.meta.adapt(loss_fn, optax.sgd(RATE), num_steps, **options)
