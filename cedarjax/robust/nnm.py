"""Nearest-neighbour mixing: every update is replaced by the mean of its neighbours before a rule sees it.

Reference: Allouah et al., `Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity
<https://arxiv.org/abs/2302.01772>`_, 2023.
"""

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.types import Aggregator
from cedarjax.robust.presence import Presence
from cedarjax.robust.selection import check_enough, check_num_byzantine, distances_of, lowest, mean_over, num_present
from cedarjax.robust.wrap import Mixing, wrap


def neighbour_means(gram: jax.Array, weights: jax.Array, num_neighbors: jax.Array | int) -> jax.Array:
    """Coefficients of the mean of each client's nearest neighbours, the client itself included.

    Args:
      gram: `[C, C]` inner products about any centre.
      weights: `[C]`; clients of weight 0 are absent. Neighbours are counted, their mean is weighted.
      num_neighbors: how many; of equally near ones the first.

    Returns:
      `[C, C]`, rows adding up to 1; rows and columns of absent clients are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 9.0])
      >>> print(neighbour_means(x[:, None] * x[None, :], jnp.ones(3), 2))
      [[0.5 0.5 0. ]
       [0.5 0.5 0. ]
       [0.  0.5 0.5]]
    """
    present = weights > 0
    distances = distances_of(gram, present)
    matrix = jax.vmap(lambda row: mean_over(lowest(row, num_neighbors), weights))(distances)
    return jnp.where(present[:, None], matrix, 0).astype(gram.dtype)


def nnm(f: int, rule: optax.GradientTransformation) -> Aggregator:
    """Hands a rule the mean of each update's `n - f` nearest updates, the update itself included.

    Guarantee: with any `(f, kappa)`-robust rule inside, `8 f / (n - f) (kappa + 1)`-robust, of the best order
    `O(f / n)` if `kappa` is bounded (Allouah et al. 2023). With `f = 0` every row is the mean. It moves and scales
    along with the updates if the rule does. The mixed rows are never written: their inner products are `W G W^T`.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients. If only values tell that they are fewer,
        the rule gets the updates as they are, and `info.ok` is False.
      rule: an aggregator.

    Returns:
      An `Aggregator` with a `WrapState`, whose `info.coefficients` are in terms of the clients. It reads `weights=`
      (`[C]`, a tree of `[C]` leaves, or `None`) and `mesh=`; a client keeps its weight.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int or `rule` is not an optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.robust import krum
      >>> rule = nnm(1, krum(1))
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 6.0, 900.0])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(())}))
      >>> print(update, state.info.coefficients)
      {'a': Array(3., dtype=float32)} [0.25 0.25 0.25 0.25 0.  ]
    """
    check_num_byzantine(f)

    def mix(presence: Presence, gram: jax.Array, key: jax.Array | None) -> Mixing:
        del key
        weights = jnp.where(presence.present, presence.clients, 0).astype(gram.dtype)
        n = num_present(weights)
        enough = n > 2 * f
        return Mixing(neighbour_means(gram, weights, jnp.where(enough, n - f, 1)), weights, enough)

    return wrap(
        rule,
        mix,
        reads="gram",
        means=True,
        check=lambda count: check_enough(f, count, 2 * f + 1, "2 * f < num_clients"),
    )
