"""Norms against float64, up to and beyond the numbers whose squares or sums are floats."""

import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.compress.norms import inverse_or_zero, mean_magnitude, two_norm


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-22, 1e-15, 1.0, 1e15, 1e20, 1e36])
def test_means_of_any_size(scale):
    v = (np.random.default_rng(0).normal(size=300) * scale).astype(np.float32)
    if scale > 1e-33:
        np.testing.assert_allclose(mean_magnitude(jnp.asarray(v)), np.abs(v.astype(np.float64)).mean(), rtol=1e-5)


@pytest.mark.parametrize("norm", [1e-12, 1e-9, 1.0, 1e12, 1.8e19])
@pytest.mark.parametrize("size", [1, 300, 100_000])
def test_norms_of_the_range_are_right(norm, size):
    v = np.random.default_rng(0).normal(size=size)
    v = (v * (norm / np.linalg.norm(v))).astype(np.float32)
    np.testing.assert_allclose(two_norm(jnp.asarray(v)), np.linalg.norm(v.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 300, 100_000])
def test_norms_beyond_the_range_are_nothing_or_infinite(size):
    v = np.random.default_rng(0).normal(size=size)
    v /= np.linalg.norm(v)
    for norm, told in ((1e-37, 0.0), (1e-20, 0.0), (9e-13, 0.0), (1.9e19, np.inf), (1e25, np.inf), (1e37, np.inf)):
        assert float(two_norm(jnp.asarray((v * norm).astype(np.float32)))) == told


def test_sums_that_are_no_floats_have_means():
    np.testing.assert_allclose(mean_magnitude(jnp.full(1000, -3e38)), 3e38, rtol=1e-6)


def test_nothing_and_zeros():
    for size in (0, 1, 5):
        assert float(two_norm(jnp.zeros(size))) == 0.0 and float(mean_magnitude(jnp.zeros(size))) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad):
    v = jnp.ones(7).at[3].set(bad)
    assert not np.isfinite(two_norm(v)) and not np.isfinite(mean_magnitude(v))


def test_inverses():
    largest = float(jnp.finfo(jnp.float32).max)
    np.testing.assert_allclose(
        inverse_or_zero(jnp.asarray([0.0, 4.0, largest / 8, jnp.nan, -1.0])), [0.0, 0.25, 8 / largest, 0.0, 0.0]
    )
