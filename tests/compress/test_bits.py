"""Counted bits against a serialisation written here, bit by bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import compress

CASES = {
    "uniform_3": (lambda scope: compress.uniform_quantize(3, scope=scope), 3),
    "uniform_chunks": (lambda scope: compress.uniform_quantize(5, chunk_size=4, scope=scope), 5),
    "qsgd_6": (lambda scope: compress.qsgd(6, scope=scope), 4),  # 13 signed levels
    "terngrad": (lambda scope: compress.terngrad(scope=scope), 2),
    "sign": (lambda scope: compress.sign(scope=scope), 1),
    "top_k": (lambda scope: compress.top_k(0.3, scope=scope), None),
    "sampled_top_k": (lambda scope: compress.sampled_top_k(0.3, scope=scope), None),
    "random_k": (lambda scope: compress.random_k(0.3, scope=scope), None),
}


def unpacked(words, width, count):
    """Codes read from the words one bit after the other."""
    stream = [(int(word) >> i) & 1 for word in np.asarray(words) for i in range(32)]
    return [sum(stream[j * width + i] << i for i in range(width)) for j in range(count)]


def raw(array):
    """Bits of the bytes of an array."""
    return "".join(f"{byte:08b}" for byte in np.asarray(array).tobytes())


def serialised(payload, size, code_bits):
    """One vector as a string of zeros and ones."""
    if isinstance(payload, compress.SparsePayload):
        count = len(payload.values)
        width = math.ceil(math.log2(size)) if size > 1 else 0
        indices = "".join(f"{i:0{width}b}" for i in unpacked(payload.indices, width, count)) if width else ""
        return indices + raw(payload.values)
    if isinstance(payload, compress.ToldPayload):
        count, most = int(payload.num_sent), len(payload.values)
        width = math.ceil(math.log2(size)) if size > 1 else 0
        told = math.ceil(math.log2(most + 1))
        indices = unpacked(payload.indices, width, count) if width else []
        head = f"{count:0{told}b}" if told else ""
        return head + "".join(f"{i:0{width}b}" for i in indices) + raw(payload.values[:count])
    if isinstance(payload, compress.SeededPayload):
        return (raw(payload.seed) if size else "") + raw(payload.values)
    words, *floats = payload
    codes = "".join(f"{code:0{code_bits}b}" for code in unpacked(words, code_bits, size))
    return codes + "".join(raw(array) for array in floats)


def tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"one": {"bias": (3,), "kernel": (5, 3)}, "two": {"kernel": (1, 11)}, "scalar": (), "empty": (0, 2)}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_leaf_by_leaf(name, dtype):
    make, width = CASES[name]
    compressor = make("leaf")
    compressed, _ = compressor.compress(tree(dtype), (), jax.random.key(0))
    nodes = jax.tree.leaves(compressed, is_leaf=lambda node: isinstance(node, compress.Packed))
    assert int(compressor.bits(compressed)) == sum(len(serialised(n.payload, n.size, width)) for n in nodes)


@pytest.mark.parametrize("name", CASES)
def test_as_one_vector(name):
    make, width = CASES[name]
    compressor = make("model")
    compressed, _ = compressor.compress(tree(), (), jax.random.key(0))
    assert int(compressor.bits(compressed)) == len(serialised(compressed.payload, 30, width))
    with pytest.raises(ValueError, match="mask must be None for a compressor of the whole model"):
        compressor.bits(compressed, jax.tree.map(lambda x: 1.0, tree()))
    if compressor.roundtrip is not None:
        after, _, count = compressor.roundtrip(tree(), (), jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, after, compressor.decompress(compressed))
        assert int(count()) == int(compressor.bits(compressed))
        with pytest.raises(ValueError, match="mask must be None for a compressor of the whole model"):
            count(jax.tree.map(lambda x: 1.0, tree()))


@pytest.mark.parametrize("num_layers", [None, 9])
@pytest.mark.parametrize("name", ["uniform_3", "qsgd_6", "top_k", "sampled_top_k"])
def test_with_layers_left_out(name, num_layers):
    make, width = CASES[name]
    compressor, delta = make("leaf"), tree()
    mask = {"one": {"bias": 1.0, "kernel": 0.0}, "two": {"kernel": 0.5}, "scalar": 0.0, "empty": 1.0}
    mask = jax.tree.map(jnp.float32, mask)
    compressed, _ = compressor.compress(delta, (), jax.random.key(0))
    nodes = [compressed["one"]["bias"], compressed["two"]["kernel"], compressed["empty"]]
    came = [1, 0, 1, 1]  # a bit for each layer: one, two, scalar, empty; any will do here
    bitmap = np.packbits(came, bitorder="little").tobytes() if num_layers is None else bytes(2)
    want = 8 * len(bitmap) + sum(len(serialised(n.payload, n.size, width)) for n in nodes)
    assert int(compressor.bits(compressed, mask, num_layers=num_layers)) == want
    count = compressor.roundtrip(delta, (), jax.random.key(0))[2]
    assert int(jax.jit(lambda m: count(m, num_layers=num_layers))(mask)) == want


@pytest.mark.parametrize("name", ["uniform_3", "qsgd_6", "terngrad", "sign", "top_k", "sampled_top_k"])
def test_entropy_is_an_estimate_below_the_exact_count(name):
    make, width = CASES[name]
    compressor = make("model")
    compressed, _ = compressor.compress(tree(), (), jax.random.key(0))
    payload, size = compressed.payload, compressed.size
    if name == "top_k":
        want = math.log2(math.comb(size, len(payload.values))) + 32 * len(payload.values)
    elif name == "sampled_top_k":
        count, told = int(payload.num_sent), math.ceil(math.log2(len(payload.values) + 1))
        want = told + math.log2(math.comb(size, count)) + 32 * count
    else:
        words, *floats = payload
        often = np.unique(unpacked(words, width, size), return_counts=True)[1]
        want = -(often * np.log2(often / size)).sum() + sum(32 * array.size for array in floats)
    got = compressor.entropy_bits(compressed)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert float(got) <= int(compressor.bits(compressed))


def test_entropy_with_layers_left_out():
    compressor, delta = compress.sign(), {"a": jnp.ones(40), "b": jnp.asarray([1.0, -1.0])}
    compressed, _ = compressor.compress(delta, (), jax.random.key(0))
    assert float(compressor.entropy_bits(compressed)) == 32 + 2 + 32
    assert float(compressor.entropy_bits(compressed, {"a": 1.0, "b": 0.0})) == 32 + 8


def test_payloads_are_small():
    v = jnp.ones(1024)
    sizes = {"uniform_3": 1024 * 3 // 8 + 8, "qsgd_6": 512 + 4, "terngrad": 256 + 4, "sign": 128 + 4}
    sizes |= {"top_k": 307 * 4 + 4 * math.ceil(307 * 10 / 32), "random_k": 307 * 4 + 4}
    for name, want in sizes.items():
        compressed, _ = CASES[name][0]("leaf").compress(v, (), jax.random.key(0))
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(compressed)) == want


def test_too_much_is_refused():
    leaf = jax.ShapeDtypeStruct((2**28,), jnp.float32)
    compressor = compress.uniform_quantize(8)
    with pytest.raises(ValueError, match="less than 2.31 bits, got 2147483712"):
        jax.eval_shape(lambda v, k: compressor.roundtrip(v, (), k)[2](), leaf, jax.random.key(0))
