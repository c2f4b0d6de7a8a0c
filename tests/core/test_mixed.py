import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core import mixed_value_and_grad


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def fun(params, x, slow):
    hidden = jnp.tanh(x @ params["in"] + slow[None])
    return jnp.mean((hidden @ params["out"]) ** 3 + jax.nn.logsumexp(hidden, axis=1))


def arguments():
    return {"in": draw(3, 4), "out": draw(4)}, draw(5, 3), draw(4, seed=1)


def assert_close(got, want, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13), got, want)


def derivative(transform, *args, argnums=(0, 2)):
    """Derivative of a number made of the value and the gradient."""

    def outer(*args):
        value, grads = transform(fun)(*args)
        return 0.7 * value + sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(grads))

    return jax.grad(outer, argnums)(*args)


def test_value_and_gradient_are_the_usual_ones(x64):
    assert_close(mixed_value_and_grad(fun)(*arguments()), jax.value_and_grad(fun)(*arguments()))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("argnums", [0, 1, (0, 2), (0, 1, 2)])
def test_derivatives_are_those_of_reverse_over_reverse(argnums, jit, x64):
    args = arguments()
    run = functools.partial(derivative, mixed_value_and_grad, argnums=argnums)
    assert_close((jax.jit(run) if jit else run)(*args), derivative(jax.value_and_grad, *args, argnums=argnums))


def test_against_finite_differences(x64):
    params, x, slow = arguments()
    along = {"in": draw(3, 4, seed=2), "out": draw(4, seed=3)}

    def outer(eps):
        grads = jax.grad(fun)(jax.tree.map(lambda p, a: p + eps * a, params, along), x, slow)
        return sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))

    def squared(params):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(mixed_value_and_grad(fun)(params, x, slow)[1]))

    slope = sum(jnp.vdot(g, a) for g, a in zip(*map(jax.tree.leaves, (jax.grad(squared)(params), along)), strict=True))
    np.testing.assert_allclose(slope, (outer(1e-5) - outer(-1e-5)) / 2e-5, rtol=1e-7)


def descended(transform, params, x, slow, *, checkpoint=True):
    """Steps in a scan whose loss closes over everything but the parameters."""

    def step(params, index):
        value, grads = transform(lambda p: fun(p, x * (1 + index), slow))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    body = jax.checkpoint(step, prevent_cse=False) if checkpoint else step
    params, values = jax.lax.scan(body, params, jnp.arange(3.0))
    return fun(params, x, slow) + values.sum()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
def test_closures_in_a_scan_are_differentiated(wrap, checkpoint, x64):
    args = arguments()
    run = wrap(functools.partial(descended, mixed_value_and_grad, checkpoint=checkpoint))
    assert_close(
        jax.grad(run, (0, 1, 2))(*args), jax.grad(functools.partial(descended, jax.value_and_grad), (0, 1, 2))(*args)
    )


@pytest.mark.parametrize("jit", [False, True])
def test_vmap_over_everything_that_is_closed_over(jit, x64):
    params, _, slow = arguments()
    clients = draw(6, 5, 3, seed=4)

    def gradients(transform, params, slow):
        grad = jax.grad(functools.partial(descended, transform), (0, 2))
        return jax.vmap(grad, in_axes=(None, 0, None))(params, clients, slow)

    run = functools.partial(gradients, mixed_value_and_grad)
    assert_close((jax.jit(run) if jit else run)(params, slow), gradients(jax.value_and_grad, params, slow))


def test_reverse_mode_again(x64):
    args = arguments()

    def third(transform):
        return jax.grad(lambda p: jnp.sum(derivative(transform, p, *args[1:], argnums=0)["in"] ** 2))(args[0])

    assert_close(third(mixed_value_and_grad), third(jax.value_and_grad))


def test_what_is_not_differentiated_needs_no_derivative(x64):
    @jax.custom_jvp
    def opaque(x):
        return jnp.round(x)

    @opaque.defjvp
    def _(primals, tangents):
        raise AssertionError("data must not be differentiated")

    def loss(w, batch, key):
        noise = jax.random.normal(key, w.shape, w.dtype)
        return jnp.sum((opaque(batch["x"]) * w + noise) ** 4) * batch["count"].astype(w.dtype)

    def outer(w, transform):
        batch = {"x": draw(3), "count": jnp.int32(2)}
        return jnp.sum(transform(loss)(w, batch, jax.random.key(0))[1] ** 2)

    got = jax.grad(outer)(draw(3, seed=5), mixed_value_and_grad)
    assert_close(got, jax.grad(outer)(draw(3, seed=5), jax.value_and_grad))


def test_what_does_not_depend_on_the_gradient_of_a_leaf(x64):
    """Cotangents that are zero by structure, of the value or of some leaves of the gradient."""
    params, *rest = arguments()
    for pick in (lambda v, g: v, lambda v, g: jnp.sum(g["out"] ** 2)):
        got, want = (
            jax.grad(lambda p, t=transform, pick=pick: pick(*t(fun)(p, *rest)))(params)
            for transform in (mixed_value_and_grad, jax.value_and_grad)
        )
        assert_close(got, want)


def test_forward_mode_is_refused():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(mixed_value_and_grad(lambda w: w**3), (1.0,), (1.0,))
