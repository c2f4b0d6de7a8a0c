"""Nearest neighbours of a client that is trusted.

Reference: Farhadkhani et al., `Robust Collaborative Learning with Linear Gradient Overhead
<https://arxiv.org/abs/2209.10931>`_, 2022, where every honest client aggregates for itself and trusts itself.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.types import Aggregator
from cedarjax.robust.gram import from_gram
from cedarjax.robust.selection import check_num_byzantine, distances_of, lowest, mean_over, num_present
from cedarjax.robust.ties import merge_ties


def monna(f: int, trusted: int) -> Aggregator:
    """The mean of the `n - f` updates nearest to that of a trusted client, itself included; of equal ones the first.

    Guarantee, if the trusted client is honest: no update that is chosen lies farther from it than the farthest honest
    one does. With `f = 0` it is the mean. It moves and scales along with the updates; the order of the
    clients matters in so far as `trusted` counts them.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients.
      trusted: index of the trusted client in the cohort. If it is absent or its update is not finite, the result is the
        coordinate-wise median and `info.ok` is False.

    Returns:
      An `Aggregator`, see `from_gram` for what it reads and how absent and non-finite clients and masked layers are
      treated; the mean is weighted, the choice is not.

    Raises:
      ValueError: if an argument is negative (here), or there are too few clients (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = monna(f=1, trusted=1)
      >>> updates = {"a": jnp.array([1.0, 2.0, 900.0])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(())}))
      >>> print(update, state.info.coefficients)
      {'a': Array(1.5, dtype=float32)} [0.5 0.5 0. ]
    """
    check_num_byzantine(f)
    if trusted < 0:
        raise ValueError(f"trusted must be at least 0, got {trusted}.")

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        if trusted >= weights.size:
            raise ValueError(f"trusted must satisfy 0 <= trusted < num_clients, got {trusted} and {weights.size}.")
        present = weights > 0
        squares = jnp.diagonal(gram)
        distances = merge_ties(distances_of(gram, present)[trusted], squares + squares[trusted])
        chosen = lowest(distances, num_present(weights) - f)
        return jnp.where(present[trusted], mean_over(chosen, weights), 0)

    return from_gram(rule, min_clients=2 * f + 1, condition="2 * f < num_clients", f=f, partial=True)
