import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cedarjax as cj
from cedarjax import testing
from cedarjax.core import LocalUpdate, Upload
from cedarjax.privacy import clip_by_norm, clip_upload


def tree_of(numbers):
    a = np.asarray(numbers, np.float32)
    return {"a": jnp.asarray(a[:2]), "b": {"c": jnp.asarray(a[2:])}}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def oracle(vector, limit, order=2):
    length = np.linalg.norm(vector, order)
    return vector if length <= limit else vector * (limit / length)


def broadcast(delta, mask=None):
    """A local update that uploads what it is given."""
    return LocalUpdate(
        lambda params: jnp.zeros((), jnp.int32),
        lambda shared, state, data, key: (Upload(delta, mask), state + 1, {"loss": 2.0}),
    )


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(st.lists(finite, min_size=5, max_size=5), st.floats(1e-3, 1e6), st.sampled_from([1, 2]))
def test_against_numpy(numbers, limit, order):
    clipped, info = clip_by_norm(tree_of(numbers), limit, order=order)
    vector = np.asarray(numbers, np.float64)
    np.testing.assert_allclose(flat(clipped), oracle(vector, limit, order), rtol=3e-6, atol=1e-30)
    np.testing.assert_allclose(float(info.norm), np.linalg.norm(vector, order), rtol=3e-6)
    assert np.linalg.norm(flat(clipped), order) <= limit * (1 + 1e-6)


def test_what_is_short_enough_stays_bit_for_bit():
    tree = tree_of([0.1, -0.2, 0.3, 0.7, -0.1])
    clipped, info = clip_by_norm(tree, 1.0)
    jax.tree.map(np.testing.assert_array_equal, clipped, tree)
    assert not info.clipped and not info.nonfinite
    again, _ = clip_by_norm(clip_by_norm(tree, 0.25)[0], 0.25)
    np.testing.assert_allclose(flat(again), flat(clip_by_norm(tree, 0.25)[0]), rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_zeros_stay_and_have_a_finite_gradient(order):
    zeros = tree_of(np.zeros(5))
    assert not flat(clip_by_norm(zeros, 1.0, order=order)[0]).any()
    gradient = jax.grad(lambda t: sum(x.sum() for x in jax.tree.leaves(clip_by_norm(t, 1.0, order=order)[0])))(zeros)
    np.testing.assert_array_equal(flat(gradient), np.ones(5))


def test_the_gradient_of_what_is_clipped():
    """Of `c x / |x|` in the direction `v`: `c (v - x <x, v> / |x|^2) / |x|`."""
    x, v, c = np.array([3.0, -1.0, 2.0]), np.array([0.5, 1.0, -2.0]), 0.7
    gradient = jax.grad(lambda t: clip_by_norm(t, c)[0] @ jnp.asarray(v, jnp.float32))(jnp.asarray(x, jnp.float32))
    length = np.linalg.norm(x)
    np.testing.assert_allclose(gradient, c * (v - x * (x @ v) / length**2) / length, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_becomes_zeros(bad):
    clipped, info = jax.jit(lambda t: clip_by_norm(t, 1.0))(tree_of([1.0, 2.0, bad, 0.0, 0.0]))
    assert not flat(clipped).any() and info.nonfinite and not info.clipped and info.norm == 0


def test_huge_uploads_are_clipped_though_their_squares_overflow():
    vector = np.array([3e38, -3e38, 1e38, 3e38, 0.0])
    clipped, info = clip_by_norm(tree_of(vector), 2.0)
    np.testing.assert_allclose(flat(clipped), 2 * vector / np.linalg.norm(vector), rtol=1e-6)
    assert info.clipped and not info.nonfinite


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    """10,000 ones in float16 would lose their sum of squares; the length is 100."""
    clipped, info = clip_by_norm(jnp.ones(10_000, dtype), 1.0)
    assert clipped.dtype == dtype and info.norm.dtype == jnp.float32
    np.testing.assert_allclose(info.norm, 100, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(clipped, np.float64), 0.01, rtol=5e-3)


def test_float64(x64):
    clipped, info = clip_by_norm(jnp.asarray([3e200, 4e200]), 1.0)
    assert clipped.dtype == info.norm.dtype == jnp.float64
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-14)


def test_a_wrapper_keeps_what_it_wraps():
    mask = {"a": jnp.float32(0.0), "b": {"c": jnp.float32(1.0)}}
    local = clip_upload(broadcast(tree_of([0.0, 0.0, 3.0, 4.0, 0.0]), mask), 1.0)
    upload, state, info = local.update(tree_of(np.zeros(5)), local.init(None), None, jax.random.key(0))
    np.testing.assert_allclose(flat(upload.delta), [0, 0, 0.6, 0.8, 0], rtol=1e-6)
    assert upload.mask is mask and state == 1 and info.local == {"loss": 2.0} and info.clip.norm == 5.0


def test_what_is_shared_and_deployed_is_that_of_the_wrapped_update():
    inner = LocalUpdate(lambda p: 7, None, lambda params: params + 1, lambda shared, state: shared * state)
    local = clip_upload(inner, 1.0)
    assert local.init(None) == 7 and local.share(1) == 2 and local.model(3, 4) == 12


def test_the_limit_may_be_traced():
    norms = jax.vmap(lambda c: jnp.linalg.norm(clip_by_norm(jnp.array([3.0, 4.0]), c)[0]))(jnp.array([1.0, 4.0, 9.0]))
    np.testing.assert_allclose(norms, [1, 4, 5], rtol=1e-6)


def test_low_rank_uploads_become_arrays():
    factors = cj.core.LowRank.of((jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0, 4.0]])))
    clipped, info = clip_by_norm({"w": factors}, 1.0)
    np.testing.assert_allclose(info.norm, np.sqrt(125), rtol=1e-6)
    np.testing.assert_allclose(clipped["w"], np.outer([1, 2], [3, 0, 4]) / np.sqrt(125), rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("inf"), float("nan")])
def test_errors(max_norm):
    with pytest.raises(ValueError, match="max_norm must be above 0 and finite, got"):
        clip_upload(broadcast(None), max_norm)
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        clip_by_norm(jnp.ones(2), 1.0, order=3)


@pytest.mark.parametrize("law", ["keeps_shapes", "agrees_without_jit", "agrees_across_layouts", "stays_finite"])
def test_laws(law, mesh):
    def loss_fn(params, batch, key):
        return jnp.mean((batch.astype(params.dtype) @ params) ** 2)

    local = clip_upload(cj.local.sgd(loss_fn, optax.sgd(0.5), batch_size=2), 0.01)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)
    data = cj.ClientData(x, jnp.array([4, 2, 1], jnp.int32), jnp.array([2, 1, 1], jnp.int32))
    case = testing.LocalUpdateCase(local, jnp.ones(2), data, mesh, (jnp.bfloat16,))
    testing.LOCAL_UPDATE_LAWS[law](case)
