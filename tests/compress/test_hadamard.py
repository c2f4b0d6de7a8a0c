"""The transform and the random rotations against scipy's Hadamard matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from cedarjax.compress.hadamard import hadamard_transform, rotate, rotate_back

TRANSFORM = jax.jit(hadamard_transform)


@given(st.sampled_from([0, 1, 5, 6, 11]), st.integers(0, 5))
def test_against_the_matrix(log_length, seed):
    length = 2**log_length
    x = np.random.default_rng(seed).normal(size=length)
    want = hadamard(length) @ x / np.sqrt(length)
    got = TRANSFORM(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(TRANSFORM(got), x, rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(x), rtol=1e-5)


def test_every_row_of_a_batch_is_transformed():
    x = np.random.default_rng(0).normal(size=(3, 2, 128))
    want = x @ hadamard(128) / np.sqrt(128)
    np.testing.assert_allclose(hadamard_transform(jnp.asarray(x, jnp.float32)), want, rtol=0, atol=1e-5)
    lifted = jax.vmap(jax.vmap(hadamard_transform))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(lifted, want, rtol=0, atol=1e-5)


def test_long_vector_by_its_unit_vectors():
    length = 2**16
    x = jnp.zeros(length).at[37].set(1.0)
    signs = np.array([(-1) ** (bin(37 & i).count("1")) for i in range(0, length, 997)])
    np.testing.assert_allclose(hadamard_transform(x)[::997], signs / 256, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keeps_the_dtype(dtype):
    assert hadamard_transform(jnp.ones(8, dtype)).dtype == dtype
    assert rotate(jnp.ones(8, dtype), jnp.uint32(1)).dtype == dtype


def test_float64_stays_exact(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=1024))
    np.testing.assert_allclose(hadamard_transform(x), hadamard(1024) @ np.asarray(x) / 32, rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_rotations", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 256])
def test_rotation_is_orthogonal_and_its_inverse_undoes_it(length, num_rotations):
    seed = jnp.uint32(2**32 - 1)
    matrix = jax.vmap(lambda row: rotate(row, seed, num_rotations=num_rotations))(jnp.eye(length))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(length), rtol=0, atol=1e-5)
    back = jax.vmap(lambda row: rotate_back(row, seed, num_rotations=num_rotations))(matrix)
    np.testing.assert_allclose(back, np.eye(length), rtol=0, atol=1e-5)


def test_one_rotation_is_signs_and_the_transform():
    seed = jnp.uint32(11)
    signs = np.asarray(rotate(jnp.eye(64), seed)) @ hadamard(64) / 8  # the transform undone
    signs = np.sum(np.round(signs, 4), axis=1)
    assert set(signs) == {-1.0, 1.0}


def test_signs_are_fair_and_differ_between_seeds_places_and_rotations():
    def signs(seed, num_rotations=1):
        x = rotate(jnp.ones(64), seed, num_rotations=num_rotations)
        return hadamard_transform(x) if num_rotations == 1 else x

    drawn = np.asarray(jax.vmap(signs)(jnp.arange(4096, dtype=jnp.uint32))).round(4)
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    assert np.abs(drawn.mean(axis=0)).max() < 5 / 64  # of 64 means with a deviation of 1/64
    correlations = drawn.T @ drawn / 4096 - np.eye(64)
    assert np.abs(correlations).max() < 6 / 64


def test_blocks_of_a_batch_have_signs_of_their_own():
    rows = rotate(jnp.ones((2, 64)), jnp.uint32(0))
    assert not np.allclose(rows[0], rows[1])
    np.testing.assert_allclose(rotate_back(rows, jnp.uint32(0)), np.ones((2, 64)), atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 12), ()])
def test_refuses_other_lengths(shape):
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(jnp.zeros(shape))


@pytest.mark.parametrize("function", [rotate, rotate_back])
def test_refuses_no_rotation(function):
    with pytest.raises(ValueError, match="num_rotations must be at least 1, got 0"):
        function(jnp.zeros(4), jnp.uint32(0), num_rotations=0)
