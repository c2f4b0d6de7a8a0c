import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.nn.losses import cross_entropy, squared_error

KEY = jax.random.key(0)


def identity(params, x):
    return x


def test_cross_entropy_agrees_with_the_formula():
    logits = np.float32(np.random.default_rng(0).normal(size=(6, 4)))
    labels = np.array([0, 3, 1, 2, 2, 0], np.int32)
    probabilities = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(axis=1, keepdims=True)
    expected = -np.log(probabilities[np.arange(6), labels]).mean()
    batch = {"x": jnp.asarray(logits), "y": jnp.asarray(labels)}
    assert float(jax.jit(cross_entropy(identity))((), batch, KEY)) == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    batch = {"x": jnp.array([[1e30, 0.0], [-1e30, 1e30]]), "y": jnp.array([0, 1])}
    assert float(cross_entropy(identity)((), batch, KEY)) == 0.0


@pytest.mark.parametrize(("x_shape", "y_shape"), [((6,), (6,)), ((6, 1), (6,)), ((6, 1), (6, 1)), ((6, 3), (6, 3))])
def test_squared_error_agrees_with_the_formula(x_shape, y_shape):
    rng = np.random.default_rng(0)
    x, y = np.float32(rng.normal(size=x_shape)), np.float32(rng.normal(size=y_shape))
    expected = np.mean((np.float64(x).ravel() - y.ravel()) ** 2)
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    assert float(jax.jit(squared_error(identity))((), batch, KEY)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("make", "y"), [(cross_entropy, jnp.zeros(4, jnp.int32)), (squared_error, jnp.zeros(4))])
def test_half_precision_is_averaged_in_float32(make, y):
    batch = {"x": jnp.ones((4, 1), jnp.bfloat16), "y": y}
    assert make(identity)((), batch, KEY).dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "x_shape", "y", "error"),
    [
        (cross_entropy, (4, 3), jnp.zeros(4), TypeError),
        (cross_entropy, (4, 3), jnp.zeros((4, 1), jnp.int32), ValueError),
        (cross_entropy, (4,), jnp.zeros(4, jnp.int32), ValueError),
        (squared_error, (4, 1), jnp.zeros(4, jnp.int32), TypeError),
        (squared_error, (4, 2), jnp.zeros(4), ValueError),
        (squared_error, (4, 1), jnp.zeros((2, 2)), ValueError),
    ],
)
def test_bad_batches(make, x_shape, y, error):
    with pytest.raises(error, match="got"):
        make(identity)((), {"x": jnp.ones(x_shape), "y": y}, KEY)
