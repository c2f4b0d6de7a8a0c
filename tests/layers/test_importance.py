"""Scores of a layer, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.layers import cosine_change, fisher, taylor, update_norm

NAMES = ("a", "b/inner")


def make_tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": rng.normal(size=(3, 4)).astype(dtype), "bias": rng.normal(size=4).astype(dtype)},
        "a2": rng.normal(size=5).astype(dtype),  # owned by neither
        "b": {
            "inner": [rng.normal(size=2).astype(dtype), rng.normal(size=3).astype(dtype)],
            "other": np.ones(2, dtype),
        },
    }


def flat(tree, name):
    leaves = [tree["a"]["bias"], tree["a"]["kernel"]] if name == "a" else tree["b"]["inner"]
    return np.concatenate([np.ravel(x).astype(np.float64) for x in leaves])


def test_formulas():
    x, y = make_tree(0), make_tree(1)
    pairs = [(flat(x, name), flat(y, name)) for name in NAMES]
    np.testing.assert_allclose(update_norm(x, NAMES), [np.linalg.norm(u) for u, _ in pairs], rtol=1e-6)
    np.testing.assert_allclose(fisher(x, NAMES), [np.mean(u**2) for u, _ in pairs], rtol=1e-6)
    np.testing.assert_allclose(taylor(x, y, NAMES), [np.abs(u * v).sum() for u, v in pairs], rtol=1e-6)
    cosines = [u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in pairs]
    np.testing.assert_allclose(cosine_change(x, y, NAMES), 1 - np.array(cosines), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_leaves_are_summed_in_float32(dtype):
    tree = {"a": jnp.full(100_000, 0.125, dtype)}
    got = update_norm(tree, ("a",))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 0.125 * np.sqrt(1e5), rtol=1e-5)


def test_mixed_precision_under_x64(x64):
    tree = {"a": jnp.ones(4, jnp.float64), "b": jnp.ones(9, jnp.float32)}
    both = {"ab": tree}
    np.testing.assert_allclose(update_norm(both, ("ab",)), [np.sqrt(13)], rtol=1e-6)
    assert update_norm(both, ("ab",)).dtype == jnp.float32


def test_a_zero_update_has_no_direction():
    x = make_tree(0)
    zero = jax.tree.map(np.zeros_like, x)
    np.testing.assert_array_equal(cosine_change(x, zero, NAMES), [1, 1])
    np.testing.assert_array_equal(cosine_change(zero, zero, NAMES), [1, 1])
    np.testing.assert_allclose(cosine_change(x, x, NAMES), [0, 0], atol=1e-6)
    np.testing.assert_allclose(cosine_change(x, jax.tree.map(np.negative, x), NAMES), [2, 2], rtol=1e-6)
