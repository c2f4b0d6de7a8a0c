"""Random-k: numbers at places that a shared seed tells.

Reference: Konecny, McMahan, Yu, Richtarik, Suresh, Bacon, `Federated Learning: Strategies for Improving Communication
Efficiency <https://arxiv.org/abs/1610.05492>`_, 2016, calls it a random mask. Here exactly `k` numbers are sent: places
are those to which a random permutation, made of the seed, takes the first `k` indices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.compress.dither import mix, random_words
from cedarjax.compress.packing import index_bits
from cedarjax.compress.top_k import check_fraction, num_kept

_ROUNDS = 4
_GOLDEN = 0x9E3779B9
_SEED_BITS = 32


class SeededPayload(NamedTuple):
    """What is sent of one vector."""

    seed: jax.Array
    """uint32 scalar, from which places follow."""
    values: jax.Array
    """`[k]`, in the dtype of the vector, unscaled."""


def random_places(seed: jax.Array, size: int, num_places: int) -> jax.Array:
    """Distinct places, each as likely as any other.

    A keyed bijection of `ceil(log2 d)` bits is applied to `0, 1, ..., k - 1`, again and again while the result is no
    place, which is a permutation of `d` places; then all move on by the same number.

    Args:
      seed: uint32 scalar.
      size: `d`, at least 1.
      num_places: `k`, at most `d`.

    Returns:
      `[k]` int32 in `[0, d)`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(jnp.sort(random_places(jnp.uint32(1), 5, 5)))
      [0 1 2 3 4]
    """
    width = index_bits(size)
    lowest, half = jnp.uint32(2**width - 1), jnp.uint32(-(-width // 2))
    salts = [mix(seed + jnp.uint32((i + 1) * _GOLDEN % 2**32)) for i in range(2 * _ROUNDS + 1)]

    def scatter(x: jax.Array) -> jax.Array:
        for factor, shift in zip(salts[0:-1:2], salts[1:-1:2], strict=True):
            x = (x * (factor | jnp.uint32(1)) + shift) & lowest
            x = x ^ (x >> half) if width > 1 else x
        return x

    def again(x: jax.Array) -> jax.Array:
        return jnp.where(x >= jnp.uint32(size), scatter(x), x)

    first = scatter(lax.iota(jnp.uint32, num_places))
    places = lax.while_loop(lambda x: jnp.any(x >= jnp.uint32(size)), again, first)
    places = places + salts[-1] % jnp.uint32(size)  # the last salt is uniform, whatever the bijection is
    return jnp.where(places >= jnp.uint32(size), places - jnp.uint32(size), places).astype(jnp.int32)


def random_k(fraction: float, *, scale: bool = True, scope: Scope = "leaf") -> Compressor:
    """Sends `k = max(1, round(fraction d))` numbers at random places.

    With scaling by `d / k` unbiased, with `E |C(v) - v|^2 = (d / k - 1) |v|^2`; without, contractive on average: `E
    |C(v) - v|^2 = (1 - k / d) |v|^2`.

    Args:
      fraction: of the numbers, in (0, 1].
      scale: whether the receiver multiplies by `d / k`; False is for error feedback.
      scope: whether a leaf or the whole model is one vector.

    Returns:
      A `Compressor`; a seed of 32 bits, and `k` numbers in the dtype of the parameters.

    Raises:
      ValueError: if `fraction` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = random_k(0.25)
      >>> compressed, _ = compressor.compress(jnp.ones(8), (), jax.random.key(0))
      >>> print(jnp.sort(compressor.decompress(compressed)), compressor.bits(compressed))
      [0. 0. 0. 0. 0. 0. 4. 4.] 96
    """
    check_fraction(fraction)

    def encode(vector: jax.Array, key: jax.Array) -> SeededPayload:
        seed = random_words(key, 1)[0]
        size = vector.shape[0]
        if size == 0:
            return SeededPayload(seed, vector)
        values = vector[random_places(seed, size, num_kept(size, fraction))]
        return SeededPayload(seed, values + jnp.sum(vector * 0.0))  # what is not finite shows, wherever it is

    def decode(payload: SeededPayload, size: int) -> jax.Array:
        count = payload.values.shape[0]
        if size == 0:
            return payload.values
        values = payload.values * (size / count) if scale else payload.values
        return jnp.zeros(size, values.dtype).at[random_places(payload.seed, size, count)].set(values)

    def bits(payload: SeededPayload, size: int) -> int:
        return _SEED_BITS * (size > 0) + 8 * payload.values.shape[0] * payload.values.dtype.itemsize

    return lift(Codec(encode, decode, bits), scope)
