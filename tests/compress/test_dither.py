"""Cheap random numbers: uniform for every index over keys, and without a visible relation between indices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.compress.dither import mix, random_words, uniforms

NUM_KEYS, SIZE = 4096, 64


KEYS = {
    "split": lambda: jax.random.split(jax.random.key(0), NUM_KEYS),
    "counted": lambda: jax.vmap(jax.random.key)(jnp.arange(NUM_KEYS)),
    "rbg": lambda: jax.random.split(jax.random.key(0, impl="rbg"), NUM_KEYS),
}


@pytest.mark.parametrize("kind", KEYS)
def test_numbers_are_uniform_over_keys_and_unrelated(kind):
    u = np.asarray(jax.jit(jax.vmap(lambda k: uniforms(k, SIZE)))(KEYS[kind]()), np.float64)
    assert u.min() >= 0 and u.max() < 1
    # False alarm of each bound below 1e-6: five standard errors for a moment, less those of 64 or 2016 comparisons.
    error = 1 / np.sqrt(NUM_KEYS)
    assert np.abs(u.mean(0) - 0.5).max() < 6 * error / np.sqrt(12)
    assert np.abs(u.var(0) - 1 / 12).max() < 6 * error / np.sqrt(180)
    correlations = np.corrcoef(u.T) - np.eye(SIZE)
    assert np.abs(correlations).max() < 6 * error
    # Sixteen equal cells for every index: chi square with 15 degrees of freedom, 64 times; 60 has probability 2e-7.
    counts = np.stack([np.bincount((16 * column).astype(int), minlength=16) for column in u.T])
    expected = NUM_KEYS / 16
    assert (((counts - expected) ** 2) / expected).sum(1).max() < 60
    # And for every pair of neighbours: 255 degrees of freedom, 63 times; 400 has probability 2e-8.
    pairs = (16 * u[:, :-1]).astype(int) * 16 + (16 * u[:, 1:]).astype(int)
    pair_counts = np.stack([np.bincount(column, minlength=256) for column in pairs.T])
    assert (((pair_counts - expected / 16) ** 2) / (expected / 16)).sum(1).max() < 400


def test_one_long_draw_is_uniform_and_has_no_lags():
    u = np.asarray(uniforms(jax.random.key(7), 100_000), np.float64) - 0.5
    assert abs(u.mean()) < 5 / np.sqrt(12 * len(u))
    for lag in (1, 2, 3, 10, 128, 784):
        assert abs((u[:-lag] * u[lag:]).mean() * 12) < 5 / np.sqrt(len(u) - lag)


def test_mix_is_that_of_its_formula_and_loses_nothing():
    x = np.arange(2**16, dtype=np.uint32) * np.uint32(65537)
    y = x.copy()
    y = (y ^ (y >> 16)) * np.uint32(0x7FEB352D)
    y = (y ^ (y >> 15)) * np.uint32(0x846CA68B)
    y ^= y >> 16
    np.testing.assert_array_equal(mix(jnp.asarray(x)), y)
    assert len(np.unique(y)) == len(x)


def test_equal_keys_give_equal_words_and_others_do_not():
    a, b = random_words(jax.random.key(0), 1000), random_words(jax.random.key(1), 1000)
    np.testing.assert_array_equal(a, random_words(jax.random.key(0), 1000))
    assert not bool((a == b).any())


def test_wider_floats(x64):
    u = uniforms(jax.random.key(0), 5, jnp.float64)
    assert u.dtype == jnp.float64
    np.testing.assert_array_equal(u, uniforms(jax.random.key(0), 5))
