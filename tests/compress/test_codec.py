"""How code for one vector is lifted to a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import compress
from cedarjax.compress.codec import leaf_keys, masked_bits, sent

HALF = compress.Codec(lambda v, key: v.astype(jnp.float16), lambda p, d: p.astype(jnp.float32), lambda p, d: 16 * d)


def noise(v, key):
    return v + jax.random.normal(key, v.shape, v.dtype)


NOISY = compress.Codec(noise, lambda p, d: p, lambda p, d: 32 * d)


def tree():
    return {"a": jnp.ones((2, 3)), "b": (jnp.float32(2.0), jnp.zeros((0, 4)))}


def test_leaves_are_vectors_of_their_own():
    compressor = compress.leafwise(HALF)
    compressed, state = compressor.compress(tree(), (), jax.random.key(0))
    assert compressed["a"].payload.shape == (6,) and compressed["b"][0].payload.shape == (1,)
    jax.tree.map(np.testing.assert_array_equal, compressor.decompress(compressed), tree())
    assert state == () == compressor.init(tree())
    assert int(compressor.bits(compressed)) == 16 * 7
    assert compressor.roundtrip is None and compressor.entropy_bits is None


def test_a_model_is_one_vector_in_its_widest_dtype():
    delta = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.full(2, 0.5, jnp.float32)}
    compressor = compress.lift(HALF, "model")
    compressed, _ = compressor.compress(delta, (), jax.random.key(0))
    assert compressed.payload.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5] and compressed.size == 5
    got = compressor.decompress(compressed)
    assert got["a"].dtype == jnp.bfloat16 and got["b"].dtype == jnp.float32
    assert int(compressor.bits(compressed)) == 80


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_what_was_compressed_can_be_stacked(scope):
    compressor = compress.lift(HALF, scope)
    rows = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), tree())
    both = jax.jit(jax.vmap(lambda d: compressor.compress(d, (), jax.random.key(0))[0]))(rows)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(both))
    jax.tree.map(np.testing.assert_array_equal, jax.vmap(compressor.decompress)(both), rows)


def test_an_empty_tree_costs_nothing():
    for scope in ("leaf", "model"):
        compressor = compress.uniform_quantize(4) if scope == "leaf" else compress.lift(HALF, scope)
        compressed, _ = compressor.compress({}, (), jax.random.key(0))
        assert compressor.decompress(compressed) == {} and int(compressor.bits(compressed)) == 0


def test_leaves_draw_apart():
    compressor = compress.leafwise(NOISY)
    compressed, _ = compressor.compress([jnp.zeros(50)] * 3, (), jax.random.key(0))
    rows = np.stack(compressor.decompress(compressed))
    assert np.abs(np.corrcoef(rows) - np.eye(3)).max() < 0.6 and len(np.unique(rows)) == 150


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_leaves_differ_for_all_keys_and_leaves(impl):
    keys = jax.vmap(lambda s: jax.random.key(s, impl=impl))(jnp.arange(200))
    words = np.concatenate([np.asarray(jax.random.key_data(jnp.stack(leaf_keys(key, 20)))) for key in keys])
    assert len(np.unique(words, axis=0)) == 200 * 20
    assert leaf_keys(keys[0], 0) == []
    again = jnp.stack(leaf_keys(keys[3], 5))
    np.testing.assert_array_equal(
        jax.random.key_data(again), jax.random.key_data(jnp.stack(leaf_keys(keys[3], 20)[:5]))
    )


def test_without_a_short_way_the_long_one_is_taken():
    got, state, count = sent(compress.leafwise(HALF), tree(), (), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, got, tree())
    assert state == () and int(count()) == 112
    mask = {"a": 0.0, "b": (1.0, 1.0)}
    assert int(count(mask)) == 16 + 8 and int(count(mask, num_layers=17)) == 16 + 24


@pytest.mark.parametrize(
    ("mask", "num_layers", "message"),
    [
        ({"a": 1.0}, None, "mask must have the structure of what was compressed"),
        (None, 3, "num_layers must be at least 0 and come with a mask, got 3"),
        ({"a": 1.0, "b": (1.0, 1.0)}, -1, "num_layers must be at least 0 and come with a mask, got -1"),
    ],
)
def test_bad_masks(mask, num_layers, message):
    compressor = compress.leafwise(HALF)
    compressed, _ = compressor.compress(tree(), (), jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        compressor.bits(compressed, mask, num_layers=num_layers)


def test_bits_that_follow_the_data():
    counts = [compress.ToldBits(jnp.asarray(5, jnp.int32), 2**31 - 8), 7]
    assert int(masked_bits(counts, [0, 0], None, None)) == 12
    assert int(masked_bits(counts, [0, 0], [jnp.float32(1.0), jnp.float32(0.0)], None)) == 5 + 8
    with pytest.raises(ValueError, match="less than 2.31 bits, got 2147483648"):  # what may come, not what came
        masked_bits([*counts, 1], [0, 0, 0], None, None)


def test_bad_scopes():
    with pytest.raises(ValueError, match="scope must be one of .*, got 'layer'"):
        compress.lift(HALF, "layer")
