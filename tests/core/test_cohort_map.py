import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cedarjax.core import cohort_map

AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def one_client(shared, x, key):
    """Value, gradient with respect to `shared`, and a random draw."""

    def loss(w):
        return jnp.sum((w["a"] - x["a"]) ** 2) + w["b"] * x["b"]

    value, grad = jax.value_and_grad(loss)(shared)
    return {"grad": grad, "value": value, "noise": jax.random.normal(key, ())}


def inputs(count):
    rng = np.random.default_rng(count)
    shared = {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "b": jnp.float32(0.5)}
    x = {"a": jnp.asarray(rng.normal(size=(count, 3)), jnp.float32), "b": jnp.arange(count, dtype=jnp.float32)}
    return shared, x, jax.random.split(jax.random.key(0), count)


def oracle(shared, x):
    a, b = np.asarray(x["a"], np.float64), np.asarray(x["b"], np.float64)
    offset = np.asarray(shared["a"], np.float64) - a
    return {"a": 2 * offset, "b": b}, (offset**2).sum(1) + 0.5 * b


def check(map_fn, count):
    shared, x, keys = inputs(count)
    got = jax.jit(lambda *args: map_fn(one_client, *args))(shared, x, keys)
    grad, value = oracle(shared, x)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got["grad"], grad)
    np.testing.assert_allclose(got["value"], value, rtol=1e-5)
    np.testing.assert_allclose(got["noise"], [jax.random.normal(k, ()) for k in keys], rtol=1e-6)
    return got


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 9])
def test_chunks_on_one_device(chunk_size, count):
    check(cohort_map(chunk_size), count)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("chunk_size", "count"), [(None, 8), (None, 5), (1, 3), (2, 12), (2, 13)])
def test_mesh_of_four(axes, chunk_size, count):
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(AXES[axes],), devices=jax.devices()[:4])
    got = check(cohort_map(chunk_size, mesh), count)
    if count % 4 == 0:
        shardings = {x.sharding for x in jax.tree.leaves(got)}
        assert all(s.spec == P(("clients",)) or s.spec == P("clients") for s in shardings), shardings


def test_mesh_of_two_axes():
    mesh = jax.make_mesh((2, 2), ("hosts", "chips"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    got = check(cohort_map(mesh=mesh), 8)
    assert len(got["value"].sharding.device_set) == 4
    assert got["value"].sharding.shard_shape((8,)) == (2,)


def test_memory_of_a_chunk_and_not_of_the_cohort():
    """Each client makes an array of 400 kB and returns a scalar."""

    def wide(shared, x):
        return jnp.linalg.norm(jnp.sin(shared + x)[:, None] * jnp.cos(shared)[None, :] @ (shared + x))

    def temp(chunk_size):
        fun = jax.jit(lambda *args: cohort_map(chunk_size)(wide, *args))
        return fun.lower(jnp.ones(320), jnp.ones(64)).compile().memory_analysis().temp_size_in_bytes

    assert temp(4) < temp(None) / 8


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_must_be_positive(chunk_size):
    with pytest.raises(ValueError, match=f'chunk_size must be "auto", None or at least 1, got {chunk_size}'):
        cohort_map(chunk_size)


def test_clients_must_agree():
    with pytest.raises(ValueError, match="client axis"):
        cohort_map()(lambda shared, a, b: a + b, None, jnp.ones(3), jnp.ones(4))
