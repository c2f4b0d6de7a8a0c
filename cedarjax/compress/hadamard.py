"""Random rotations by the fast Walsh-Hadamard transform.

Reference: Ailon and Chazelle, `The Fast Johnson-Lindenstrauss Transform and Approximate Nearest Neighbors
<https://doi.org/10.1137/060673096>`_, 2009. The transform of length `2^k` is a Kronecker product of small Hadamard
matrices, so it is a few matrix products, which every backend runs at the speed of its hardware.
"""

import jax
import jax.numpy as jnp

_FACTOR_BITS = 5  # matrices of at most 32 x 32: the quickest on a CPU


def _factors(num_bits: int) -> list[int]:
    """Logarithms of the sizes of the small matrices, as equal as can be."""
    count = max(1, -(-num_bits // _FACTOR_BITS))
    return [num_bits // count + (i < num_bits % count) for i in range(count)]


def _hadamard_matrix(size: int, dtype: jnp.dtype) -> jax.Array:
    index = jnp.arange(size, dtype=jnp.uint32)
    odd = jax.lax.population_count(index[:, None] & index[None, :]) & 1
    return 1 - 2 * odd.astype(dtype)


def hadamard_transform(x: jax.Array) -> jax.Array:
    """Orthonormal Walsh-Hadamard transform of the last axis.

    `y = H x / sqrt(d)` with `H[i, j] = (-1)^popcount(i & j)`. It keeps lengths, and it is its own inverse.

    Args:
      x: `[..., d]` floats, `d` a power of two.

    Returns:
      `[..., d]`, in the dtype of `x`; computed in float32 or wider.

    Raises:
      ValueError: if `d` is not a power of two.

    Example:
      >>> import jax.numpy as jnp
      >>> hadamard_transform(jnp.array([1.0, 0.0, 0.0, 2.0]))
      Array([ 1.5, -0.5, -0.5,  1.5], dtype=float32)
    """
    length = x.shape[-1] if x.ndim else 0
    if length < 1 or length & (length - 1):
        raise ValueError(f"x must have a power of two of numbers on its last axis, got the shape {x.shape}.")
    factors = _factors(length.bit_length() - 1)
    dtype = x.dtype if x.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    axis = x.ndim - 1
    y = x.astype(dtype).reshape(*x.shape[:-1], *(2**bits for bits in factors))
    for bits in factors:  # each product moves its axis to the end, so that all end up in order
        matrix = _hadamard_matrix(2**bits, dtype) * 2.0 ** (-bits / 2)
        y = jax.lax.dot_general(y, matrix, (((axis,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return y.reshape(x.shape).astype(x.dtype)


def _signs(seed: jax.Array, round_index: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Independent random signs, 32 from every random word."""
    count = 1
    for size in shape:
        count *= size
    # The generator is named, so that a seed means the same to sender and receiver whatever their default is.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), round_index)
    words = jax.random.bits(key, (-(-count // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None, :]) & 1
    return (1 - 2 * bits.astype(dtype)).reshape(-1)[:count].reshape(shape)


def rotate(x: jax.Array, seed: jax.Array, *, num_rotations: int = 1) -> jax.Array:
    """Random rotation, `H D_r ... H D_1 x`, of the last axis.

    `D_k` is diagonal with independent random signs, drawn from the seed for every number of `x`. One rotation spreads a
    vector evenly unless few numbers dominate it; two leave nothing of it to see.

    Args:
      x: `[..., d]` floats, `d` a power of two.
      seed: uint32 scalar, what the receiver must know to rotate back.
      num_rotations: `r`, at least 1.

    Returns:
      `[..., d]`, in the dtype of `x`.

    Raises:
      ValueError: if `d` is not a power of two or `num_rotations` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([3.0, 0.0, 0.0, 4.0])
      >>> y = rotate(x, jnp.uint32(7))
      >>> print(jnp.abs(y), jnp.allclose(rotate_back(y, jnp.uint32(7)), x, atol=1e-6))
      [0.5 3.5 3.5 0.5] True
    """
    if num_rotations < 1:
        raise ValueError(f"num_rotations must be at least 1, got {num_rotations}.")
    for k in range(num_rotations):
        x = hadamard_transform(x * _signs(seed, k, x.shape, x.dtype))
    return x


def rotate_back(y: jax.Array, seed: jax.Array, *, num_rotations: int = 1) -> jax.Array:
    """The inverse of `rotate` with the same seed.

    Args:
      y: `[..., d]` floats, `d` a power of two.
      seed: uint32 scalar.
      num_rotations: as in `rotate`.

    Returns:
      `[..., d]`, in the dtype of `y`.

    Raises:
      ValueError: if `d` is not a power of two or `num_rotations` is below 1.
    """
    if num_rotations < 1:
        raise ValueError(f"num_rotations must be at least 1, got {num_rotations}.")
    for k in reversed(range(num_rotations)):
        y = hadamard_transform(y) * _signs(seed, k, y.shape, y.dtype)
    return y
