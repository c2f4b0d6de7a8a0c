"""Quantising after a random rotation.

Reference: Suresh et al., `Distributed Mean Estimation with Limited Communication <https://arxiv.org/abs/1611.00429>`_,
2017. A rotated vector has entries of about the same size, so that few levels serve all of them. `rotated` lifts any
code for rotated numbers to a `Codec`; `drive` and `eden` are two others.

A vector is cut into blocks, each padded with zeros to the length that the transform needs, a power of two, and the
padding is sent. Beyond the paper: by default the blocks are of the size that makes the upload shortest, where one block
may be up to twice as long as the vector, and a vector that would be no shorter in codes is sent as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.compress.dither import uniforms
from cedarjax.compress.entropy import code_entropy
from cedarjax.compress.hadamard import rotate, rotate_back
from cedarjax.compress.packing import pack_bits, unpack_bits
from cedarjax.compress.uniform import extremes, uniform_codes, uniform_values
from cedarjax.core.types import PyTree

_SMALLEST = 64  # by default: the transform mixes fewer numbers too little
_SMALLEST_OF_MANY = 128  # by default, of a vector that needs several blocks


class RotatedPayload(NamedTuple):
    """What is sent of one vector."""

    codes: jax.Array
    """`[num_blocks * block_size * num_bits / 32]` uint32, codes of the rotated numbers, densely packed."""
    scales: jax.Array
    """`[num_blocks, num_scales]` float32."""
    seed: jax.Array
    """uint32 scalar, seed of the rotation."""


class RotatedCode(NamedTuple):
    """A code for blocks of rotated numbers."""

    num_bits: int
    """Bits of a number."""
    num_scales: int
    """Floats that go with a block."""
    quantise: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """`quantise(rotated [num_blocks, block_size], key) -> (codes uint32, of that shape; [num_blocks, num_scales])`."""
    dequantise: Callable[[jax.Array, jax.Array], jax.Array]
    """`dequantise(codes, scales) -> [num_blocks, block_size]` float32."""


def _plain_bits(vector: jax.Array) -> int:
    return 8 * vector.size * vector.dtype.itemsize


def _block_bits(num_bits: int, num_scales: int, block_size: int) -> int:
    return num_bits * block_size + 32 * num_scales


def block_shape(length: int, num_bits: int, num_scales: int, block_size: int | None = None) -> tuple[int, int]:
    """How a vector is cut into blocks.

    Args:
      length: numbers of the vector, at least 1.
      num_bits: bits of a number.
      num_scales: floats that go with a block.
      block_size: power of two, which is taken unless the whole vector fits into less; default: the one of at least 64
        with the shortest upload, the larger one where two are equal.

    Returns:
      The number of blocks, and the numbers in each, a power of two.

    Example:
      >>> block_shape(5000, num_bits=1, num_scales=1), block_shape(5000, num_bits=1, num_scales=1, block_size=2**13)
      ((5, 1024), (1, 8192))
    """
    whole = 1 << (length - 1).bit_length()
    sizes = [min(whole, block_size)] if block_size is not None else [max(whole, _SMALLEST)]
    while block_size is None and sizes[-1] > _SMALLEST_OF_MANY:
        sizes.append(sizes[-1] // 2)
    shapes = [(-(-length // size), size) for size in sizes]
    return min(shapes, key=lambda shape: shape[0] * _block_bits(num_bits, num_scales, shape[1]))


def rotated(code: RotatedCode, *, block_size: int | None = None, num_rotations: int = 1) -> Codec:
    """Code for one vector: rotate blocks of it at random, quantise, and rotate back.

    Args:
      code: for the rotated numbers.
      block_size: numbers that are rotated together, a power of two; default: the one of at least 64 with the shortest
        upload.
      num_rotations: as in `rotate`.

    Returns:
      A `Codec`. Its bits count the codes with the padding, the scales, and the seed. A vector that is no longer as it
      is, in its own dtype, is sent so.

    Raises:
      ValueError: if `block_size` is not such a power of two, or `num_rotations` is below 1.
    """
    if block_size is not None and (block_size < 1 or block_size & (block_size - 1)):
        raise ValueError(f"block_size must be None or a power of two, got {block_size}.")
    if num_rotations < 1:
        raise ValueError(f"num_rotations must be at least 1, got {num_rotations}.")

    def shape_of(length: int) -> tuple[int, int]:
        return block_shape(length, code.num_bits, code.num_scales, block_size)

    def coded_bits(length: int) -> int:
        num_blocks, size = shape_of(length)
        return num_blocks * _block_bits(code.num_bits, code.num_scales, size) + 32

    def is_plain(vector: jax.Array) -> bool:
        return not vector.size or _plain_bits(vector) <= coded_bits(vector.size)

    def quantised(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        num_blocks, size = shape_of(vector.size)
        seed_key, code_key = jax.random.split(key)
        seed = jax.random.bits(seed_key, (), jnp.uint32)
        blocks = jnp.pad(vector.astype(jnp.float32), (0, num_blocks * size - vector.size)).reshape(num_blocks, size)
        codes, scales = code.quantise(rotate(blocks, seed, num_rotations=num_rotations), code_key)
        return codes, scales.astype(jnp.float32), seed

    def restored(codes: jax.Array, scales: jax.Array, seed: jax.Array, length: int) -> jax.Array:
        blocks = rotate_back(code.dequantise(codes, scales), seed, num_rotations=num_rotations)
        return blocks.reshape(-1)[:length]

    def encode(vector: jax.Array, key: jax.Array) -> PyTree:
        if is_plain(vector):
            return vector
        codes, scales, seed = quantised(vector, key)
        return RotatedPayload(pack_bits(codes.reshape(-1), code.num_bits), scales, seed)

    def codes_of(payload: RotatedPayload, length: int) -> jax.Array:
        num_blocks, size = shape_of(length)
        return unpack_bits(payload.codes, code.num_bits, num_blocks * size)

    def decode(payload: PyTree, length: int) -> jax.Array:
        if not isinstance(payload, RotatedPayload):
            return payload
        codes = codes_of(payload, length).reshape(shape_of(length))
        return restored(codes, payload.scales, payload.seed, length)

    def bits(payload: PyTree, length: int) -> int:
        return coded_bits(length) if isinstance(payload, RotatedPayload) else _plain_bits(payload)

    def roundtrip(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, int]:
        if is_plain(vector):
            return vector, _plain_bits(vector)
        return restored(*quantised(vector, key), vector.size), coded_bits(vector.size)

    def entropy(payload: PyTree, length: int) -> jax.Array | float:
        if not isinstance(payload, RotatedPayload):
            return float(_plain_bits(payload))
        return code_entropy(codes_of(payload, length), 2**code.num_bits) + 32 * payload.scales.size + 32

    return Codec(encode, decode, bits, roundtrip, entropy)


def uniform_code(num_bits: int) -> RotatedCode:
    """Unbiased rounding to `2^num_bits` evenly spaced levels between the least and the greatest number of a block.

    Args:
      num_bits: `b`, from 1 to 16.

    Returns:
      A `RotatedCode` with the least and the greatest number for scales.

    Raises:
      ValueError: if `num_bits` is out of range.
    """
    if not 1 <= num_bits <= 16:
        raise ValueError(f"num_bits must lie within [1, 16], got {num_bits}.")

    def quantise(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        least, largest = extremes(x)
        levels = uniform_codes(x, least, largest, uniforms(key, x.size).reshape(x.shape), num_bits)
        codes = levels.astype(jnp.uint32) & jnp.uint32(2**num_bits - 1)  # what NaN becomes is any code
        return codes, jnp.stack([least, largest], axis=1)

    def dequantise(codes: jax.Array, scales: jax.Array) -> jax.Array:
        return uniform_values(codes.astype(jnp.float32), scales[:, 0], scales[:, 1], num_bits)

    return RotatedCode(num_bits, 2, quantise, dequantise)


def rotated_quantize(
    num_bits: int, *, block_size: int | None = None, num_rotations: int = 1, scope: Scope = "leaf"
) -> Compressor:
    """Stochastic uniform quantisation of the randomly rotated vector.

    `R^T Q(R x)`, where `Q` rounds each number up or down to one of `2^b` levels between the least and the greatest, at
    random and so that the mean is the number itself: unbiased, whatever the rotation.

    Args:
      num_bits: `b`, bits of a number, from 1 to 16.
      block_size: numbers that are rotated together, with two float32 for their levels: a power of two, or the next one
        for a shorter vector. Default: the one of at least 64 with the shortest upload.
      num_rotations: 1 as in the paper; 2 if few numbers dominate the update.
      scope: `"leaf"` for a vector of each leaf, `"model"` for one of all parameters.

    Returns:
      A `Compressor` without a state. Padding counts in its bits, as it is sent. A vector that is not finite stays so.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = rotated_quantize(8)
      >>> delta = {"w": jnp.linspace(-1.0, 1.0, 1000)}
      >>> compressed, _ = compressor.compress(delta, (), jax.random.key(0))
      >>> print(compressor.bits(compressed), 32 * 1000)
      8288 32000
      >>> print(jnp.abs(compressor.decompress(compressed)["w"] - delta["w"]).max() < 0.05)
      True
    """
    return lift(rotated(uniform_code(num_bits), block_size=block_size, num_rotations=num_rotations), scope)
