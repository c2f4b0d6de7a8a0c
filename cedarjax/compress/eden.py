"""EDEN: a few bits for each number of the rotated vector.

Reference: Vargaftik et al., `EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated
Learning <https://arxiv.org/abs/2108.08842>`_, 2022. The numbers of a rotated vector are close to normal, so each is
sent as the nearest of the numbers of `lloyd_max.py`.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Compressor, Scope, lift
from cedarjax.compress.lloyd_max import normal_codebook
from cedarjax.compress.rotated import RotatedCode, rotated

Scaling = Literal["unbiased", "min_mse"]


def check_scaling(scaling: str) -> None:
    """Raises unless it is one of `Scaling`.

    Args:
      scaling: the argument.

    Raises:
      ValueError: naming it.
    """
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling must be one of {get_args(Scaling)}, got {scaling!r}.")


def normal_code(num_bits: int, scaling: Scaling = "unbiased") -> RotatedCode:
    """Nearest number of the normal codebook, for blocks of rotated numbers.

    With `y` a block, `Q` the nearest numbers to `y / rms(y)`: the scale is `|y|^2 / <y, Q>` to be unbiased, and
    `<y, Q> / |Q|^2` for the least squared error.

    Args:
      num_bits: from 1 to 8.
      scaling: which of the two scales.

    Returns:
      A `RotatedCode`; the highest bit of a code is the sign, 1 for negative.

    Raises:
      ValueError: if an argument is out of range.
    """
    check_scaling(scaling)
    book = normal_codebook(num_bits)
    half = len(book)

    def levels_of(codes: jax.Array) -> jax.Array:
        sizes = jnp.asarray(book, jnp.float32)
        size = sizes[0] if half == 1 else sizes[(codes & (half - 1)).astype(jnp.int32)]
        return jnp.where(codes < half, size, -size)

    def quantise(y: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        largest = jnp.abs(y).max(axis=1, keepdims=True)
        y = y / jnp.where(largest > 0, largest, jnp.ones_like(largest))  # squares of what is left do not overflow
        rms = jnp.sqrt(jnp.square(y).mean(axis=1, keepdims=True))
        y = y / jnp.where(rms > 0, rms, jnp.ones_like(rms))
        bounds = [0.5 * (a + b) for a, b in zip(book, book[1:], strict=False)]
        size = jnp.abs(y)
        codes = jnp.zeros(y.shape, jnp.uint32)
        if len(bounds) < 16:
            for bound in bounds:
                codes = codes + (size > bound).astype(jnp.uint32)
        else:
            codes = jnp.searchsorted(jnp.asarray(bounds, jnp.float32), size, method="scan_unrolled").astype(jnp.uint32)
        codes = codes + jnp.where(y < 0, half, 0).astype(jnp.uint32)
        levels = levels_of(codes)
        along = (y * levels).sum(axis=1, keepdims=True)
        if scaling == "unbiased":
            above, below = jnp.square(y).sum(axis=1, keepdims=True), along
        else:
            above, below = along, jnp.square(levels).sum(axis=1, keepdims=True)
        scale = above / jnp.where(below == 0, jnp.ones_like(below), below)
        return codes, scale * rms * largest

    def dequantise(codes: jax.Array, scales: jax.Array) -> jax.Array:
        return levels_of(codes) * scales

    return RotatedCode(num_bits, 1, quantise, dequantise)


def eden(
    num_bits: int,
    *,
    scaling: Scaling = "unbiased",
    block_size: int | None = None,
    num_rotations: int = 2,
    scope: Scope = "leaf",
) -> Compressor:
    """EDEN: the rotated numbers, each as the nearest of `2^b` numbers that suit a normal variable best.

    `s R^T Q(R x / rms(x))` with `s = |x|^2 / <R x, Q>`. The expected squared error is `D / (1 - D) |x|^2`, where `D` is
    what the codebook leaves of a normal variable's variance: 0.571, 0.133, 0.0358, 0.0096 for 1 to 4 bits.

    Unbiased for a uniformly random rotation. The Hadamard transform comes close: with two rotations the bias is below
    1 % of the length of `x`, unless all but two or three of its numbers are zero; with one it may be a half where a few
    numbers dominate.

    Args:
      num_bits: `b`, from 1 to 8; 1 is `drive`.
      scaling: `"unbiased"`; or `"min_mse"`, `s = <R x, Q> / |Q|^2`, biased towards 0, with the squared error `D |x|^2`
        in every draw, for error feedback.
      block_size: numbers that are rotated together, with one float32 for their scale: a power of two, or the next one
        for a shorter vector. Default: the one of at least 64 with the shortest upload; in fewer the bias is larger.
      num_rotations: 1 as in the published code, or 2.
      scope: `"leaf"` for a vector of each leaf, `"model"` for one of all parameters.

    Returns:
      A `Compressor` without a state. Padding counts in its bits, as it is sent. A vector that is not finite stays so.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> delta = jax.random.normal(jax.random.key(1), (4096,))
      >>> compressor = eden(4)
      >>> compressed, _ = compressor.compress(delta, (), jax.random.key(0))
      >>> error = jnp.sum((compressor.decompress(compressed) - delta) ** 2) / jnp.sum(delta**2)
      >>> print(compressor.bits(compressed), 0.008 < error < 0.011)
      16448 True
    """
    return lift(rotated(normal_code(num_bits, scaling), block_size=block_size, num_rotations=num_rotations), scope)
