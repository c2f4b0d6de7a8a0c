"""Every personal kernel against every law of local updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import personal, testing

NUM_CLIENTS, WIDTH = 4, 6


@pytest.fixture(autouse=True)
def fast_compilation(request):
    """Most of the time here is XLA's. What is compared with no jit is compiled as it would be for a user."""
    jax.config.update("jax_disable_most_optimizations", "jit" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def embed_fn(params, batch):
    return jnp.tanh(batch["x"].astype(params["body"].dtype) @ params["body"])


def loss_fn(params, batch, key):
    """Squared error of a small network whose outputs are scaled by bits of the key, so that keys matter."""
    bits = (jax.random.key_data(key)[-1] % 1024).astype(params["head"].dtype)
    outputs = embed_fn(params, batch) @ params["head"]
    return 0.5 * jnp.mean((outputs * (0.5 + bits / 512) - batch["y"].astype(outputs.dtype)) ** 2)


@functools.cache
def problem():
    """Parameters, and four clients of unequal sizes, one of them with a single example and no support."""
    rng = np.random.default_rng(0)
    params = {"body": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    params["head"] = jnp.asarray(rng.normal(size=4), jnp.float32)
    x = jnp.asarray(rng.normal(size=(NUM_CLIENTS, WIDTH, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, size=(NUM_CLIENTS, WIDTH)), jnp.int32)
    counts, support = jnp.array([6, 4, 1, 3], jnp.int32), jnp.array([3, 2, 0, 1], jnp.int32)
    return params, cj.ClientData({"x": x, "y": y}, counts, support)


def tx():
    return optax.sgd(0.2, momentum=0.9)


def stragglers(data, key):
    return jax.random.randint(key, (), 0, 3)


KERNELS = {
    "fedrep": lambda: personal.fedrep(loss_fn, tx(), batch_size=2, num_steps_fn=stragglers),
    "split_of_maml": lambda: personal.split(
        cj.meta.maml(loss_fn, optax.sgd(0.2), 1, remat=False), "head", personal_tx=tx()
    ),
    "ditto_around_fedper": lambda: personal.ditto(
        personal.fedper(loss_fn, tx(), batch_size=2), loss_fn, tx(), 0.5, batch_size=2, num_steps_fn=stragglers
    ),
    "pfedme": lambda: personal.pfedme(loss_fn, tx(), 1.0, 0.5, num_rounds=2, num_steps=2, batch_size=2),
    "apfl": lambda: personal.apfl(loss_fn, tx(), batch_size=2, num_epochs=2, alpha_rate=0.1),
    "fedproto": lambda: personal.fedproto(
        loss_fn, embed_fn, tx(), 0.5, num_classes=3, num_features=4, batch_size=4, num_epochs=2
    ),
}


@functools.cache
def case(name, mesh):
    """One case a kernel, so that its laws share what they compile."""
    params, data = problem()
    return testing.LocalUpdateCase(KERNELS[name](), params, data, mesh, (jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize("law", testing.LOCAL_UPDATE_LAWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_personal_kernel(kernel, law, mesh):
    testing.LOCAL_UPDATE_LAWS[law](case(kernel, mesh))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_is_deployed_by_every_client(kernel):
    """`algorithm.model` over stacked states, after one round, and every client's is its own."""
    local = case(kernel, None).local_update
    params, data = problem()
    algorithm = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(0.1)))
    states = jax.tree.map(lambda s: jnp.broadcast_to(s, (NUM_CLIENTS, *s.shape)), algorithm.init_client(params))
    cohort = cj.Cohort(data, data.num_examples.astype(jnp.float32), jnp.arange(NUM_CLIENTS, dtype=jnp.int32), states)
    server, states, _ = jax.jit(algorithm.step)(algorithm.init(params), cohort, jax.random.key(0))
    models = jax.vmap(algorithm.model, in_axes=(None, 0))(server.params, states)
    assert jax.tree.structure(models) == jax.tree.structure(params)
    assert len({tuple(row) for row in np.asarray(models["head"]).tolist()}) > 1
