import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cedarjax.nn.norm import GroupNorm, group_norm


def oracle(x, scale, bias, num_groups, epsilon=1e-6):
    x = np.float64(x)
    grouped = x.reshape(x.shape[0], -1, num_groups, x.shape[-1] // num_groups)
    mean, variance = (moment(grouped, axis=(1, 3), keepdims=True) for moment in (np.mean, np.var))
    return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("shape", [(3, 7, 6), (2, 4, 5, 6), (2, 6)])
@pytest.mark.parametrize("num_groups", [1, 3, 6])
def test_agrees_with_the_formula(shape, num_groups):
    rng = np.random.default_rng(0)
    x, scale, bias = (np.float32(rng.normal(2.0, 3.0, size)) for size in (shape, 6, 6))
    out = jax.jit(group_norm, static_argnames="num_groups")(x, scale, bias, num_groups=num_groups)
    np.testing.assert_allclose(out, oracle(x, scale, bias, num_groups), rtol=1e-4, atol=1e-4)


def test_agrees_with_flax_to_the_second_derivative():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 6))
    direction = jax.random.normal(jax.random.key(1), x.shape)

    def derivatives(layer):
        grad = jax.grad(lambda x: jnp.tanh(layer(x)).sum())
        return layer(x), grad(x), jax.jvp(grad, (x,), (direction,))[1]

    ours = derivatives(GroupNorm(6, 3, rngs=nnx.Rngs(0)))
    theirs = derivatives(nnx.GroupNorm(6, 3, use_fast_variance=False, rngs=nnx.Rngs(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_a_large_common_offset_does_not_cancel():
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 50, 4)) + 1000.0)
    out = group_norm(jnp.asarray(x), jnp.ones(4), jnp.zeros(4), num_groups=2)
    np.testing.assert_allclose(out, oracle(x, 1.0, 0.0, 2), atol=2e-3)


def test_a_constant_group_gives_the_bias_and_finite_gradients():
    def loss(x):
        return group_norm(x, jnp.ones(4), jnp.full(4, 0.5), num_groups=2).sum()

    x = jnp.full((2, 3, 4), 7.0)
    assert float(loss(x)) == 0.5 * x.size
    assert jnp.isfinite(jax.grad(lambda x: jnp.square(jax.grad(loss)(x)).sum())(x)).all()


def test_keeps_half_precision_and_takes_its_moments_in_float32():
    x = 300.0 + jax.random.normal(jax.random.key(0), (2, 400, 4))
    half = x.astype(jnp.bfloat16)
    out = group_norm(half, jnp.ones(4, jnp.bfloat16), jnp.zeros(4, jnp.bfloat16), num_groups=2)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), oracle(half.astype(jnp.float32), 1.0, 0.0, 2), atol=0.02)


@pytest.mark.parametrize("num_groups", [0, 4])
def test_groups_have_to_divide_the_channels(num_groups):
    with pytest.raises(ValueError, match=f"num_groups must divide the number of channels, got {num_groups} and 6"):
        group_norm(jnp.ones((2, 6)), jnp.ones(6), jnp.zeros(6), num_groups=num_groups)
