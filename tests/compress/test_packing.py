"""Codes in words, against bits written one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax import compress


def bits_of(codes, num_bits):
    """The stream, bit by bit, lowest first."""
    return [(int(code) >> i) & 1 for code in codes for i in range(num_bits)]


def words_of(bits):
    return [sum(bit << i for i, bit in enumerate(bits[j : j + 32])) for j in range(0, len(bits), 32)]


@given(st.sampled_from([1, 2, 3, 5, 8, 11, 17, 24, 31, 32]), st.sampled_from([0, 1, 7, 33, 64]), st.integers(0, 99))
def test_words_hold_the_stream_and_give_it_back(num_bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**num_bits, size=count, dtype=np.uint64).astype(np.uint32)
    words = compress.pack_bits(jnp.asarray(codes), num_bits)
    assert words.dtype == jnp.uint32
    assert np.asarray(words).tolist() == words_of(bits_of(codes, num_bits))
    np.testing.assert_array_equal(compress.unpack_bits(words, num_bits, count), codes)


def test_codes_of_no_bits_need_no_words():
    words = compress.pack_bits(jnp.zeros(5, jnp.uint32), 0)
    assert words.shape == (0,)
    assert compress.unpack_bits(words, 0, 5).tolist() == [0] * 5


@pytest.mark.parametrize("num_bits", [-1, 33])
def test_too_many_bits_are_refused(num_bits):
    with pytest.raises(ValueError, match=rf"num_bits must lie within \[0, 32\], got {num_bits}"):
        compress.pack_bits(jnp.zeros(1, jnp.uint32), num_bits)


@pytest.mark.parametrize(("size", "bits"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10), (1025, 11)])
def test_an_index_has_as_many_bits_as_it_needs(size, bits):
    assert compress.index_bits(size) == bits
