"""Norms against float64, for numbers whose squares or sums are no floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.compress.norms import inverse_or_zero, mean_magnitude, two_norm


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-22, 1e-15, 1.0, 1e15, 1e20, 1e36])
def test_norms_of_any_size(scale):
    v = (np.random.default_rng(0).normal(size=300) * scale).astype(np.float32)
    wide = v.astype(np.float64)
    np.testing.assert_allclose(two_norm(jnp.asarray(v)), np.sqrt((wide**2).sum()), rtol=1e-5)
    if scale > 1e-33:
        np.testing.assert_allclose(mean_magnitude(jnp.asarray(v)), np.abs(wide).mean(), rtol=1e-5)


def test_sums_that_are_no_floats_have_means():
    np.testing.assert_allclose(mean_magnitude(jnp.full(1000, -3e38)), 3e38, rtol=1e-6)


def test_nothing_and_zeros():
    for size in (0, 1, 5):
        assert float(two_norm(jnp.zeros(size))) == 0.0 and float(mean_magnitude(jnp.zeros(size))) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad):
    v = jnp.ones(7).at[3].set(bad)
    assert not np.isfinite(two_norm(v)) and not np.isfinite(mean_magnitude(v))


def test_rows_of_unlike_sizes_together():
    rows = jnp.asarray([[3.0, 4.0], [3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]], jnp.float32)
    np.testing.assert_allclose(jax.jit(jax.vmap(two_norm))(rows), [5.0, 5e30, 5e-30, 0.0], rtol=1e-6)


def test_inverses():
    largest = float(jnp.finfo(jnp.float32).max)
    np.testing.assert_allclose(
        inverse_or_zero(jnp.asarray([0.0, 4.0, largest / 8, jnp.nan, -1.0])), [0.0, 0.25, 8 / largest, 0.0, 0.0]
    )
