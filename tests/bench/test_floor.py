"""Operations are counted as the algorithms need them: against XLA's count, and against every matmul written out."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import floor

SIZES = (96, 80, 64)
LAYERS = tuple(floor.dense(*pair) for pair in itertools.pairwise(SIZES))


def xla_operations(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


def matmul_operations(fun, *args):
    """Multiplications and additions of all matmuls in a function's jaxpr."""
    total = 0
    for equation in jax.make_jaxpr(fun)(*args).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    return total


def mlp_loss(params, x, y):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias[None])
    return 0.5 * jnp.square(x @ params[-1][0] + params[-1][1][None] - y).sum()


def mlp_case(sizes, num_examples, seed=0):
    rng = np.random.default_rng(seed)
    kernels = [0.1 * rng.standard_normal(pair) for pair in itertools.pairwise(sizes)]
    params = [(jnp.asarray(k, jnp.float32), jnp.zeros(k.shape[1], jnp.float32)) for k in kernels]
    x, y = (jnp.asarray(rng.standard_normal((num_examples, size)), jnp.float32) for size in (sizes[0], sizes[-1]))
    return params, x, y


def test_a_gradient_is_counted_as_xla_counts_it():
    counted = xla_operations(jax.grad(mlp_loss), *mlp_case(SIZES, 50))
    assert floor.gradient(LAYERS, 50) == 50 * (2 * 2 * 96 * 80 + 3 * 2 * 80 * 64)
    assert floor.gradient(LAYERS, 50) == pytest.approx(counted, rel=0.02)


def test_outputs_are_counted_as_xla_counts_them():
    params, x, y = mlp_case(SIZES, 50)
    assert floor.forward(LAYERS, 50) == pytest.approx(xla_operations(mlp_loss, params, x, y), rel=0.02)


def test_a_large_meta_gradient_is_counted_as_xla_counts_it():
    # With so many examples no layer gains from factors.
    params, x, y = mlp_case(SIZES, 200)

    def meta_loss(params):
        grads = jax.grad(mlp_loss)(params, x, y)
        return mlp_loss(jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), x + 1.0, y)

    count = floor.meta_gradient(LAYERS, 200, 200)
    assert count == 200 * (6 * 2 * 96 * 80 + 12 * 2 * 80 * 64)
    assert count == pytest.approx(xla_operations(jax.grad(meta_loss), params), rel=0.03)


def test_a_small_meta_gradient_takes_factors():
    num_support, num_query, lr = 5, 7, 0.1
    params, xs, ys = mlp_case(SIZES, num_support)
    _, xq, yq = mlp_case(SIZES, num_query, seed=1)
    w1, w2 = (kernel for kernel, _ in params)

    def loss(kernels, x, y):
        return 0.5 * jnp.square(jnp.tanh(x @ kernels[0]) @ kernels[1] - y).sum()

    def meta_loss(kernels):
        grads = jax.grad(loss)(kernels, xs, ys)
        return loss([k - lr * g for k, g in zip(kernels, grads, strict=True)], xq, yq)

    def with_factors(w1, w2):
        hs = jnp.tanh(xs @ w1)
        ds2 = hs @ w2 - ys
        back = ds2 @ w2.T
        ds1 = back * (1 - hs**2)
        x_gram = xq @ xs.T
        hq = jnp.tanh(xq @ w1 - lr * (x_gram @ ds1))
        h_gram = hq @ hs.T
        dq2 = hq @ w2 - lr * (h_gram @ ds2) - yq
        d_gram = dq2 @ ds2.T
        dq1 = (dq2 @ w2.T - lr * (d_gram @ hs)) * (1 - hq**2)
        hs_along = (1 - hs**2) * (x_gram.T @ dq1)
        ds2_along = hs_along @ w2 + h_gram.T @ dq2
        ds1_along = (ds2_along @ w2.T + d_gram.T @ hq) * (1 - hs**2) - 2 * back * hs * hs_along
        return xq.T @ dq1 - lr * (xs.T @ ds1_along), hq.T @ dq2 - lr * (hs_along.T @ ds2 + hs.T @ ds2_along)

    for got, want in zip(with_factors(w1, w2), jax.grad(meta_loss)([w1, w2]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6 * np.abs(want).max())
    count = floor.meta_gradient(LAYERS, num_support, num_query)
    assert count == matmul_operations(with_factors, w1, w2)
    assert count < matmul_operations(jax.grad(meta_loss), [w1, w2])


@pytest.mark.parametrize(("side", "window", "num_in", "num_out"), [(28, 3, 1, 16), (14, 5, 32, 64), (8, 1, 3, 2)])
def test_a_convolution_is_counted_as_xla_counts_it(side, window, num_in, num_out):
    layer = floor.conv(side, window, num_in, num_out)
    x, kernel = jnp.zeros((2, side, side, num_in)), jnp.zeros((window, window, num_in, num_out))

    def fun(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert 2 * layer.operations == pytest.approx(xla_operations(fun, x, kernel), rel=1e-6)
    assert layer.num_params == kernel.size + num_out
    assert (layer.num_in, layer.num_positions) == (window**2 * num_in, side**2)


def test_the_floor_is_what_takes_longer():
    ceilings = floor.Ceilings(operations=100.0, bytes=10.0)
    assert ceilings.seconds(floor.Work(200.0, 1.0)) == 2.0
    assert ceilings.seconds(floor.Work(200.0, 50.0)) == 5.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ceilings_are_measured(dtype):
    ceilings = floor.measure_ceilings(dtype, side=16, repeats=1)
    assert ceilings.operations > 0 and ceilings.bytes > 0
