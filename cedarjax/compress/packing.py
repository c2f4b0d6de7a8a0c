"""Codes of a few bits, densely in words of 32.

Bit `t` of the stream is bit `t mod 32` of word `t // 32`; code `i` holds the bits from `i b` on, its lowest first.
Codes are taken in blocks that fill whole words, so that packing is shifts on columns and nothing is moved one by one.
"""

import math

import jax
import jax.numpy as jnp

WORD = 32


def num_words(num_codes: int, num_bits: int) -> int:
    """Words that the codes fill, the last one perhaps in part.

    Args:
      num_codes: how many codes.
      num_bits: bits of each.

    Returns:
      `ceil(num_codes * num_bits / 32)`.
    """
    return -(-num_codes * num_bits // WORD)


def index_bits(size: int) -> int:
    """Bits of an index into so many numbers, `ceil(log2 size)`.

    Args:
      size: numbers, at least 0.

    Returns:
      A Python int; 0 where there is no choice.
    """
    return max(size - 1, 0).bit_length()


def _block(num_bits: int) -> tuple[int, int]:
    """Codes and words of one block."""
    if not 0 <= num_bits <= WORD:
        raise ValueError(f"num_bits must lie within [0, 32], got {num_bits}.")
    common = math.gcd(num_bits, WORD)
    return WORD // common, num_bits // common


def pack_bits(codes: jax.Array, num_bits: int) -> jax.Array:
    """Writes codes next to each other.

    Args:
      codes: `[n]` uint32, below `2^num_bits`.
      num_bits: bits of a code, 0 to 32.

    Returns:
      `[ceil(n num_bits / 32)]` uint32; the rest of the last word is 0.

    Raises:
      ValueError: if `num_bits` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> print(pack_bits(jnp.array([1, 2, 3], jnp.uint32), 4))
      [801]
    """
    count = codes.shape[0]
    block_codes, block_words = _block(num_bits)
    if count == 0 or num_bits == 0:
        return jnp.zeros(0, jnp.uint32)
    columns = jnp.pad(codes, (0, -count % block_codes)).reshape(-1, block_codes)
    words = [jnp.zeros(columns.shape[0], jnp.uint32) for _ in range(block_words)]
    for i in range(block_codes):
        word, shift = divmod(i * num_bits, WORD)
        words[word] = words[word] | (columns[:, i] << jnp.uint32(shift))
        if shift + num_bits > WORD:
            words[word + 1] = words[word + 1] | (columns[:, i] >> jnp.uint32(WORD - shift))
    return jnp.stack(words, axis=1).reshape(-1)[: num_words(count, num_bits)]


def unpack_bits(words: jax.Array, num_bits: int, num_codes: int) -> jax.Array:
    """The inverse of `pack_bits`.

    Args:
      words: uint32, from `pack_bits`.
      num_bits: bits of a code.
      num_codes: how many codes.

    Returns:
      `[num_codes]` uint32.

    Raises:
      ValueError: if `num_bits` is out of range.
    """
    block_codes, block_words = _block(num_bits)
    if num_codes == 0 or num_bits == 0:
        return jnp.zeros(num_codes, jnp.uint32)
    blocks = jnp.pad(words, (0, -words.shape[0] % block_words)).reshape(-1, block_words)
    lowest = jnp.uint32(2**num_bits - 1)
    codes = []
    for i in range(block_codes):
        word, shift = divmod(i * num_bits, WORD)
        code = blocks[:, word] >> jnp.uint32(shift)
        if shift + num_bits > WORD:
            code = code | (blocks[:, word + 1] << jnp.uint32(WORD - shift))
        codes.append(code & lowest)
    return jnp.stack(codes, axis=1).reshape(-1)[:num_codes]
