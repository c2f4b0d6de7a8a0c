"""Signs and one scale.

References: Bernstein, Wang, Azizzadenesheli, Anandkumar, `signSGD: Compressed Optimisation for Non-Convex Problems
<https://arxiv.org/abs/1802.04434>`_, 2018; Karimireddy, Rebjock, Stich, Jaggi, `Error Feedback Fixes SignSGD and other
Gradient Compression Schemes <https://arxiv.org/abs/1901.09847>`_, 2019, which gives it this scale and a memory:
`with_error_feedback(local_update, sign())`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.compress.entropy import code_entropy
from cedarjax.compress.norms import mean_magnitude
from cedarjax.compress.packing import pack_bits, unpack_bits
from cedarjax.core.dtypes import accumulator


class SignPayload(NamedTuple):
    """What is sent of one vector."""

    signs: jax.Array
    """uint32 words of 32 signs, 1 where a number is below 0."""
    scale: jax.Array
    """Scalar, the mean magnitude."""


def sign(*, scope: Scope = "leaf") -> Compressor:
    """Sends signs and the mean magnitude, `|v|_1 / d` times the sign of each number, where 0 counts as positive.

    Biased and contractive: `|C(v) - v|^2 = |v|^2 - |v|_1^2 / d`. Use it with error feedback.

    Args:
      scope: whether a leaf or the whole model is one vector.

    Returns:
      A `Compressor`; `d` bits and a float of 32 bits (float64: 64).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = sign()
      >>> compressed, _ = compressor.compress(jnp.array([3.0, -1.0]), (), jax.random.key(0))
      >>> print(compressor.decompress(compressed), compressor.bits(compressed))
      [ 2. -2.] 34
    """

    def encode(vector: jax.Array, key: jax.Array) -> SignPayload:
        vector = vector.astype(accumulator(vector))
        return SignPayload(pack_bits((vector < 0).astype(jnp.uint32), 1), mean_magnitude(vector))

    def decode(payload: SignPayload, size: int) -> jax.Array:
        return jnp.where(unpack_bits(payload.signs, 1, size) > 0, -payload.scale, payload.scale)

    def roundtrip(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, int]:
        vector = vector.astype(accumulator(vector))
        scale = mean_magnitude(vector)
        return jnp.where(vector < 0, -scale, scale), vector.shape[0] + 8 * scale.dtype.itemsize

    def bits(payload: SignPayload, size: int) -> int:
        return size + 8 * payload.scale.dtype.itemsize

    def entropy(payload: SignPayload, size: int) -> jax.Array:
        return code_entropy(unpack_bits(payload.signs, 1, size), 2) + 8 * payload.scale.dtype.itemsize

    return lift(Codec(encode, decode, bits, roundtrip, entropy), scope)
