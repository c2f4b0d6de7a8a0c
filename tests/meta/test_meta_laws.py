"""The kernels of this family against every law of a local update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import testing

NUM_CLIENTS, WIDTH = 6, 6


def loss_fn(params, batch, key):
    """Squared error of a small network whose inputs are scaled by bits of the key, so that keys matter."""
    bits = (jax.random.key_data(key)[-1] % 1024).astype(batch["x"].dtype)
    x = (batch["x"] * (0.5 + bits / 512)).astype(params["body"].dtype)
    return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] - batch["y"].astype(x.dtype)) ** 2)


KERNELS = {
    "maml_mixed": lambda: cj.meta.maml(loss_fn, optax.sgd(0.3), 2, mode="mixed", batch_size=2),
    "anil": lambda: cj.meta.anil(loss_fn, optax.sgd(0.3), 2),
    "meta_sgd": lambda: cj.meta.meta_sgd(loss_fn, 2, 0.3, mode="mixed"),
    "imaml": lambda: cj.meta.imaml(loss_fn, optax.sgd(0.1), 3, 5.0, cg_steps=3, damping=1.0),
    # At rates of 0.3 the second step leaves the basin, and rounding grows a thousandfold.
    "per_fedavg": lambda: cj.meta.per_fedavg(loss_fn, 0.1, optax.sgd(0.1), num_steps=2, batch_size=2),
}


@functools.cache
def case(name, mesh):
    rng = np.random.default_rng(0)
    counts, support = np.array([6, 4, 1, 3, 5, 2], np.int32), np.array([3, 2, 0, 1, 5, 1], np.int32)
    x = jnp.asarray(rng.normal(size=(NUM_CLIENTS, WIDTH, 3)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(NUM_CLIENTS, WIDTH)), jnp.float32)
    data = cj.ClientData({"x": x, "y": y}, jnp.asarray(counts), jnp.asarray(support))
    params = {
        "body": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=4), jnp.float32),
    }
    return testing.LocalUpdateCase(KERNELS[name](), params, data, mesh, (jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize("law", testing.LOCAL_UPDATE_LAWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_laws_of_a_local_update(kernel, law, mesh):
    testing.LOCAL_UPDATE_LAWS[law](case(kernel, mesh))
