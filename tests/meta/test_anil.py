import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from tests.meta import meta_oracles as oracle


def quadratic(params, batch, key):
    """`0.5 (body . c + head - x)^2`: the two parts interact."""
    return 0.5 * jnp.mean((2 * params["body"] + params["head"] - batch["x"]) ** 2)


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize("first_order", [False, True])
def test_quadratic_in_closed_form(mode, first_order, x64):
    """With `u = 2 body + head`, the head's steps give `u_m - s = (1 - a)^m (u - s)`."""
    s, q, body, head, rate, num_steps = 1.5, -0.5, 0.3, 2.0, 0.2, 4
    data = cj.ClientData({"x": jnp.array([s, q])}, jnp.int32(2), jnp.int32(1))
    params = {"body": jnp.asarray(body, jnp.float64), "head": jnp.asarray(head, jnp.float64)}
    local = cj.meta.anil(quadratic, optax.sgd(rate), num_steps, mode=mode, first_order=first_order)
    delta, info = oracle.update(local, params, data)
    shrink = (1 - rate) ** num_steps
    error = s + shrink * (2 * body + head - s) - q
    slope = 1 if first_order else shrink
    np.testing.assert_allclose(delta["head"], error * slope, rtol=1e-12)
    np.testing.assert_allclose(delta["body"], error * 2 * slope, rtol=1e-12)
    np.testing.assert_allclose(info.loss, error**2 / 2, rtol=1e-12)


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
def test_against_finite_differences(mode, x64):
    """The loss is not quadratic, and the body enters through the head's steps."""
    s, q, w = oracle.problem(3)
    adapted = np.array([False, True, True, False])

    def loss_fn(params, batch, key):
        return oracle.loss_fn(jnp.stack([params["a"], *params["b"], params["c"]]), batch, key)

    def objective(v):
        for _ in range(3):
            v = v - 1.2 * adapted * oracle.grad(v, s)
        return oracle.loss(v, q)

    local = cj.meta.anil(loss_fn, optax.sgd(1.2), 3, "b", mode=mode)
    params = jax.tree.map(jnp.asarray, {"a": w[0], "b": w[1:3], "c": w[3]})
    delta, _ = oracle.update(local, params, oracle.client(s, q))
    got = np.array([delta["a"], *delta["b"], delta["c"]])
    np.testing.assert_allclose(got, oracle.slopes(objective, w), rtol=1e-7, atol=1e-9)


def test_a_device_adapts_the_same_part(x64):
    s, q, _ = oracle.problem(4)
    data = oracle.client(s, q)
    params = {"body": jnp.asarray(0.3, jnp.float64), "head": jnp.asarray(2.0, jnp.float64)}

    def loss_fn(params, batch, key):
        return quadratic(params, {"x": batch["y"]}, key)

    adapt = cj.meta.adapt(loss_fn, cj.core.train_only(optax.sgd(0.2), "head"), 3)
    adapted, _ = adapt(params, data, jax.random.key(0))
    assert adapted["body"] == params["body"]
    _, info = oracle.update(cj.meta.anil(loss_fn, optax.sgd(0.2), 3), params, data)
    np.testing.assert_allclose(
        info.loss, 0.5 * np.mean((2 * adapted["body"] + adapted["head"] - q["y"]) ** 2), rtol=1e-12
    )


def test_a_part_that_is_none():
    params = {"body": jnp.zeros(()), "head": jnp.zeros(())}
    data = cj.ClientData({"x": jnp.zeros(2)}, jnp.int32(2), jnp.int32(1))
    with pytest.raises(ValueError, match="neck"):
        cj.meta.anil(quadratic, optax.sgd(0.1), 1, "neck").update(params, (), data, jax.random.key(0))
