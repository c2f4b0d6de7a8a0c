import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import cedarjax as cj
from cedarjax.core import LocalUpdate, Upload
from cedarjax.privacy import local_gaussian, local_laplace

DELTA = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}


def local(mask=None, delta=DELTA):
    return LocalUpdate(
        lambda params: (), lambda shared, state, data, key: (Upload(delta, mask), state, jax.random.uniform(key))
    )


def reports(wrapped, num):
    """`[num, 3]` uploads under different keys."""
    run = jax.vmap(lambda key: wrapped.update(DELTA, (), None, key)[0].delta)
    told = run(jax.random.split(jax.random.key(0), num))
    return np.concatenate([np.asarray(x, np.float64).reshape(num, -1) for x in jax.tree.leaves(told)], axis=1)


def test_gaussian_reports_are_clipped_uploads_and_noise():
    told = reports(local_gaussian(local(), max_norm=2.0, noise_multiplier=1.5), 4096)
    noise = (told - np.array([1.2, 0.0, 1.6])) / 3.0
    for column in noise.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise.T) - np.eye(3)
    assert np.abs(correlation).max() < 4 / np.sqrt(4096)


def test_laplace_reports_are_clipped_uploads_and_noise():
    """The absolute values 3 + 0 + 4 are scaled to add up to 2; two uploads differ by 4, so the scale is 4 / epsilon."""
    told = reports(local_laplace(local(), max_norm=2.0, epsilon=0.5), 4096)
    noise = (told - np.array([6 / 7, 0.0, 8 / 7])) / 8.0
    for column in noise.T:
        assert stats.kstest(column, "laplace").pvalue > 1e-3


def test_equal_keys_give_equal_bits_and_the_wrapped_update_its_own_draws():
    wrapped, key = local_gaussian(local(), 1.0, 1.0), jax.random.key(3)
    one, two = (wrapped.update(DELTA, (), None, key) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one[0].delta, two[0].delta)
    assert one[2].local == local().update(DELTA, (), None, key)[2]
    assert one[2].clip.norm == 5.0


def test_a_mask_that_data_may_have_decided_is_refused():
    mask = {"a": jnp.float32(0.0), "b": jnp.float32(1.0)}
    for make in (local_gaussian, local_laplace):
        with pytest.raises(ValueError, match="must not send a mask.*upload_filter\\(local_gaussian"):
            make(local(mask), 1.0, 1.0).update(DELTA, (), None, jax.random.key(0))
    upload, _, _ = local_gaussian(local(mask), 1.0, 1.0, mask_is_public=True).update(DELTA, (), None, jax.random.key(0))
    assert not upload.delta["a"].any() and upload.delta["b"].any() and upload.mask is mask


def test_a_filter_outside_reads_what_was_noised():
    """A filter by the norm of updates keeps the layer whose noised update is larger, whatever the upload itself was."""
    params = {"one": {"w": jnp.zeros(3)}, "two": {"w": jnp.zeros(3)}}
    delta = {"one": {"w": jnp.full(3, 9.0)}, "two": {"w": jnp.zeros(3)}}
    wrapped = local_gaussian(local(delta=delta), 1e-6, 1e6)

    def features_fn(params, x):
        return {name: x @ params[name]["w"][:, None] for name in params}

    filtered = cj.layers.upload_filter(wrapped, features_fn, jnp.eye(4, 3), num_skipped=1, score="update_norm")
    kept = set()
    for seed in range(8):
        _, state, _ = filtered.update(params, filtered.init(params), None, jax.random.key(seed))
        upload, _, info = filtered.update(params, state, None, jax.random.key(100 + seed))
        noised, _, _ = wrapped.update(params, (), None, jax.random.key(100 + seed))
        norms = [float(jnp.linalg.norm(noised.delta[name]["w"])) for name in ("one", "two")]
        assert int(jnp.argmax(info.mask)) == int(np.argmax(norms))
        kept.add(int(np.argmax(norms)))
    assert kept == {0, 1}


def test_what_is_not_finite_is_only_noise():
    bad = local(delta={"a": jnp.array([jnp.nan, 0.0]), "b": jnp.array([[1.0]])})
    upload, _, info = local_gaussian(bad, 1.0, 1.0).update(DELTA, (), None, jax.random.key(0))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(upload.delta)) and info.clip.nonfinite


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_stay(dtype):
    delta = jax.tree.map(lambda x: x.astype(dtype), DELTA)
    for make in (local_gaussian, local_laplace):
        upload, _, _ = make(local(delta=delta), 1.0, jnp.float32(2.0)).update(delta, (), None, jax.random.key(0))
        assert all(x.dtype == dtype for x in jax.tree.leaves(upload.delta))


def test_a_round_of_local_reports_is_the_mean():
    """Many clients with one upload: the mean of their reports is that upload, to the standard error."""
    algorithm = cj.federated_round(local_gaussian(local(), 10.0, 0.1), cj.robust.mean())
    state = algorithm.init(jax.tree.map(jnp.zeros_like, DELTA))
    cohort = cj.Cohort(jnp.zeros(2048), jnp.ones(2048), jnp.arange(2048, dtype=jnp.int32))
    state, _, _ = jax.jit(algorithm.step)(state, cohort, jax.random.key(0))
    got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])
    np.testing.assert_allclose(got, [3, 0, 4], atol=4 / np.sqrt(2048))


def test_errors():
    for make, name in ((local_gaussian, "noise_multiplier"), (local_laplace, "epsilon")):
        with pytest.raises(ValueError, match="max_norm must be above 0 and finite, got 0"):
            make(local(), 0, 1.0)
        with pytest.raises(ValueError, match=f"{name} must be .*got -1"):
            make(local(), 1.0, -1)
