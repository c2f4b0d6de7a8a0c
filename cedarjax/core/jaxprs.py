"""What an equation of a jaxpr says, in every version of JAX."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex


def scan_counts(eqn: jex.JaxprEqn) -> tuple[int, int]:
    """Constants and carried values of a scan, which come in this order before what is stacked.

    The parameters that say so have changed; that something stacked has one axis less inside has not.

    Args:
      eqn: equation of the primitive `scan`.

    Returns:
      How many of the operands are constants, and how many are carried.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loop = lambda a, c, xs: jax.lax.scan(lambda c, x: (c + a * x, c), c, xs)
      >>> (eqn,) = jax.make_jaxpr(loop)(2.0, 0.0, jnp.ones(3)).eqns
      >>> scan_counts(eqn)
      (1, 1)
    """
    body = eqn.params["jaxpr"].jaxpr
    num_carry = _num_kept(eqn.outvars, body.outvars)
    return _num_kept(eqn.invars, body.invars) - num_carry, num_carry


def _num_kept(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))
