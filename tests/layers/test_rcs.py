"""Consistency and its change, against `np.corrcoef` in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cedarjax.layers import rcs, relative_change

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def published_rcs(a, b):
    return np.square(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1])


@pytest.mark.parametrize("seed", range(10))
def test_is_the_squared_correlation(seed):
    rng = np.random.default_rng(seed)
    a = rng.gamma(2.0, size=20 if seed % 2 else 190).astype(np.float32)
    b = (a * rng.uniform(0, 1) + rng.gamma(2.0, size=a.shape)).astype(np.float32)
    np.testing.assert_allclose(rcs(a, b), published_rcs(a, b), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(("offset", "scale"), [(0, 1e-30), (0, 1e30), (1000, 1), (1e-3, 1e-6), (3e37, 1e37)])
def test_scale_and_offset_change_nothing(offset, scale):
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(size=50).astype(np.float32) for _ in range(2))
    moved = (offset + scale * a.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(rcs(moved, b), published_rcs(moved, b), rtol=2e-5)


@pytest.mark.parametrize("length", [1, 2, 6])
@given(st.data())
def test_never_nan_for_finite_input(length, data):
    a, b = (data.draw(hnp.arrays(np.float32, length, elements=FINITE)) for _ in range(2))
    assert 0 <= rcs(a, b) <= 1


@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3, 1e-38, 3e38])
def test_a_constant_vector_scores_zero(constant):
    a, b = np.full(190, constant, np.float32), np.random.default_rng(0).uniform(size=190).astype(np.float32)
    assert rcs(a, b) == 0 and rcs(b, a) == 0 and rcs(a, a) == 0


def test_identity_symmetry_and_sign():
    a = np.random.default_rng(0).uniform(size=30).astype(np.float32)
    b = np.random.default_rng(1).uniform(size=30).astype(np.float32)
    np.testing.assert_allclose([rcs(a, a), rcs(a, -2 * a)], 1, rtol=1e-6)
    np.testing.assert_allclose(rcs(a, b), rcs(b, a), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad):
    a = np.array([1.0, 2.0, bad], np.float32)
    assert np.isnan(rcs(a, np.arange(3, dtype=np.float32)))
    assert np.isnan(rcs(a, np.ones(3, np.float32)))


def test_jit_vmap_and_dtypes(x64):
    a = np.random.default_rng(0).uniform(size=(2, 4, 9))
    loop = np.array([published_rcs(x, y) for x, y in zip(*a, strict=True)])
    got = jax.jit(jax.vmap(rcs))(*a)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, loop, rtol=1e-12)
    assert rcs(a[0, 0].astype(jnp.bfloat16), a[1, 0].astype(jnp.bfloat16)).dtype == jnp.float32


def test_rcs_rejects_unequal_shapes():
    with pytest.raises(ValueError, match=r"rdv_a and rdv_b must be \[E\].*\(3,\) and \(4,\)"):
        rcs(jnp.ones(3), jnp.ones(4))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        rcs(jnp.ones((2, 2)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="E >= 1"):
        rcs(jnp.ones(0), jnp.ones(0))


def test_relative_change_is_the_published_one_above_the_floor():
    rng = np.random.default_rng(0)
    previous, current = rng.uniform(1e-6, 1, size=(2, 100)).astype(np.float32)
    wanted = np.abs((previous.astype(np.float64) - current) / current)
    np.testing.assert_allclose(relative_change(previous, current), wanted, rtol=1e-6)
    np.testing.assert_allclose(relative_change(previous, current, eps=0.0), wanted, rtol=1e-6)


def test_the_floor_keeps_a_dead_layer_finite():
    previous, current = jnp.array([0.0, 0.5]), jnp.zeros(2)
    np.testing.assert_allclose(relative_change(previous, current, eps=0.25), [0, 2])
    assert jnp.isfinite(relative_change(previous, current)).all()
    published = np.asarray(relative_change(previous, current, eps=0.0))
    assert np.isnan(published[0]) and np.isposinf(published[1])


def test_relative_change_rejects_bad_input():
    with pytest.raises(ValueError, match=r"previous and current must be \[L\].*\(2,\) and \(3,\)"):
        relative_change(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        relative_change(jnp.ones(2), jnp.ones(2), eps=-1)


def test_the_largest_numbers_are_no_constants():
    largest = np.array([np.finfo(np.float32).max / 2, 0, 0, 0], np.float32)
    np.testing.assert_allclose(rcs(np.array([0, 1, 1, 1], np.float32), largest), 1.0, rtol=1e-6)
