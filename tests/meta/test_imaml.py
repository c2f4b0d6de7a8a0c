import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from tests.meta import meta_oracles as oracle

CURVATURE = np.array([0.5, 1.0, 3.0])


def quadratic(w, batch, key):
    return 0.5 * jnp.mean(((w[None] - batch) ** 2) @ jnp.asarray(CURVATURE, w.dtype))


def quadratic_client(seed=0):
    rng = np.random.default_rng(seed)
    support, query, w = rng.normal(size=(4, 3)), rng.normal(size=(3, 3)), rng.normal(size=3)
    rows = jnp.asarray(np.concatenate([support, query, np.full((2, 3), np.nan)]))
    return cj.ClientData(rows, jnp.int32(7), jnp.int32(4)), support.mean(0), query.mean(0), w


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("lam", [0.1, 2.0])
def test_quadratic_in_closed_form(lam, damping, x64):
    """`v = (A s + lam w) / (A + lam)`, and the meta-gradient `A (v - q) / (1 + A / lam)`."""
    data, s, q, w = quadratic_client()
    local = cj.meta.imaml(quadratic, optax.sgd(0.6 / (3 + lam)), 400, lam, cg_tol=1e-12, damping=damping)
    delta, info = oracle.update(local, jnp.asarray(w), data)
    v = (CURVATURE * s + lam * w) / (CURVATURE + lam)
    np.testing.assert_allclose(delta, CURVATURE * (v - q) / (1 + damping + CURVATURE / lam), rtol=1e-9)
    assert info.residual < 1e-10 and info.inner_residual < 1e-8


def test_against_finite_differences(x64):
    """Of the query loss at the solution of the inner problem, as a function of where the pull comes from."""
    s, q, w = oracle.problem(1)
    lam = 0.3

    def objective(w):
        v = w
        for _ in range(40):
            jacobian = oracle.hessian(v, s) + lam * np.eye(len(w))
            v = v - np.linalg.solve(jacobian, oracle.grad(v, s) + lam * (v - w))
        return oracle.loss(v, q)

    local = cj.meta.imaml(oracle.loss_fn, optax.sgd(1.0), 200, lam, cg_tol=1e-10)
    delta, info = oracle.update(local, jnp.asarray(w), oracle.client(s, q))
    np.testing.assert_allclose(delta, oracle.slopes(objective, w), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(info.loss, objective(w), rtol=1e-9)
    np.testing.assert_allclose(info.support_loss, oracle.loss(w, s), rtol=1e-12)


def test_info_tells_how_far_from_the_formula_it_is(x64):
    data, s, q, w = quadratic_client()
    few = cj.meta.imaml(quadratic, optax.sgd(0.1), 2, 0.1, cg_steps=1)
    delta, info = oracle.update(few, jnp.asarray(w), data)
    v = w
    for _ in range(2):
        v = v - 0.1 * (CURVATURE * (v - s) + 0.1 * (v - w))
    target = CURVATURE * (v - q)
    left = target - (1 + CURVATURE / 0.1) * np.asarray(delta)
    np.testing.assert_allclose(info.residual, np.linalg.norm(left) / np.linalg.norm(target), rtol=1e-9)
    np.testing.assert_allclose(info.inner_residual, np.linalg.norm(CURVATURE * (v - s) + 0.1 * (v - w)), rtol=1e-9)
    assert info.residual > 1e-2


def test_lam_may_be_swept(x64):
    data, *_, w = quadratic_client()

    def delta(lam, damping):
        local = cj.meta.imaml(quadratic, optax.sgd(0.1), 20, lam, damping=damping)
        return local.update(jnp.asarray(w), (), data, jax.random.key(0))[0].delta

    lams, dampings = jnp.array([0.5, 2.0]), jnp.array([0.0, 1.0])
    swept = jax.jit(jax.vmap(delta))(lams, dampings)
    for row, lam, damping in zip(swept, lams, dampings, strict=True):
        np.testing.assert_allclose(row, delta(float(lam), float(damping)), rtol=1e-10)


@pytest.mark.standard_promotion
def test_memory_does_not_grow_with_the_inner_steps():
    def network(params, batch, key):
        h = batch
        for layer in params:
            h = jnp.tanh(h @ layer)
        return jnp.mean(h**2)

    params = [jnp.zeros((32, 32))] * 3
    data = cj.ClientData(jnp.zeros((64, 32)), jnp.int32(64), jnp.int32(32))
    few, many = (
        jax.jit(cj.meta.imaml(network, optax.adam(0.1), num_steps, 1.0).update)
        .lower(params, (), data, jax.random.key(0))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for num_steps in (2, 200)
    )
    assert many < few + 200 * 16  # a few numbers a step: keys, losses


@pytest.mark.parametrize("sets", ["no support", "no query"])
def test_a_client_without_support_or_query(sets, x64):
    s, q, w = oracle.problem(4)
    data = oracle.client(s, q)
    data = data._replace(num_support=jnp.int32(0) if sets == "no support" else data.num_examples)
    delta, info = oracle.update(cj.meta.imaml(oracle.loss_fn, optax.sgd(0.5), 3, 1.0), jnp.asarray(w), data)
    everything = {k: np.concatenate([s[k], q[k]]) for k in s}
    want = oracle.grad(w, everything) if sets == "no support" else np.zeros_like(w)
    np.testing.assert_allclose(delta, want, rtol=1e-9)
    assert info.residual < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"cg_steps": 0}, "cg_steps must be at least 1, got 0"),
        ({"query_batch_size": 0}, "query_batch_size must be at least 1, got 0"),
        ({"lam": 0.0}, "lam must be positive, got 0.0"),
        ({"cg_tol": 0.0}, "cg_tol must be positive, got 0.0"),
        ({"damping": -1.0}, "damping must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        cj.meta.imaml(oracle.loss_fn, optax.sgd(0.1), **{"num_steps": 1, "lam": 1.0, **options})
