"""The convolution as matmuls, against `lax` and against a loop in numpy."""

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
        ((2, 9, 12), (3, 12, 4), (1,), "SAME", (1,)),
        ((2, 9, 12), (5, 12, 4), (2,), [(-1, 3)], (2,)),
        ((2, 6, 5, 12), (3, 3, 12, 4), (1, 2), "SAME", (2, 1)),
        ((2, 6, 7, 12), (1, 2, 12, 40), (1, 1), [(0, 0), (-1, -1)], (1, 1)),
    ]
]
GROUPS = [
    pytest.param(x, w, groups, strides, padding, dilation, id=f"{x}-{w}-{groups}-{strides}-{padding}-{dilation}")
    for x, w, groups, strides, padding, dilation in [
        ((2, 12, 4), (5, 2, 6), 2, (1,), "SAME", (1,)),
        ((2, 13, 6), (3, 2, 3), 3, (2,), [(-1, 2)], (2,)),
        ((2, 6, 5, 4), (3, 3, 2, 4), 2, (1, 1), "SAME", (1, 1)),
        ((2, 7, 6, 24), (2, 3, 12, 4), 2, (2, 1), "VALID", (1, 2)),
        ((2, 12, 4), (5, 1, 4), 4, (1,), "SAME_LOWER", (1,)),
        ((2, 12, 4), (3, 1, 12), 4, (2,), [(1, -2)], (2,)),
        ((2, 6, 5, 3), (3, 3, 1, 3), 3, (1, 1), "SAME", (1, 1)),
        ((2, 6, 7, 3), (3, 2, 1, 6), 3, (2, 1), "VALID", (1, 2)),
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
def check_two_derivatives(x, w, strides, padding, **options):
    """Values, gradients, and derivatives of the gradients forwards, against `lax` in float64."""

    def derivatives(conv, x, w, dx, dw):
        def out(x, w):
            return conv(x, w, strides, padding, dimension_numbers=LAST[x.ndim], **options)

        grad = jax.grad(lambda x, w: jnp.tanh(0.2 * out(x, w)).sum(), argnums=(0, 1))
        return out(x, w), jax.jvp(grad, (x, w), (dx, dw))

    derivatives = jax.jit(derivatives, static_argnums=0)
    args = draw(x, w, x, w)
    with jax.enable_x64(True):
        expected = derivatives(lax.conv_general_dilated, *(np.float64(arg) for arg in args))
    actual = derivatives(conv_general_dilated, *args)
    assert jax.tree.map(jnp.shape, actual) == jax.tree.map(jnp.shape, expected)
    close(actual, expected)


@pytest.mark.parametrize(("x", "w", "strides", "padding", "dilation"), GRID)
def test_agrees_with_lax_in_value_and_two_derivatives(x, w, strides, padding, dilation):
    options = {"rhs_dilation": dilation}
    names = lowered(conv_general_dilated, x, w, strides, padding, dimension_numbers=LAST[len(x)], **options)
    assert "dot_general" in names and "conv_general_dilated" not in names
    check_two_derivatives(x, w, strides, padding, **options)


@pytest.mark.parametrize(("x", "w", "groups", "strides", "padding", "dilation"), GROUPS)
def test_groups_agree_with_lax_in_value_and_two_derivatives(x, w, groups, strides, padding, dilation):
    options = {"rhs_dilation": dilation, "feature_group_count": groups}
    names = lowered(conv_general_dilated, x, w, strides, padding, dimension_numbers=LAST[len(x)], **options)
    assert "conv_general_dilated" not in names and ("dot_general" in names) == (w[-2] > 1)
    check_two_derivatives(x, w, strides, padding, **options)


def test_second_derivative_backwards_over_backwards():
    x, w, v = draw((2, 6, 5, 3), (3, 3, 3, 4), (3, 3, 3, 4))

    def product(conv, w):  # the Hessian times v, as MAML takes it
        loss = lambda w: jnp.tanh(0.2 * conv(x, w, (1, 1), "SAME", dimension_numbers=LAST[4])).sum()  # noqa: E731
        return jax.jit(jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w), v)))(w)

    close(product(conv_general_dilated, w), product(lax.conv_general_dilated, w))


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


def test_layouts_of_groups():
    x, w = draw((2, 6, 8, 7), (12, 2, 3, 2))
    options = {"dimension_numbers": ("NHCW", "OIHW", "NCHW"), "feature_group_count": 4}
    close(
        conv_general_dilated(x, w, (2, 1), "SAME", **options), lax.conv_general_dilated(x, w, (2, 1), "SAME", **options)
    )


