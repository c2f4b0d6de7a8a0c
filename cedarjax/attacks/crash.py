"""Crashes: attackers send nothing of use, as a client does that is broken rather than malicious."""

import math

import jax
import jax.numpy as jnp

from cedarjax.attacks.rows import overwrite_byzantine
from cedarjax.core.types import Aggregator


def zero() -> Aggregator:
    """Replaces the update of every flagged client by zeros: it is present and has learnt nothing.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool) and leaves other rows
      untouched. Same dtype out as in.

    Raises:
      ValueError: if `byzantine` is missing or not `[C]` (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = zero()
      >>> attack.update({"a": jnp.array([1.0, 2.0])}, attack.init(None), byzantine=jnp.array([False, True]))[0]
      {'a': Array([1., 0.], dtype=float32)}
    """
    return overwrite_byzantine(lambda updates, key: jax.tree.map(jnp.zeros_like, updates))


def nonfinite(value: float = math.nan) -> Aggregator:
    """Replaces the update of every flagged client by NaN or by an infinity: its training diverged.

    Args:
      value: NaN, `inf` or `-inf`.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool) and leaves other rows
      untouched. Same dtype out as in.

    Raises:
      ValueError: if `value` is finite (here), or `byzantine` is missing or not `[C]` (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = nonfinite()
      >>> attack.update({"a": jnp.array([1.0, 2.0])}, attack.init(None), byzantine=jnp.array([False, True]))[0]
      {'a': Array([ 1., nan], dtype=float32)}
    """
    if math.isfinite(value):
        raise ValueError(f"value must be nan, inf or -inf, got {value}.")
    return overwrite_byzantine(lambda updates, key: jax.tree.map(lambda x: jnp.full_like(x, value), updates))
