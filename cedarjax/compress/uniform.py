"""Stochastic rounding to evenly spaced levels between the least and the largest number.

Reference: Suresh, Yu, Kumar, McMahan, `Distributed Mean Estimation with Limited Communication
<https://arxiv.org/abs/1611.00429>`_, 2017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.compress.dither import uniforms
from cedarjax.compress.entropy import code_entropy
from cedarjax.compress.norms import SCALE, inverse_or_zero
from cedarjax.compress.packing import pack_bits, unpack_bits
from cedarjax.core.batches import check_positive
from cedarjax.core.dtypes import accumulator

_MOST_BITS = 16


class UniformPayload(NamedTuple):
    """What is sent of one vector."""

    codes: jax.Array
    """uint32 words, `num_bits` a number."""
    least: jax.Array
    """`[n]`, of each chunk."""
    largest: jax.Array
    """`[n]`, of each chunk."""


def extremes(chunks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Least and largest number of each chunk, in one pass.

    Args:
      chunks: `[..., size]` floats.

    Returns:
      Two `[...]` arrays, NaN where a chunk holds one.
    """
    infinity = jnp.asarray(jnp.inf, chunks.dtype)

    def both(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return lax.min(a[0], b[0]), lax.max(a[1], b[1])

    return lax.reduce((chunks, chunks), (infinity, -infinity), both, (chunks.ndim - 1,))


def stochastic_round(x: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Rounds up with the probability of the fraction: `floor(x) + [u < x - floor(x)]`.

    Args:
      x: floats.
      thresholds: `u`, uniform in `[0, 1)`, of the same shape.

    Returns:
      Whole numbers, in floats; whole `x` stay as they are.
    """
    whole = jnp.floor(x)
    return whole + (thresholds < x - whole).astype(x.dtype)


def _scaled_step(least: jax.Array, largest: jax.Array, num_steps: int) -> jax.Array:
    return (largest * SCALE - least * SCALE) * (1.0 / num_steps)


def uniform_codes(
    chunks: jax.Array, least: jax.Array, largest: jax.Array, thresholds: jax.Array, num_bits: int
) -> jax.Array:
    """Levels to which the numbers are rounded.

    `t = (v - least) / (largest - least) (2^b - 1)`; `floor(t) + Bernoulli(t - floor(t))`.

    Args:
      chunks: `[..., size]` float32 or float64.
      least: `[...]`.
      largest: `[...]`.
      thresholds: `[..., size]`, uniform in `[0, 1)`.
      num_bits: `b`.

    Returns:
      `[..., size]` whole numbers from 0 to `2^b - 1`, in floats.
    """
    most = 2**num_bits - 1
    step = _scaled_step(least, largest, most)
    inverse = inverse_or_zero(step)[..., None]
    t = (chunks * SCALE - least[..., None] * SCALE) * inverse
    return stochastic_round(jnp.minimum(t, float(most)), thresholds)


def uniform_values(codes: jax.Array, least: jax.Array, largest: jax.Array, num_bits: int) -> jax.Array:
    """Numbers that levels stand for, `least + code (largest - least) / (2^b - 1)`.

    Args:
      codes: `[..., size]` floats.
      least: `[...]`.
      largest: `[...]`.
      num_bits: `b`.

    Returns:
      `[..., size]`, none above the largest.
    """
    step = _scaled_step(least, largest, 2**num_bits - 1)
    return jnp.minimum((least[..., None] * SCALE + codes * step[..., None]) * (1 / SCALE), largest[..., None])


def uniform_quantize(num_bits: int, *, chunk_size: int | None = None, scope: Scope = "leaf") -> Compressor:
    """Rounds each number at random to one of its two neighbours among `2^b` levels from the least to the largest.

    Unbiased, and no number moves by more than `(largest - least) / (2^b - 1)` of its chunk. A constant chunk arrives as
    it is; so does one whose numbers differ by less than `2^-122 (2^b - 1)`, as its least number. The thresholds of
    float32 are multiples of 2^-24.

    Args:
      num_bits: `b`, 1 to 16.
      chunk_size: numbers that share two bounds, taken in a row; default: all of the vector.
      scope: whether a leaf or the whole model is one vector.

    Returns:
      A `Compressor`; `b d` bits, and two floats of 32 bits (float64: 64) a chunk.

    Raises:
      ValueError: if `num_bits` or `chunk_size` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = uniform_quantize(2)
      >>> compressed, _ = compressor.compress(jnp.array([0.0, 2.0, 2.5, 3.0]), (), jax.random.key(0))
      >>> print(compressor.decompress(compressed)[jnp.array([0, 1, 3])], compressor.bits(compressed))
      [0. 2. 3.] 72
    """
    if not 1 <= num_bits <= _MOST_BITS:
        raise ValueError(f"num_bits must lie within [1, {_MOST_BITS}], got {num_bits}.")
    if chunk_size is not None:
        check_positive(chunk_size=chunk_size)

    def in_chunks(vector: jax.Array) -> jax.Array:
        """`[n, size]`, or the vector itself, `[d]`, if it is one chunk, which XLA:CPU reduces faster."""
        if vector.shape[0] == 0:
            return vector.reshape(0, 1)
        if chunk_size is None or chunk_size >= vector.shape[0]:
            return vector
        missing = -vector.shape[0] % chunk_size
        padded = jnp.pad(vector, (0, missing), mode="edge") if missing else vector  # the last one widens no range
        return padded.reshape(-1, chunk_size)

    def rounded(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        chunks = in_chunks(vector.astype(accumulator(vector)))
        least, largest = extremes(chunks)
        thresholds = uniforms(key, chunks.size, chunks.dtype).reshape(chunks.shape)
        return uniform_codes(chunks, least, largest, thresholds, num_bits), least, largest

    def encode(vector: jax.Array, key: jax.Array) -> UniformPayload:
        codes, least, largest = rounded(vector, key)
        whole = codes.reshape(-1)[: vector.shape[0]].astype(jnp.uint32)
        return UniformPayload(
            pack_bits(whole & jnp.uint32(2**num_bits - 1), num_bits), least.reshape(-1), largest.reshape(-1)
        )

    def decode(payload: UniformPayload, size: int) -> jax.Array:
        codes = in_chunks(unpack_bits(payload.codes, num_bits, size).astype(payload.least.dtype))
        least, largest = (bound.reshape(codes.shape[:-1]) for bound in (payload.least, payload.largest))
        return uniform_values(codes, least, largest, num_bits).reshape(-1)[:size]

    def bounds_bits(least: jax.Array) -> int:
        return 2 * 8 * least.dtype.itemsize * least.size

    def bits(payload: UniformPayload, size: int) -> int:
        return num_bits * size + bounds_bits(payload.least)

    def roundtrip(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, int]:
        codes, least, largest = rounded(vector, key)
        size = vector.shape[0]
        values = uniform_values(codes, least, largest, num_bits).reshape(-1)[:size]
        return values, num_bits * size + bounds_bits(least)

    def entropy(payload: UniformPayload, size: int) -> jax.Array:
        codes = unpack_bits(payload.codes, num_bits, size)
        return code_entropy(codes, 2**num_bits) + bounds_bits(payload.least)

    return lift(Codec(encode, decode, bits, roundtrip, entropy), scope)
