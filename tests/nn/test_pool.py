"""Max pooling against flax, and against the formula in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cedarjax.nn.pool import max_pool

GRID = [
    pytest.param(shape, window, strides, padding, id=f"{shape}-{window}-{strides}-{padding}")
    for shape, window, strides, padding in [
        ((2, 8, 3), (2,), None, "VALID"),
        ((2, 9, 3), (2,), (2,), "VALID"),
        ((2, 9, 3), (4,), None, "SAME"),
        ((2, 6, 7, 3), (2, 3), None, "VALID"),
        ((2, 7, 1, 3), (2, 1), None, "VALID"),
        ((2, 9, 3), (3,), (2,), "VALID"),
        ((2, 6, 7, 3), (2, 2), (1, 2), "VALID"),
        ((2, 6, 7, 3), (3, 3), (2, 2), "SAME"),
        ((2, 6, 7, 3), (3, 2), (1, 1), [(1, 2), (0, 1)]),
        ((2, 6, 7, 3), (5, 5), (2, 1), "SAME"),
        ((2, 70, 2), (65,), (1,), "VALID"),
    ]
]


@pytest.mark.parametrize(("shape", "window", "strides", "padding"), GRID)
def test_agrees_with_flax_in_value_and_derivatives(shape, window, strides, padding):
    x, dx = jax.random.normal(jax.random.key(0), (2, *shape))

    def pool_by_flax(x):
        return nnx.max_pool(x, window_shape=window, strides=strides or window, padding=padding)

    @jax.jit
    def ours(x, dx):
        pool = lambda x: max_pool(x, window, strides, padding)  # noqa: E731
        return pool(x), *jax.jvp(jax.grad(lambda x: jnp.square(pool(x)).sum()), (x,), (dx,))

    gradient_by_flax = jax.jit(jax.grad(lambda x: jnp.square(pool_by_flax(x)).sum()))
    out, grad, curvature = ours(x, dx)
    np.testing.assert_array_equal(out, pool_by_flax(x))
    np.testing.assert_allclose(grad, gradient_by_flax(x), rtol=1e-6)
    # The gradient of a sum of squares is linear as long as no maximum changes its place.
    ahead, behind = (gradient_by_flax(x + step * dx) for step in (1e-4, -1e-4))
    np.testing.assert_allclose(curvature, (ahead - behind) / 2e-4, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("shape", "window", "strides", "padding"), GRID[:-1])
def test_of_tied_values_the_first_gets_the_gradient_as_in_flax(shape, window, strides, padding):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, shape), jnp.float32)
    ours = jax.grad(lambda x: max_pool(x, window, strides, padding).sum())(x)
    theirs = jax.grad(lambda x: nnx.max_pool(x, window_shape=window, strides=strides or window, padding=padding).sum())(
        x
    )
    np.testing.assert_array_equal(ours, theirs)


def test_the_first_of_a_window_goes_along_the_last_axis():
    grad = jax.grad(lambda x: max_pool(x, (2, 2)).sum())(jnp.array([[[0.0, 1.0], [1.0, 1.0]]])[..., None])
    np.testing.assert_array_equal(grad[0, ..., 0], [[0.0, 1.0], [0.0, 0.0]])


def test_agrees_with_a_loop_over_padded_windows():
    x = np.float32(np.random.default_rng(0).normal(size=(2, 5, 6, 3))) - 10.0
    out = np.full((2, 3, 4, 3), -np.inf)
    for i, j, p, q in itertools.product(range(3), range(4), range(3), range(2)):
        row, column = 2 * i + p - 1, 2 * j + q - 1
        if 0 <= row < 5 and 0 <= column < 6:
            out[:, i, j] = np.maximum(out[:, i, j], x[:, row, column])
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), (3, 2), (2, 2), [(1, 1), (1, 1)]), np.float32(out))


def test_hessian_product_backwards_over_backwards():
    x, v = jax.random.normal(jax.random.key(0), (2, 2, 6, 6, 3))
    loss = lambda x: jnp.square(max_pool(x, (2, 2))).sum()  # noqa: E731
    product = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), v)))(x)
    holds = np.asarray(x) == np.asarray(max_pool(x, (2, 2))).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(product, np.where(holds, 2.0 * np.asarray(v), 0.0), rtol=1e-6)


def test_over_clients_it_stays_clear_of_select_and_scatter():
    xs = jax.random.normal(jax.random.key(0), (3, 2, 6, 7, 3))
    for strides, padding in ((None, "VALID"), ((1, 2), "SAME")):
        grad = jax.grad(lambda x, s=strides, p=padding: jnp.tanh(max_pool(x, (2, 2), s, p)).sum())
        together = jax.jit(jax.vmap(grad))
        np.testing.assert_allclose(together(xs), jax.lax.map(grad, xs), rtol=1e-6)
        text = together.lower(xs).as_text()
        assert "select_and_scatter" not in text and "reduce_window" not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_dtypes(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (2, 5, 3)), dtype)
    out = max_pool(x, (3,), (2,), "SAME")
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.float32(out), max_pool(x.astype(jnp.float32), (3,), (2,), "SAME"))
    if jnp.issubdtype(dtype, jnp.floating):
        assert jax.grad(lambda x: max_pool(x, (2,)).astype(jnp.float32).sum())(x).dtype == dtype


def test_keeps_float64(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)))
    assert jax.grad(lambda x: max_pool(x, (2,)).sum())(x).dtype == jnp.float64


@pytest.mark.parametrize(
    ("window", "strides", "padding", "message"),
    [
        ((2, 2), None, "VALID", "window must have 1 sizes"),
        ((0,), None, "VALID", "window must satisfy 1 <= window"),
        ((6,), None, "VALID", "window must satisfy 1 <= window"),
        ((2,), (0,), "VALID", "strides must be 1 numbers of at least 1"),
        ((2,), (1, 1), "VALID", "strides must be 1 numbers of at least 1"),
        ((2,), None, [(0, 0), (0, 0)], "padding must have 1 pairs"),
        ((2,), None, [(2, 0)], "padding must satisfy 0 <= padding < window"),
        ((2,), None, [(0, -1)], "padding must satisfy 0 <= padding < window"),
    ],
)
def test_windows_have_to_fit(window, strides, padding, message):
    with pytest.raises(ValueError, match=message):
        max_pool(jnp.ones((2, 5, 3)), window, strides, padding)
