import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import batch_indices, shuffled_epochs


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


@pytest.mark.parametrize(("count", "batch_size", "num_steps"), [(5, 2, 4), (1, 3, 2), (6, 6, 1), (2, 3, 5)])
def test_steps_over_all_examples(count, batch_size, num_steps):
    rng = np.random.default_rng(count)
    x, y, w = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=3)
    x[count:], y[count:] = np.nan, np.nan
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    data = cj.ClientData(examples, jnp.int32(count), jnp.int32(count // 2))
    key, rate = jax.random.key(1), 0.2
    local = cj.meta.reptile(loss_fn, optax.sgd(rate), num_steps, batch_size=batch_size)
    upload, state, info = jax.jit(local.update)(jnp.asarray(w, jnp.float32), (), data, key)

    stream = shuffled_epochs(jax.random.split(key)[0], jnp.int32(0), jnp.int32(count), length=6, num_epochs=num_steps)
    after, losses = w, []
    for i in range(num_steps):
        rows = np.asarray(batch_indices(stream, jnp.int32(i), batch_size))
        error = x[rows] @ after - y[rows]
        losses.append(0.5 * np.mean(error**2))
        after = after - rate * x[rows].T @ error / batch_size
    np.testing.assert_allclose(upload.delta, w - after, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-5)
    assert state == () and upload.mask is None


def test_one_step_is_a_gradient():
    """With one step over everything, `delta / rate` is the gradient of the joint loss."""
    x, y = np.array([[1.0], [2.0]]), np.array([1.0, 0.0])
    data = cj.ClientData({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.int32(2), jnp.int32(1))
    data = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.ndim else leaf, data)
    local = cj.meta.reptile(loss_fn, optax.sgd(0.5), 1, batch_size=2)
    delta = local.update(jnp.array([1.0]), (), data, jax.random.key(0))[0].delta
    np.testing.assert_allclose(delta / 0.5, [(1 * 0 + 2 * 2) / 2])


@pytest.mark.parametrize(("num_steps", "batch_size", "name"), [(0, 1, "num_steps"), (1, 0, "batch_size")])
def test_options_out_of_range(num_steps, batch_size, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        cj.meta.reptile(loss_fn, optax.sgd(0.1), num_steps, batch_size=batch_size)
