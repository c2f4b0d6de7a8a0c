"""The convolution as a matmul, against `lax` and against a loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from cedarjax.nn.conv import conv_general_dilated

LAST = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}
GRID = [
    pytest.param(x, w, strides, padding, dilation, id=f"{x}-{w}-{strides}-{padding}-{dilation}")
    for x, w, strides, padding, dilation in [
        ((2, 12, 3), (5, 3, 4), (1,), "SAME", None),
        ((2, 12, 3), (5, 3, 4), (2,), "SAME", (1,)),
        ((2, 13, 3), (4, 3, 4), (3,), "SAME_LOWER", (1,)),
        ((2, 13, 3), (3, 3, 4), (2,), "VALID", (2,)),
        ((2, 10, 3), (3, 3, 4), (1,), [(2, 0)], (2,)),
        ((2, 10, 3), (3, 3, 4), (1,), [(-2, 1)], (1,)),
        ((2, 7, 3), (1, 3, 4), (1,), "SAME", (1,)),
        ((2, 7, 3), (1, 3, 4), (3,), "VALID", (1,)),
        ((2, 6, 5, 3), (3, 3, 3, 4), (1, 1), "SAME", None),
        ((2, 7, 8, 3), (3, 2, 3, 4), (2, 3), "SAME", (1, 1)),
        ((2, 9, 8, 1), (3, 2, 1, 4), (1, 2), "VALID", (2, 3)),
        ((2, 6, 5, 3), (3, 3, 3, 1), (2, 1), [(1, 2), (0, 3)], (1, 2)),
        ((1, 4, 4, 2), (4, 4, 2, 3), (1, 1), "VALID", (1, 1)),
    ]
]


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def lowered(conv, x_shape, w_shape, *args, **kwargs):
    """Names of the primitives that a convolution is traced to."""
    x, w = draw(x_shape, w_shape)
    jaxpr = jax.make_jaxpr(lambda x, w: conv(x, w, *args, **kwargs))(x, w)
    return {equation.primitive.name for equation in jaxpr.jaxpr.eqns}


# In float32 XLA:CPU differentiates a convolution with negative padding wrongly, so the oracle runs in float64.
@pytest.mark.parametrize(("x", "w", "strides", "padding", "dilation"), GRID)
def test_agrees_with_lax_in_value_and_two_derivatives(x, w, strides, padding, dilation):
    options = {"rhs_dilation": dilation, "dimension_numbers": LAST[len(x)]}
    names = lowered(conv_general_dilated, x, w, strides, padding, **options)
    assert "dot_general" in names and "conv_general_dilated" not in names

    def derivatives(conv, x, w, dx, dw):
        def out(x, w):
            return conv(x, w, strides, padding, **options)

        grad = jax.grad(lambda x, w: jnp.tanh(out(x, w)).sum(), argnums=(0, 1))
        return out(x, w), jax.jvp(grad, (x, w), (dx, dw))

    derivatives = jax.jit(derivatives, static_argnums=0)
    args = draw(x, w, x, w)
    with jax.enable_x64(True):
        expected = derivatives(lax.conv_general_dilated, *(np.float64(arg) for arg in args))
    actual = derivatives(conv_general_dilated, *args)
    assert jax.tree.map(jnp.shape, actual) == jax.tree.map(jnp.shape, expected)
    close(actual, expected, 1e-4)
    close(actual[0], expected[0])


def test_agrees_with_a_loop():
    x, w = draw((2, 6, 5, 3), (3, 2, 3, 4))
    expected = np.zeros((2, 2, 4, 4))
    for b, i, j, o in np.ndindex(expected.shape):
        expected[b, i, j, o] = np.sum(np.float64(x[b, 2 * i : 2 * i + 3, j : j + 2]) * np.float64(w[..., o]))
    close(conv_general_dilated(x, w, (2, 1), "VALID", dimension_numbers=LAST[4]), expected)


@pytest.mark.parametrize(
    "numbers",
    [None, ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NCHW"), ("CNHW", "IHWO", "HWNC"), ("NHWC", "HWOI", "NHWC")],
)
def test_layouts(numbers):
    sizes = {"N": 2, "C": 3, "H": 6, "W": 5}, {"O": 4, "I": 3, "H": 3, "W": 2}
    lhs, rhs, _ = numbers or ("NCHW", "OIHW", "NCHW")
    x, w = draw([sizes[0][axis] for axis in lhs], [sizes[1][axis] for axis in rhs])
    close(
        conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers),
        lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers),
    )


@pytest.mark.parametrize(("x", "w"), [((2, 12, 3), (5, 3, 4)), ((2, 6, 5, 3), (3, 3, 3, 4))])
def test_a_set_of_weights_per_client_is_a_batched_matmul(x, w):
    numbers = LAST[len(x)]
    xs, ws = draw((3, *x), (3, *w))

    def grads(conv, x, w):
        return jax.grad(
            lambda x, w: jnp.tanh(conv(x, w, (1,) * (x.ndim - 2), "SAME", dimension_numbers=numbers)).sum(), (0, 1)
        )(x, w)

    over_clients = jax.vmap(grads, in_axes=(None, 0, 0))
    close(over_clients(conv_general_dilated, xs, ws), over_clients(lax.conv_general_dilated, xs, ws), 1e-4)
    text = jax.jit(lambda x, w: over_clients(conv_general_dilated, x, w)).lower(xs, ws).as_text()
    assert "batching_dims = [0]" in text and "stablehlo.convolution" not in text


FALLBACK = {
    "groups": ((2, 8, 4), (3, 2, 6), {"feature_group_count": 2}),
    "batch groups": ((2, 8, 4), (3, 4, 6), {"batch_group_count": 2}),
    "input dilation": ((2, 8, 4), (3, 4, 6), {"lhs_dilation": (2,)}),
    "three spatial dimensions": ((1, 4, 4, 4, 2), (2, 2, 2, 2, 3), {}),
    "no window fits": ((2, 3, 4), (5, 4, 6), {}),
    "no rows": ((0, 8, 4), (5, 4, 6), {}),
}


@pytest.mark.parametrize(("x", "w", "options"), FALLBACK.values(), ids=FALLBACK)
def test_the_rest_goes_to_lax(x, w, options):
    options = options | {"dimension_numbers": (LAST | {5: ("NDHWC", "DHWIO", "NDHWC")})[len(x)]}
    strides, padding = (1,) * (len(x) - 2), [(0, 0)] * (len(x) - 2)
    args = draw(x, w)
    assert "conv_general_dilated" in lowered(conv_general_dilated, x, w, strides, padding, **options)
    ours = conv_general_dilated(*args, strides, padding, **options)
    theirs = lax.conv_general_dilated(*args, strides, padding, **options)
    assert ours.shape == theirs.shape
    close(ours, theirs)


def test_errors_are_those_of_lax():
    x, w = draw((2, 8, 4), (3, 5, 6))
    with pytest.raises(ValueError, match="feature"):
        conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3])
    with pytest.raises(TypeError):
        conv_general_dilated(x, w[:, :4].astype(jnp.bfloat16), (1,), "SAME", dimension_numbers=LAST[3])


@pytest.mark.parametrize("wanted", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(dtype, wanted):
    x, w = (a.astype(dtype) for a in draw((2, 8, 4), (3, 4, 6)))
    out = conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3], preferred_element_type=wanted)
    assert out.dtype == (wanted or dtype)


def test_keeps_float64(x64):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, 8, 4))), jnp.asarray(rng.normal(size=(3, 4, 6)))
    out = conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3])
    assert out.dtype == jnp.float64
    close(out, lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3]), 1e-12)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", 2, (1,)])
def test_is_taken_by_flax(padding):
    layers = [
        nnx.Conv(3, 4, (5,), padding=padding, conv_general_dilated=conv, rngs=nnx.Rngs(0))
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    ]
    (x,) = draw((2, 12, 3))
    close(layers[0](x), layers[1](x))
