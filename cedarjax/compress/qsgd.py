"""QSGD: levels of the Euclidean norm.

Reference: Alistarh, Grubic, Li, Tomioka, Vojnovic, `QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding <https://arxiv.org/abs/1610.02132>`_, 2017. There codes are coded further, by Elias' code; here their width is
fixed, and `entropy_bits` says what there is to gain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.compress.dither import uniforms
from cedarjax.compress.entropy import code_entropy
from cedarjax.compress.norms import SCALE, inverse_or_zero, two_norm
from cedarjax.compress.packing import index_bits, pack_bits, unpack_bits
from cedarjax.compress.uniform import stochastic_round
from cedarjax.core.dtypes import accumulator

_MOST_LEVELS = 2**15


class QsgdPayload(NamedTuple):
    """What is sent of one vector."""

    codes: jax.Array
    """uint32 words; a code is a signed level, from `-s` to `s`, plus `s`."""
    norm: jax.Array
    """Scalar, the Euclidean norm."""


def qsgd_levels(vector: jax.Array, norm: jax.Array, thresholds: jax.Array, num_levels: int) -> jax.Array:
    """Signed levels, `floor(t) + Bernoulli(t - floor(t))` with `t = s v_i / |v|_2`.

    Rounding magnitudes and giving them their signs, as the paper has it, is the same in distribution.

    Args:
      vector: `[d]` float32 or float64.
      norm: scalar, `|v|_2`.
      thresholds: `[d]`, uniform in `[0, 1)`.
      num_levels: `s`.

    Returns:
      `[d]` whole numbers from `-s` to `s`, in floats.
    """
    most = float(num_levels)
    inverse = inverse_or_zero(norm * SCALE) * most
    return stochastic_round(jnp.clip(vector * SCALE * inverse, -most, most), thresholds)


def qsgd(num_levels: int, *, scope: Scope = "leaf") -> Compressor:
    """Rounds the magnitudes at random to multiples of `|v|_2 / s` and keeps the signs.

    Unbiased, with `E |Q(v) - v|^2 <= min(d / s^2, sqrt(d) / s) |v|^2`, where the norm lies within 1e-12 and 1.8e19, as
    that of any update does that moves a model and has not diverged. A smaller vector sends zeros, a larger one
    arrives as one that is not finite (float64: within 1e-138 and 1e154).

    Args:
      num_levels: `s`, levels above 0, 1 to 2^15.
      scope: whether a leaf or the whole model is one vector.

    Returns:
      A `Compressor`; `ceil(log2(2 s + 1)) d` bits and a float of 32 bits (float64: 64).

    Raises:
      ValueError: if `num_levels` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = qsgd(5)
      >>> compressed, _ = compressor.compress(jnp.array([3.0, -4.0, 0.0]), (), jax.random.key(0))
      >>> print(compressor.decompress(compressed), compressor.bits(compressed))
      [ 3. -4.  0.] 44
    """
    if not 1 <= num_levels <= _MOST_LEVELS:
        raise ValueError(f"num_levels must lie within [1, {_MOST_LEVELS}], got {num_levels}.")
    width = index_bits(2 * num_levels + 1)

    def levels(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        vector = vector.astype(accumulator(vector))
        norm = two_norm(vector)
        return qsgd_levels(vector, norm, uniforms(key, vector.shape[0], vector.dtype), num_levels), norm

    def values(levels: jax.Array, norm: jax.Array) -> jax.Array:
        return levels * (norm * (1.0 / num_levels))

    def encode(vector: jax.Array, key: jax.Array) -> QsgdPayload:
        signed, norm = levels(vector, key)
        codes = (signed + float(num_levels)).astype(jnp.uint32) & jnp.uint32(2**width - 1)
        return QsgdPayload(pack_bits(codes, width), norm)

    def decode(payload: QsgdPayload, size: int) -> jax.Array:
        codes = unpack_bits(payload.codes, width, size).astype(payload.norm.dtype)
        return values(codes - float(num_levels), payload.norm)

    def roundtrip(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, int]:
        signed, norm = levels(vector, key)
        return values(signed, norm), width * vector.shape[0] + 8 * norm.dtype.itemsize

    def bits(payload: QsgdPayload, size: int) -> int:
        return width * size + 8 * payload.norm.dtype.itemsize

    def entropy(payload: QsgdPayload, size: int) -> jax.Array:
        return code_entropy(unpack_bits(payload.codes, width, size), 2**width) + 8 * payload.norm.dtype.itemsize

    return lift(Codec(encode, decode, bits, roundtrip, entropy), scope)
