"""Meta-gradients against closed forms, finite differences and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax.core import ClientData
from cedarjax.meta import maml

SUPPORT, QUERY = 4, 3


def quadratic(params, batch, key):
    """`mean (theta - c)^T A (theta - c) / 2` with a curvature that is not a multiple of the identity."""
    curvature = jnp.array([[2.0, 0.5], [0.5, 1.0]], params.dtype)
    error = params[None] - batch
    return 0.5 * jnp.einsum("bi,ij,bj->b", error, curvature, error).mean()


def episode(length=9, dtype=np.float32, seed=0):
    centers = np.random.default_rng(seed).normal(size=(length, 2)).astype(dtype)
    centers[SUPPORT + QUERY :] = np.nan
    return ClientData(jnp.asarray(centers), jnp.int32(SUPPORT + QUERY), jnp.int32(SUPPORT))


def closed_form(data, start, rate, num_steps, first_order):
    """`theta_m - c_s = (I - rate A)^m (theta - c_s)`; gradient `J^T A (theta_m - c_q)` with `J = (I - rate A)^m`."""
    a = np.array([[2.0, 0.5], [0.5, 1.0]])
    rows = np.asarray(data.examples, np.float64)
    support, query = rows[:SUPPORT].mean(0), rows[SUPPORT : SUPPORT + QUERY].mean(0)
    jacobian = np.linalg.matrix_power(np.eye(2) - rate * a, num_steps)
    adapted = support + jacobian @ (start - support)
    outer = a @ (adapted - query)
    return outer if first_order else jacobian.T @ outer


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_quadratics_have_their_closed_form(num_steps, first_order, remat):
    start = np.array([1.5, -0.5])
    local = maml(quadratic, optax.sgd(0.3), num_steps, first_order=first_order, remat=remat)
    upload, _, _ = local.update(jnp.asarray(start, jnp.float32), (), episode(), jax.random.key(0))
    np.testing.assert_allclose(
        upload.delta, closed_form(episode(), start, 0.3, num_steps, first_order), rtol=1e-6, atol=1e-6
    )


def mlp_loss(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["one"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["two"], batch["y"]).mean()


def mlp_episode(dtype=np.float32, length=12):
    rng = np.random.default_rng(1)
    examples = {"x": jnp.asarray(rng.normal(size=(length, 3)), dtype), "y": jnp.asarray(rng.integers(0, 4, length))}
    params = {"one": jnp.asarray(rng.normal(size=(3, 5)), dtype), "two": jnp.asarray(rng.normal(size=(5, 4)), dtype)}
    return params, ClientData(examples, jnp.int32(10), jnp.int32(5))


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "inner_tx",
    [optax.sgd(0.4), optax.sgd(0.2, momentum=0.9), optax.adam(0.05, eps_root=1e-6)],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_second_order_equals_finite_differences_in_float64(inner_tx, batch_size, x64):
    params, data = mlp_episode(np.float64)
    local = maml(mlp_loss, inner_tx, 3, batch_size=batch_size, query_batch_size=batch_size)
    update = jax.jit(lambda p: local.update(p, (), data, jax.random.key(0)))
    upload = update(params)[0]
    rng, step = np.random.default_rng(2), 1e-5
    for _ in range(3):
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        ahead, behind = (
            update(jax.tree.map(lambda x, d, sign=sign: x + sign * step * d, params, direction))[2].loss
            for sign in (1, -1)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), upload.delta, direction)))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


def test_first_order_is_the_query_gradient_at_the_adapted_parameters():
    params, data = mlp_episode()
    local = maml(mlp_loss, optax.sgd(0.3), 2, first_order=True)
    upload, _, info = local.update(params, (), data, jax.random.key(0))
    rows = {k: np.asarray(v) for k, v in data.examples.items()}
    support, query = ({k: jnp.asarray(v[a:b]) for k, v in rows.items()} for a, b in ((0, 5), (5, 10)))
    adapted = params
    for _ in range(2):
        grads = jax.grad(mlp_loss)(adapted, support, None)
        adapted = jax.tree.map(lambda p, g: p - 0.3 * g, adapted, grads)
    expected = jax.grad(mlp_loss)(adapted, query, None)
    for name in params:
        np.testing.assert_allclose(upload.delta[name], expected[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.loss, mlp_loss(adapted, query, None), rtol=1e-6)
    np.testing.assert_allclose(info.support_loss, mlp_loss(params, support, None), rtol=1e-6)


def test_remat_changes_no_number_and_saves_memory():
    width, rows = 64, 256
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(width, width)) / 8, jnp.float32) for name in "abcd"}
    examples = {"x": jnp.asarray(rng.normal(size=(2 * rows, width)), jnp.float32)}
    data = ClientData(examples, jnp.int32(2 * rows), jnp.int32(rows))

    def deep(params, batch, key):
        x = batch["x"]
        for name in "abcd":
            x = jnp.tanh(x @ params[name])
        return jnp.mean(x**2)

    def compiled(remat):
        local = maml(deep, optax.sgd(0.1), 10, remat=remat, batch_size=rows, query_batch_size=rows)
        return jax.jit(lambda p: local.update(p, (), data, jax.random.key(0))[0].delta).lower(params).compile()

    with_remat, without = compiled(True), compiled(False)
    for a, b in zip(*(jax.tree.leaves(program(params)) for program in (with_remat, without)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    ratio = with_remat.memory_analysis().temp_size_in_bytes / without.memory_analysis().temp_size_in_bytes
    assert ratio < 0.35


@pytest.mark.standard_promotion
def test_adam_needs_an_eps_root_where_a_gradient_is_zero():
    def blind(params, batch, key):
        return jnp.mean((batch @ params - 1.0) ** 2)

    # The second feature is always 0, and so is the gradient of its parameter.
    data = ClientData(jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.int32(2), jnp.int32(1))

    def delta(eps_root):
        local = maml(blind, optax.adam(0.1, eps_root=eps_root), 2)
        return local.update(jnp.zeros(2), (), data, jax.random.key(0))[0].delta

    assert not jnp.isfinite(delta(0.0)).all()
    assert jnp.isfinite(delta(1e-8)).all()


def test_a_batch_of_everything_is_the_whole_set():
    data = episode(length=SUPPORT + QUERY)
    whole = maml(quadratic, optax.sgd(0.3), 2)
    batched = maml(quadratic, optax.sgd(0.3), 2, batch_size=SUPPORT, query_batch_size=QUERY)
    a, b = (local.update(jnp.ones(2), (), data, jax.random.key(0))[0].delta for local in (whole, batched))
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("size", [None, 2])
def test_no_support_means_no_adaptation(size):
    data = episode()._replace(num_support=jnp.int32(0))
    local = maml(quadratic, optax.sgd(0.3), 2, batch_size=size)
    upload, _, _ = local.update(jnp.ones(2), (), data, jax.random.key(0))
    rows = np.asarray(data.examples)[: SUPPORT + QUERY]
    expected = np.array([[2.0, 0.5], [0.5, 1.0]]) @ (np.ones(2) - rows.mean(0))
    np.testing.assert_allclose(upload.delta, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"num_steps": 0}, {"num_steps": 1, "batch_size": 0}, {"num_steps": 1, "query_batch_size": 0}]
)
def test_bad_counts_are_named(options):
    name = list(options)[-1]
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        maml(quadratic, optax.sgd(0.1), **options)
