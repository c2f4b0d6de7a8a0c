"""TernGrad: every number is 0 or plus or minus the largest.

Reference: Wen, Xu, Yan, Wu, Wang, Chen, Li, `TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
Learning <https://arxiv.org/abs/1705.07878>`_, 2017. The paper clips at 2.5 standard deviations first, layer by layer,
which makes it biased; here this is an option.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.compress.dither import uniforms
from cedarjax.compress.entropy import code_entropy
from cedarjax.compress.norms import SCALE, inverse_or_zero, two_norm
from cedarjax.compress.packing import pack_bits, unpack_bits
from cedarjax.core.dtypes import accumulator

_BITS = 2  # of a code, one of 0, 1 and 2


class TernaryPayload(NamedTuple):
    """What is sent of one vector."""

    codes: jax.Array
    """uint32 words, two bits a number: 0 for minus, 1 for nothing, 2 for plus."""
    scale: jax.Array
    """Scalar, the largest magnitude."""


def ternary(vector: jax.Array, scale: jax.Array, thresholds: jax.Array) -> jax.Array:
    """`sign(v_i) Bernoulli(|v_i| / scale)`.

    Args:
      vector: `[d]` float32 or float64.
      scale: scalar, at least the largest magnitude.
      thresholds: `[d]`, uniform in `[0, 1)`.

    Returns:
      `[d]` of -1, 0 and 1, in floats.
    """
    share = jnp.abs(vector) * SCALE * inverse_or_zero(scale * SCALE)
    return jnp.sign(vector) * (thresholds < share).astype(vector.dtype)


def clip_at_deviations(vector: jax.Array, num_deviations: float) -> jax.Array:
    """Clips magnitudes at so many standard deviations of the numbers.

    Args:
      vector: `[d]` float32 or float64.
      num_deviations: how many.

    Returns:
      `[d]`.
    """
    size = max(vector.shape[0], 1)
    centred = vector - jnp.sum(vector * (1.0 / size))
    largest = jnp.max(jnp.abs(centred), initial=0.0) * SCALE
    relative = two_norm(centred * SCALE * inverse_or_zero(largest))
    bound = relative * (num_deviations / size**0.5) * largest * (1.0 / SCALE)
    return jnp.clip(vector, -bound, bound)


def terngrad(*, clip: float | None = None, scope: Scope = "leaf") -> Compressor:
    """Sends the sign of a number with the probability of its share of the largest magnitude.

    `max|v| sign(v_i) Bernoulli(|v_i| / max|v|)`: unbiased.

    Args:
      clip: standard deviations at which magnitudes are clipped first, at the price of a bias; the paper has 2.5, the
        default is none.
      scope: whether a leaf or the whole model is one vector.

    Returns:
      A `Compressor`; `2 d` bits and a float of 32 bits (float64: 64).

    Raises:
      ValueError: if `clip` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = terngrad()
      >>> compressed, _ = compressor.compress(jnp.array([2.0, -2.0, 0.0]), (), jax.random.key(0))
      >>> print(compressor.decompress(compressed), compressor.bits(compressed))
      [ 2. -2.  0.] 38
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}.")

    def signs(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        vector = vector.astype(accumulator(vector))
        if clip is not None:
            vector = clip_at_deviations(vector, clip)
        scale = jnp.max(jnp.abs(vector), initial=0.0)
        return ternary(vector, scale, uniforms(key, vector.shape[0], vector.dtype)), scale

    def encode(vector: jax.Array, key: jax.Array) -> TernaryPayload:
        signed, scale = signs(vector, key)
        return TernaryPayload(pack_bits((signed + 1.0).astype(jnp.uint32) & jnp.uint32(3), _BITS), scale)

    def decode(payload: TernaryPayload, size: int) -> jax.Array:
        return (unpack_bits(payload.codes, _BITS, size).astype(payload.scale.dtype) - 1.0) * payload.scale

    def roundtrip(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, int]:
        signed, scale = signs(vector, key)
        return signed * scale, _BITS * vector.shape[0] + 8 * scale.dtype.itemsize

    def bits(payload: TernaryPayload, size: int) -> int:
        return _BITS * size + 8 * payload.scale.dtype.itemsize

    def entropy(payload: TernaryPayload, size: int) -> jax.Array:
        return code_entropy(unpack_bits(payload.codes, _BITS, size), 2**_BITS) + 8 * payload.scale.dtype.itemsize

    return lift(Codec(encode, decode, bits, roundtrip, entropy), scope)
