"""How much an upload counts that comes late: functions of the staleness, the models made since the download.

Reference: Xie, Koyejo, Gupta, `Asynchronous Federated Optimization <https://arxiv.org/abs/1903.03934>`_, 2019, section
5.2. All are 1 at staleness 0 and never above 1. Two slips in published code are not made here: one number in the role
of both the mixing rate and the decay, and a hinge without the 1 in its denominator, which begins above 1.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

StalenessFn: TypeAlias = Callable[[jax.Array], jax.Array]
"""`staleness -> coefficient`, int32 to float32 scalars."""

Scalar: TypeAlias = float | jax.Array


def _late(staleness: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.asarray(staleness).astype(jnp.float32), 0.0)


def _check(**rates: Scalar) -> None:
    for name, rate in rates.items():
        if isinstance(rate, int | float) and rate < 0:
            raise ValueError(f"{name} must be at least 0, got {rate}.")


def constant() -> StalenessFn:
    """`s(d) = 1`: late uploads count like others.

    Returns:
      A `StalenessFn`.
    """
    return lambda staleness: jnp.ones_like(_late(staleness))


def polynomial(a: Scalar) -> StalenessFn:
    """`s(d) = (d + 1)^-a`.

    Args:
      a: at least 0; 1/2 is what FedBuff and FedFD use.

    Returns:
      A `StalenessFn`.

    Raises:
      ValueError: if `a` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> print(polynomial(0.5)(jnp.array([0, 3, 8])))
      [1.         0.5        0.33333334]
    """
    _check(a=a)
    return lambda staleness: jnp.power(_late(staleness) + 1.0, -jnp.asarray(a, jnp.float32))


def hinge(a: Scalar, b: Scalar) -> StalenessFn:
    """`s(d) = 1` if `d <= b`, else `1 / (a (d - b) + 1)`.

    Args:
      a: at least 0, how steeply it falls.
      b: at least 0, the staleness that is forgiven.

    Returns:
      A `StalenessFn`.

    Raises:
      ValueError: if `a` or `b` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> print(hinge(3.0, 2.0)(jnp.array([0, 2, 3, 5])))
      [1.   1.   0.25 0.1 ]
    """
    _check(a=a, b=b)

    def coefficient(staleness: jax.Array) -> jax.Array:
        beyond = jnp.maximum(_late(staleness) - jnp.asarray(b, jnp.float32), 0.0)
        return 1.0 / (jnp.asarray(a, jnp.float32) * beyond + 1.0)

    return coefficient


def exponential(a: Scalar) -> StalenessFn:
    """`s(d) = exp(-a d)`.

    Args:
      a: at least 0.

    Returns:
      A `StalenessFn`.

    Raises:
      ValueError: if `a` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> print(exponential(1.0)(jnp.array([0, 1])))
      [1.         0.36787945]
    """
    _check(a=a)
    return lambda staleness: jnp.exp(-jnp.asarray(a, jnp.float32) * _late(staleness))
