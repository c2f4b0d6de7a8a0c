import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cedarjax.nn.pool import max_pool


@pytest.mark.parametrize(
    ("shape", "window", "strides"),
    [
        ((2, 8, 3), (2,), None),
        ((2, 9, 3), (2,), (2,)),
        ((2, 9, 3), (4,), None),
        ((2, 6, 7, 3), (2, 3), None),
        ((2, 7, 1, 3), (2, 1), None),
        ((2, 9, 3), (3,), (2,)),
        ((2, 6, 7, 3), (2, 2), (1, 2)),
    ],
)
def test_agrees_with_flax_in_value_and_gradient(shape, window, strides):
    x = jax.random.normal(jax.random.key(0), shape)

    def both(pool):
        return pool(x), jax.grad(lambda x: jnp.tanh(pool(x)).sum())(x)

    ours = both(jax.jit(lambda x: max_pool(x, window, strides)))
    theirs = both(lambda x: nnx.max_pool(x, window_shape=window, strides=strides or window))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_ties_share_the_gradient():
    grad = jax.grad(lambda x: max_pool(x, (2,)).sum())(jnp.ones((1, 4, 1)))
    np.testing.assert_allclose(grad, 0.5 * np.ones((1, 4, 1)))


@pytest.mark.parametrize("window", [(2, 2), (0,), (6,)])
def test_the_window_has_to_fit(window):
    with pytest.raises(ValueError, match="window must"):
        max_pool(jnp.ones((2, 5, 3)), window)
