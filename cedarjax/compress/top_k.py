"""Top-k: the largest numbers and where they are.

References: Aji, Heafield, `Sparse Communication for Distributed Gradient Descent <https://arxiv.org/abs/1704.05021>`_,
2017; Stich, Cordonnier, Jaggi, `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Codec, Compressor, Scope, lift
from cedarjax.compress.counting import largest
from cedarjax.compress.entropy import subset_entropy
from cedarjax.compress.packing import index_bits, pack_bits, unpack_bits
from cedarjax.core.dtypes import accumulator


class SparsePayload(NamedTuple):
    """What is sent of one vector."""

    indices: jax.Array
    """uint32 words, `ceil(log2 d)` bits an index, in rising order; then 0 for empty places."""
    values: jax.Array
    """`[k]`, in the dtype of the vector."""


def num_kept(size: int, fraction: float) -> int:
    """Numbers that are sent of a vector: `max(1, round(fraction d))`, and none of none.

    Args:
      size: `d`.
      fraction: of the numbers, in (0, 1].

    Returns:
      `k`.
    """
    return min(size, max(1, round(fraction * size)))


def check_fraction(fraction: float) -> None:
    """Raises unless a fraction lies in (0, 1].

    Args:
      fraction: what the caller gave.

    Raises:
      ValueError: naming the value.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie within (0, 1], got {fraction}.")


def top_k(fraction: float, *, scope: Scope = "leaf") -> Compressor:
    """Sends the `k = max(1, round(fraction d))` numbers of largest magnitude; of equal ones, those of lowest index.

    Contractive: `|C(v) - v|^2 <= (1 - k / d) |v|^2`. Use it with error feedback.

    Args:
      fraction: of the numbers, in (0, 1].
      scope: whether a leaf or the whole model is one vector.

    Returns:
      A `Compressor`; `k ceil(log2 d)` bits for indices, and `k` numbers in the dtype of the parameters.

    Raises:
      ValueError: if `fraction` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compressor = top_k(0.5)
      >>> compressed, _ = compressor.compress(jnp.array([1.0, -3.0, 2.0, 0.0]), (), jax.random.key(0))
      >>> print(compressor.decompress(compressed), compressor.bits(compressed))
      [ 0. -3.  2.  0.] 68
    """
    check_fraction(fraction)

    def kept(vector: jax.Array) -> jax.Array:
        return largest(vector.astype(accumulator(vector)), num_kept(vector.shape[0], fraction))

    def encode(vector: jax.Array, key: jax.Array) -> SparsePayload:
        size = vector.shape[0]
        count = num_kept(size, fraction)
        if count == 0:
            return SparsePayload(jnp.zeros(0, jnp.uint32), vector)
        # Where there are fewer, index 0 comes again with nothing to add.
        (indices,) = jnp.nonzero(kept(vector) & (vector != 0), size=count, fill_value=size)
        there = indices < size
        indices = jnp.where(there, indices, 0).astype(jnp.uint32)
        values = jnp.where(there, vector[indices], jnp.zeros((), vector.dtype))
        return SparsePayload(pack_bits(indices, index_bits(size)), values)

    def decode(payload: SparsePayload, size: int) -> jax.Array:
        indices = unpack_bits(payload.indices, index_bits(size), payload.values.shape[0])
        return jnp.zeros(size, payload.values.dtype).at[indices].add(payload.values)

    def num_bits(size: int, dtype: jnp.dtype) -> int:
        return num_kept(size, fraction) * (index_bits(size) + 8 * dtype.itemsize)

    def bits(payload: SparsePayload, size: int) -> int:
        return num_bits(size, payload.values.dtype)

    def roundtrip(vector: jax.Array, key: jax.Array) -> tuple[jax.Array, int]:
        size = vector.shape[0]
        if size == 0:
            return vector, 0
        return jnp.where(kept(vector), vector, jnp.zeros((), vector.dtype)), num_bits(size, vector.dtype)

    def entropy(payload: SparsePayload, size: int) -> jax.Array:
        count = num_kept(size, fraction)
        return subset_entropy(size, count) + 8.0 * count * payload.values.dtype.itemsize

    return lift(Codec(encode, decode, bits, roundtrip, entropy), scope)
