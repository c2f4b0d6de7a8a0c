"""Distances between stimuli, against plain numpy norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.layers import rdv, stimulus_pairs


def published_rdv(features, pairs):
    return np.array([np.linalg.norm(features[a].astype(np.float64) - features[b]) for a, b in pairs])


@pytest.mark.parametrize(
    ("num_stimuli", "num_features", "num_pairs"), [(1, 1, 1), (2, 7, 1), (11, 3, 20), (20, 64, 190)]
)
def test_is_the_norm_of_the_difference(num_stimuli, num_features, num_pairs):
    rng = np.random.default_rng(num_stimuli)
    features = rng.normal(size=(num_stimuli, num_features)).astype(np.float32)
    pairs = rng.integers(0, num_stimuli, size=(num_pairs, 2))  # self pairs and repeats among them
    got = rdv(features, jnp.asarray(pairs, jnp.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, published_rdv(features, pairs), rtol=2e-6)


def test_close_pairs_far_from_the_origin_keep_their_digits():
    features = np.float32(1e4) + np.array([[0.0, 0.0], [0.0078125, 0.0], [0.0, 0.0625]], np.float32)
    pairs = np.array([[0, 1], [0, 2]], np.int32)
    np.testing.assert_allclose(rdv(features, pairs), published_rdv(features, pairs), rtol=1e-6)


@pytest.mark.parametrize(
    ("given_dtype", "wanted"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.int32, jnp.float32)]
)
def test_narrow_features_are_widened(given_dtype, wanted):
    features = jnp.array([[0, 0], [3, 4]], given_dtype)
    got = rdv(features, jnp.array([[0, 1]], jnp.int32))
    assert got.dtype == wanted
    np.testing.assert_array_equal(got, [5.0])


def test_float64_stays(x64):
    assert rdv(jnp.ones((2, 2)), jnp.array([[0, 1]])).dtype == jnp.float64


def test_jit_and_vmap_agree_with_a_loop():
    features = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    pairs = stimulus_pairs(5)
    loop = np.stack([rdv(x, pairs) for x in features])
    np.testing.assert_allclose(jax.jit(jax.vmap(rdv, (0, None)))(features, pairs), loop, rtol=1e-6)


def test_bad_input():
    pairs = jnp.array([[0, 1]], jnp.int32)
    with pytest.raises(ValueError, match=r"features must be \[S, F\].*\(2, 3, 4\)"):
        rdv(jnp.ones((2, 3, 4)), pairs)
    with pytest.raises(ValueError, match=r"pairs must be \[E, 2\].*\(2, 3\)"):
        rdv(jnp.ones((2, 3)), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(TypeError, match="pairs must hold integers.*float32"):
        rdv(jnp.ones((2, 3)), jnp.zeros((2, 2)))


def test_all_pairs_in_order():
    pairs = stimulus_pairs(20)
    assert pairs.dtype == jnp.int32
    np.testing.assert_array_equal(pairs, [(a, b) for a in range(20) for b in range(a + 1, 20)])


def test_drawn_pairs_are_distinct_ordered_and_bound_to_their_key():
    first = stimulus_pairs(8, 10, jax.random.key(0))
    assert first.shape == (10, 2) and first.dtype == jnp.int32
    rows = [tuple(row) for row in first.tolist()]
    assert rows == sorted(set(rows)) and all(0 <= a < b < 8 for a, b in rows)
    np.testing.assert_array_equal(first, stimulus_pairs(8, 10, jax.random.key(0)))
    assert (first != stimulus_pairs(8, 10, jax.random.key(1))).any()
    np.testing.assert_array_equal(stimulus_pairs(4, 6, jax.random.key(3)), stimulus_pairs(4))


def test_pairs_inside_jit():
    got = jax.jit(lambda key: (stimulus_pairs(5), stimulus_pairs(5, 3, key)))(jax.random.key(0))
    np.testing.assert_array_equal(got[0], stimulus_pairs(5))
    np.testing.assert_array_equal(got[1], stimulus_pairs(5, 3, jax.random.key(0)))


@pytest.mark.parametrize("num_pairs", [0, 4])
def test_number_of_pairs_out_of_range(num_pairs):
    with pytest.raises(ValueError, match=f"num_pairs must satisfy 1 <= num_pairs.*= 3, got {num_pairs}"):
        stimulus_pairs(3, num_pairs, jax.random.key(0))


def test_a_draw_needs_both_a_number_and_a_key():
    with pytest.raises(ValueError, match="num_stimuli must be at least 2, got 1"):
        stimulus_pairs(1)
    with pytest.raises(ValueError, match="num_pairs and key must be given together"):
        stimulus_pairs(5, 3)
    with pytest.raises(ValueError, match="num_pairs and key must be given together"):
        stimulus_pairs(5, key=jax.random.key(0))
