"""Local training against a plain numpy loop over the same batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax.core import ClientData, batch_indices, num_batches, shuffled_epochs
from cedarjax.local import prox, sgd


def linear_loss(params, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def client(count, length, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(length, 3)).astype(np.float32), rng.normal(size=length).astype(np.float32)
    x[count:], y[count:] = np.nan, np.nan
    return ClientData({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.int32(count), jnp.int32(count // 2))


def batches(data, key, batch_size, num_epochs):
    """Rows of every batch, from the documented use of the key."""
    order_key, _, _ = jax.random.split(key, 3)
    length = data.examples["y"].shape[0]
    stream = shuffled_epochs(order_key, jnp.int32(0), data.num_examples, length=length, num_epochs=num_epochs)
    count = num_batches(int(data.num_examples), batch_size, num_epochs)
    return [np.asarray(batch_indices(stream, jnp.int32(t), batch_size)) for t in range(count)]


def numpy_training(data, rows, rate, mu=0.0, momentum=0.0):
    x, y = (np.asarray(data.examples[k], np.float64) for k in ("x", "y"))
    start = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}
    params, trace, losses = dict(start), {"w": np.zeros(3), "b": 0.0}, []
    for index in rows:
        error = x[index] @ params["w"] + params["b"] - y[index]
        losses.append(0.5 * np.mean(error**2))
        grads = {"w": x[index].T @ error / len(index), "b": error.mean()}
        for k in params:
            grads[k] = grads[k] + mu * (params[k] - start[k])
            trace[k] = grads[k] + momentum * trace[k]
            params[k] = params[k] - rate * trace[k]
    return {k: start[k] - params[k] for k in start}, float(np.mean(losses)) if losses else 0.0


PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.25)}


@pytest.mark.parametrize(("count", "batch_size", "num_epochs"), [(12, 4, 1), (7, 4, 3), (3, 5, 2), (1, 2, 1)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_numpy_over_the_same_batches(count, batch_size, num_epochs, momentum):
    data, key = client(count, 12), jax.random.key(3)
    tx = optax.sgd(0.05, momentum=momentum or None)
    upload, state, info = sgd(linear_loss, tx, batch_size=batch_size, num_epochs=num_epochs).update(
        PARAMS, (), data, key
    )
    rows = batches(data, key, batch_size, num_epochs)
    expected, loss = numpy_training(data, rows, 0.05, momentum=momentum)
    assert state == () and upload.mask is None
    assert int(info.num_steps) == len(rows) == -(-count * num_epochs // batch_size)
    for name in expected:
        np.testing.assert_allclose(upload.delta[name], expected[name], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(info.loss, loss, rtol=1e-5)


def test_each_epoch_reads_every_example_once():
    rows = np.concatenate(batches(client(12, 20), jax.random.key(0), 4, 3)).reshape(3, 12)
    for epoch in rows:
        assert sorted(epoch) == list(range(12))
    assert not (rows[0] == rows[1]).all()


def test_prox_equals_numpy():
    data, key = client(8, 8), jax.random.key(1)
    upload, _, _ = prox(0.7, linear_loss, optax.sgd(0.05), batch_size=4, num_epochs=2).update(PARAMS, (), data, key)
    expected, _ = numpy_training(data, batches(data, key, 4, 2), 0.05, mu=0.7)
    for name in expected:
        np.testing.assert_allclose(upload.delta[name], expected[name], rtol=2e-5, atol=2e-6)


def test_prox_converges_to_its_closed_form():
    """`argmin (w - c)^2 / 2 + mu / 2 (w - s)^2 = (c + mu s) / (1 + mu)`."""
    data = ClientData(jnp.full((4,), 3.0), jnp.int32(4), jnp.int32(2))
    local = prox(0.5, lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(0.5), batch_size=4, num_epochs=60)
    upload, _, _ = local.update(jnp.float32(1.0), (), data, jax.random.key(0))
    np.testing.assert_allclose(1.0 - upload.delta, (3.0 + 0.5 * 1.0) / 1.5, rtol=1e-6)


def test_prox_sweeps_mu_under_vmap():
    data = client(8, 8)

    def delta(mu):
        return prox(mu, linear_loss, optax.sgd(0.05), batch_size=4).update(PARAMS, (), data, jax.random.key(1))[0].delta

    swept = jax.vmap(delta)(jnp.array([0.0, 0.3]))
    for i, mu in enumerate((0.0, 0.3)):
        np.testing.assert_allclose(swept["w"][i], delta(mu)["w"], rtol=1e-6)


@pytest.mark.parametrize("asked", [0, 1, 2, 99])
def test_straggler_does_the_first_of_its_steps(asked):
    data, key = client(12, 12), jax.random.key(3)
    local = sgd(linear_loss, optax.sgd(0.05), batch_size=4, num_steps_fn=lambda data, key: jnp.int32(asked))
    upload, _, info = local.update(PARAMS, (), data, key)
    done = min(asked, 3)
    expected, loss = numpy_training(data, batches(data, key, 4, 1)[:done] or [], 0.05)
    assert int(info.num_steps) == done
    np.testing.assert_allclose(upload.delta["w"], expected["w"], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(info.loss, loss if done else 0.0, rtol=1e-5)


def test_straggler_key_is_the_clients_own():
    counts = [
        int(
            sgd(linear_loss, optax.sgd(0.1), batch_size=1, num_steps_fn=lambda d, k: jax.random.randint(k, (), 0, 13))
            .update(PARAMS, (), client(12, 12), jax.random.fold_in(jax.random.key(0), i))[2]
            .num_steps
        )
        for i in range(8)
    ]
    assert len(set(counts)) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2, "num_epochs": 0}, "num_epochs must be at least 1, got 0"),
    ],
)
def test_bad_counts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sgd(linear_loss, optax.sgd(0.1), **options)


def test_negative_mu_is_named():
    with pytest.raises(ValueError, match="mu must be at least 0, got -0.1"):
        prox(-0.1, linear_loss, optax.sgd(0.1), batch_size=2)
