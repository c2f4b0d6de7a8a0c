import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from tests.meta import meta_oracles as oracle


def clipped(tx, tree):
    return tx.update(tree, tx.init(tree))[0]


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 1e3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_values_are_those_of_the_formula(max_norm, dtype, x64):
    tree = {"a": jnp.asarray([3.0, -4.0], dtype), "b": jnp.asarray([[12.0]], dtype)}
    got = clipped(cj.meta.clip_by_global_norm(max_norm), tree)
    for name, leaf in tree.items():
        assert got[name].dtype == dtype
        want = np.asarray(leaf, np.float64) * min(1, max_norm / 13)
        np.testing.assert_allclose(np.asarray(got[name], np.float64), want, rtol=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_derivative_is_that_of_optax_elsewhere(scale, x64):
    """And where a gradient is exactly 0 it is the identity."""
    g, along = scale * jnp.array([0.6, 0.8]), jnp.array([1.0, 2.0])
    got, want = (
        jax.jvp(lambda g, tx=tx: clipped(tx, g), (g,), (along,))[1]
        for tx in (cj.meta.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0))
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
    zero = jnp.zeros(2)
    np.testing.assert_array_equal(jax.jacrev(lambda g: clipped(cj.meta.clip_by_global_norm(1.0), g))(zero), np.eye(2))


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize(("clip", "finite"), [(optax.clip_by_global_norm, False), (cj.meta.clip_by_global_norm, True)])
def test_a_client_without_support_has_a_meta_gradient(clip, finite, mode):
    """The trap: its inner gradients are exactly 0, where a norm has no slope."""
    s, q, w = oracle.problem(0)
    data = oracle.client(s, q)._replace(num_support=jnp.int32(0))
    local = cj.meta.maml(oracle.loss_fn, optax.chain(clip(1.0), optax.sgd(0.1)), 2, mode=mode)
    delta, _ = oracle.update(local, jnp.asarray(w, jnp.float32), data)
    assert bool(jnp.isfinite(delta).all()) == finite
    if finite:
        everything = {k: np.concatenate([s[k], q[k]]) for k in s}
        np.testing.assert_allclose(delta, oracle.grad(w, everything), rtol=1e-4, atol=1e-6)


def test_the_norm_may_be_swept():
    tree = jnp.array([3.0, 4.0])
    swept = jax.vmap(lambda m: clipped(cj.meta.clip_by_global_norm(m), tree))(jnp.array([1.0, 10.0]))
    np.testing.assert_allclose(swept, [[0.6, 0.8], [3.0, 4.0]], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0, -1.0])
def test_options_out_of_range(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be positive, got {max_norm}"):
        cj.meta.clip_by_global_norm(max_norm)
