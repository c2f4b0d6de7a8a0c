"""Inner product manipulation: attackers send the honest mean the other way round.

Reference: Xie et al., `Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation
<https://arxiv.org/abs/1903.03936>`_, 2019.
"""

import math

import jax

from cedarjax.attacks.collusion import Knowledge, collude, honest_mean
from cedarjax.core.types import Aggregator, PyTree


def ipm(tau: float) -> Aggregator:
    """All attackers send `-tau * mean` of the honest updates.

    A small `tau` keeps them near the honest updates, and the inner product of the aggregate with the honest mean small
    or negative; with `f` of `n` equally weighted clients the mean itself turns round at `tau > (n - f) / f`. With no
    honest client they send zeros.

    Args:
      tau: factor, at least 0.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool), `weights=` and `mesh=`, and
      leaves other rows untouched. Same dtype out as in. Absent and non-finite rows are never read.

    Raises:
      ValueError: if `tau` is negative or not finite (here), or `byzantine` is missing or client axes disagree (when
        `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = ipm(tau=0.5)
      >>> attack.update(
      ...     {"a": jnp.array([1.0, 3.0, 9.0])}, attack.init(None), byzantine=jnp.array([False, False, True])
      ... )[0]
      {'a': Array([ 1.,  3., -1.], dtype=float32)}
    """
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be at least 0 and finite, got {tau}.")

    def plan(known: Knowledge) -> PyTree:
        return jax.tree.map(lambda mean: mean * -tau, honest_mean(known))

    return collude(plan)
