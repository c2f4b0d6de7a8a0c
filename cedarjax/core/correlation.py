"""Pearson correlation that is defined for every finite input."""

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator


def _offsets(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Deviations from the mean in a safe scale, and whether there are none.

    The first entry is subtracted before the mean, so that equal entries give exact zeros and a common offset costs no
    digits; the halves keep the largest differences from overflowing.
    """
    x = 0.5 * x - 0.5 * x[0]
    largest = jnp.abs(x).max()
    constant = largest < jnp.finfo(x.dtype).tiny
    # Two divisions by the root: XLA may multiply by a reciprocal, and that of the largest numbers is flushed to 0.
    root = jnp.sqrt(jnp.where(constant, jnp.ones_like(largest), largest))
    x = x / root / root
    return x - x.mean(), constant


def pearson(a: jax.Array, b: jax.Array) -> jax.Array:
    """Pearson correlation, `cov(a, b) / sqrt(var(a) var(b))`.

    Two passes on rescaled values: no overflow, no underflow, and equal entries are recognised as such.

    Args:
      a: `[E]`.
      b: `[E]`.

    Returns:
      Scalar in `[-1, 1]`, float32 or wider; 0 if either vector is constant. Finite whenever the input is; NaN or Inf in
      the input give NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> print(pearson(jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0, 4.0, 2.0])))
      -1.0
    """
    dtype = accumulator(a, b)
    a, a_constant = _offsets(a.astype(dtype))
    b, b_constant = _offsets(b.astype(dtype))
    variances = jnp.square(a).sum() * jnp.square(b).sum()
    constant = (a_constant | b_constant) & ~jnp.isnan(variances)
    correlation = (a * b).sum() / jnp.sqrt(jnp.where(constant, jnp.ones_like(variances), variances))
    return jnp.where(constant, jnp.zeros_like(correlation), jnp.clip(correlation, -1, 1))
