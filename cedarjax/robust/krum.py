"""Krum and Multi-Krum: the clients that are closest to their neighbours.

Reference: Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
<https://arxiv.org/abs/1703.02757>`_, 2017; guarantees from Allouah et al., `Fixing by Mixing
<https://arxiv.org/abs/2302.01772>`_, 2023. The paper sums over the `n - f - 2` nearest neighbours; ByzFL over
`n - f - 1`, which `num_neighbors` gives.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.types import Aggregator
from cedarjax.robust.gram import from_gram
from cedarjax.robust.selection import check_num_byzantine, distances_of, lowest, mean_over, num_present


def krum_scores(gram: jax.Array, weights: jax.Array, num_neighbors: jax.Array | int) -> jax.Array:
    """Sum of squared distances from each client to its nearest neighbours.

    `s_i = sum_{j in N_i} |x_i - x_j|^2` over the `num_neighbors` nearest clients, the client itself excluded.

    Args:
      gram: `[C, C]` inner products about any centre.
      weights: `[C]`; clients of weight 0 are absent.
      num_neighbors: neighbours that count.

    Returns:
      `[C]` in the dtype of `gram`, infinite for absent clients; the lower, the more central.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 3.0, 9.0])
      >>> print(krum_scores(x[:, None] * x[None, :], jnp.ones(4), 2))
      [ 10.   5.  13. 100.]
    """
    present = weights > 0
    itself = jnp.eye(weights.size, dtype=bool)
    ranked = jnp.sort(jnp.where(itself, jnp.inf, distances_of(gram, present)), axis=1)
    counted = jnp.arange(weights.size, dtype=jnp.int32) < num_neighbors
    scores = jnp.where(counted[None, :], ranked, 0).sum(axis=1)
    return jnp.where(present, scores, jnp.inf)


def _check_neighbors(num_neighbors: int | None) -> None:
    if num_neighbors is not None and num_neighbors < 1:
        raise ValueError(f"num_neighbors must be at least 1 or None, got {num_neighbors}.")


def krum(f: int, num_neighbors: int | None = None) -> Aggregator:
    """The update closest to its neighbours, see `krum_scores`; of equal scores the first.

    Guarantee: `(f, kappa)`-robust with `kappa <= 6 (1 + f / (n - 2 f))` (Allouah et al. 2023) for equal weights, which
    play no part in the choice. `f = 0` is not the mean. It moves and scales along with the updates.

    Args:
      f: number of attackers to withstand; `2 f + 2 < n` for `n` present clients.
      num_neighbors: neighbours that count, fewer than `n`; default `n - f - 2`.

    Returns:
      An `Aggregator`, see `from_gram` for what it reads, how absent and non-finite clients and masked layers are
      treated, and what it falls back to.

    Raises:
      ValueError: if `f` or `num_neighbors` is out of range (here), or there are too few clients for `f` (when `update`
        is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = krum(f=1)
      >>> updates = {"a": jnp.array([1.0, 2.0, 2.5, 4.0, 900.0])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(())}))
      >>> print(update, state.info.coefficients)
      {'a': Array(2., dtype=float32)} [0. 1. 0. 0. 0.]
    """
    check_num_byzantine(f)
    _check_neighbors(num_neighbors)

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        neighbors = num_present(weights) - f - 2 if num_neighbors is None else num_neighbors
        return mean_over(lowest(krum_scores(gram, weights, neighbors), 1), weights)

    needed = max(2 * f + 3, (num_neighbors or 0) + 1)
    condition = "2 * f + 2 < num_clients" + ("" if num_neighbors is None else f" and {num_neighbors} < num_clients")
    return from_gram(rule, min_clients=needed, condition=condition, f=f)


def multi_krum(f: int, num_selected: int | None = None, num_neighbors: int | None = None) -> Aggregator:
    """The mean of the updates closest to their neighbours, see `krum_scores`; of equal scores the first.

    Guarantee: that of `krum` up to a constant. With `f = 0` it is the mean. It moves and scales along with the updates.

    Args:
      f: number of attackers to withstand; `2 f + 2 < n` for `n` present clients.
      num_selected: clients that are averaged, between 1 and `n - f`; default `n - f`.
      num_neighbors: neighbours that count, fewer than `n`; default `n - f - 2`.

    Returns:
      An `Aggregator`, see `from_gram`; the mean is weighted, the choice is not.

    Raises:
      ValueError: if an argument is out of range (here), or there are too few clients (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = multi_krum(f=1, num_selected=3)
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 4.0, 900.0])}
      >>> update, _ = rule.update(updates, rule.init({"a": jnp.zeros(())}))
      >>> print(update)
      {'a': Array(2., dtype=float32)}
    """
    check_num_byzantine(f)
    _check_neighbors(num_neighbors)
    if num_selected is not None and num_selected < 1:
        raise ValueError(f"num_selected must be at least 1 or None, got {num_selected}.")

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        n = num_present(weights)
        neighbors = n - f - 2 if num_neighbors is None else num_neighbors
        selected = n - f if num_selected is None else jnp.minimum(num_selected, n - f)
        return mean_over(lowest(krum_scores(gram, weights, neighbors), selected), weights)

    needed = max(2 * f + 3, f + (num_selected or 0), (num_neighbors or 0) + 1)
    condition = "2 * f + 2 < num_clients" + ("" if num_selected is None else f" and {num_selected} <= num_clients - f")
    condition += "" if num_neighbors is None else f" and {num_neighbors} < num_clients"
    return from_gram(rule, min_clients=needed, condition=condition, f=f)