@pytest.mark.parametrize(
    ("x", "w", "groups"),
    [
        ((2, 12, 3), (5, 3, 4), 1),
        ((2, 6, 5, 3), (3, 3, 3, 4), 1),
        ((2, 6, 5, 12), (3, 3, 12, 4), 1),
        ((2, 6, 5, 4), (3, 3, 2, 6), 2),
    ],
)
def test_a_set_of_weights_per_client_is_a_batched_matmul(x, w, groups):
    options = {"dimension_numbers": LAST[len(x)], "feature_group_count": groups}
    xs, ws = draw((3, *x), (3, *w))

    def grads(conv, x, w):
        out = lambda x, w: conv(x, w, (1,) * (x.ndim - 2), "SAME", **options)  # noqa: E731
        return jax.grad(lambda x, w: jnp.tanh(out(x, w)).sum(), (0, 1))(x, w)

    over_clients = jax.jit(jax.vmap(grads, in_axes=(None, 0, 0)), static_argnums=0)
    close(over_clients(conv_general_dilated, xs, ws), over_clients(lax.conv_general_dilated, xs, ws), 1e-4)
    text = jax.jit(lambda x, w: over_clients(conv_general_dilated, x, w)).lower(xs, ws).as_text()
    assert "batching_dims = [0" in text and "stablehlo.convolution" not in text


def test_depthwise_with_a_set_of_weights_per_client():
    xs, ws = draw((3, 2, 9, 4), (3, 3, 1, 8))
    options = {"dimension_numbers": LAST[3], "feature_group_count": 4}
    ours, theirs = (
        jax.jit(jax.vmap(lambda x, w: conv(x, w, (2,), "SAME", **options)))(xs, ws)  # noqa: B023
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    close(ours, theirs)


FALLBACK = {
    "batch groups beside one feature group": ((4, 8, 4), (3, 4, 6), {"batch_group_count": 2}),
    "whole numbers": ((2, 8, 4), (3, 4, 6), {"dtype": jnp.int32}),
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
    dtype = options.pop("dtype", jnp.float32)
    args = [arg.astype(dtype) for arg in draw(x, w)]
    jaxpr = jax.make_jaxpr(lambda x, w: conv_general_dilated(x, w, strides, padding, **options))(*args)
    assert "conv_general_dilated" in {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
    ours = conv_general_dilated(*args, strides, padding, **options)
    theirs = lax.conv_general_dilated(*args, strides, padding, **options)
    assert ours.shape == theirs.shape
    close(ours, theirs)


def test_errors_are_those_of_lax():
    x, w = draw((2, 8, 4), (3, 5, 6))
    with pytest.raises(ValueError, match="feature"):
        conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3])
    with pytest.raises(ValueError, match="feature_group_count"):
        conv_general_dilated(x, w[:, :2], (1,), "SAME", dimension_numbers=LAST[3], feature_group_count=4)
    with pytest.raises(TypeError):
        conv_general_dilated(x, w[:, :4].astype(jnp.bfloat16), (1,), "SAME", dimension_numbers=LAST[3])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("wanted", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(dtype, wanted, groups):
    x, w = (a.astype(dtype) for a in draw((2, 8, 4), (3, 4 // groups, 8)))
    options = {"dimension_numbers": LAST[3], "feature_group_count": groups}
    out = conv_general_dilated(x, w, (1,), "SAME", preferred_element_type=wanted, **options)
    assert out.dtype == (wanted or dtype)
    with jax.enable_x64(True):
        exact = lax.conv_general_dilated(np.float64(x), np.float64(w), (1,), "SAME", **options)
    close(np.float64(out), exact, 1e-5 if out.dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("precision", [None, "highest", lax.Precision.HIGH, (lax.Precision.HIGHEST,) * 2])
def test_precision_is_that_of_the_matmul(precision):
    x, w = draw((2, 8, 4), (3, 4, 6))
    jaxpr = jax.make_jaxpr(
        lambda x, w: conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3], precision=precision)
    )(x, w)
    (matmul,) = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "dot_general"]
    expected = jax.make_jaxpr(lambda x, w: lax.dot(x, w, precision=precision))(x[0], w[0])
    assert matmul.params["precision"] == expected.jaxpr.eqns[0].params["precision"]


def test_keeps_float64(x64):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, 8, 4))), jnp.asarray(rng.normal(size=(3, 4, 6)))
    out = conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3])
    assert out.dtype == jnp.float64
    close(out, lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=LAST[3]), 1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", 2, (1,)])
def test_is_taken_by_flax(padding, groups):
    layers = [
        nnx.Conv(3, 6, (5,), padding=padding, feature_group_count=groups, conv_general_dilated=conv, rngs=nnx.Rngs(0))
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    ]
    (x,) = draw((2, 12, 3))
    close(layers[0](x), layers[1](x))
