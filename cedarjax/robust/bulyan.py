"""Bulyan: Krum selects, then every coordinate keeps what is nearest to the median of the selected.

Reference: El Mhamdi et al., `The hidden vulnerability of distributed learning in Byzantium
<https://arxiv.org/abs/1802.07927>`_, 2018.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.axis import num_clients
from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.columns import by_columns
from cedarjax.robust.gram import read_gram
from cedarjax.robust.krum import krum_scores
from cedarjax.robust.order import mean_of_nearest, median_of
from cedarjax.robust.rule import Round, RuleInfo, from_round
from cedarjax.robust.selection import check_enough, check_num_byzantine, num_present


def bulyan_selection(gram: jax.Array, weights: jax.Array, f: int) -> jax.Array:
    """The `n - 2 f` clients that Krum picks one after another, each from those that are left.

    A client's score is the sum over its `max(1, r - f - 2)` nearest neighbours among the `r` clients that are left.

    Args:
      gram: `[C, C]` inner products about any centre.
      weights: `[C]`; clients of weight 0 are absent.
      f: number of attackers.

    Returns:
      `[C]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 1.5, 2.5, 3.0, 4.0, 90.0])
      >>> bulyan_selection(x[:, None] * x[None, :], jnp.ones(7), f=1).tolist()
      [True, True, True, True, True, False, False]
    """
    n = num_present(weights)

    def pick(_: jax.Array, left: jax.Array) -> jax.Array:
        neighbors = jnp.maximum(num_present(left) - f - 2, 1)
        scores = jnp.minimum(krum_scores(gram, left, neighbors), jnp.finfo(gram.dtype).max)
        best = jnp.argmin(jnp.where(left > 0, scores, jnp.inf))  # the last one has no neighbour, and is picked as well
        return left.at[best].set(0)

    present = (weights > 0).astype(gram.dtype)
    left = lax.fori_loop(0, jnp.maximum(n - 2 * f, 0), pick, present)
    return (present > 0) & ~(left > 0)


def bulyan(f: int) -> Aggregator:
    """The mean of every coordinate over the `theta - 2 f` numbers nearest to the median of `theta = n - 2 f` clients.

    The clients are those of `bulyan_selection`. Guarantee: each coordinate is within the honest ones' reach whatever
    the dimension, for `n >= 4 f + 3` (El Mhamdi et al. 2018). With `f = 0` it is the mean. It moves and scales along
    with the updates. Near the end of the selection two clients may be each other's only neighbour and tie; of equal
    scores the first wins, so that the order of the clients may matter.

    Args:
      f: number of attackers to withstand; `4 f + 3 <= n` for `n` present clients. If only values tell that they are
        fewer, the result is the coordinate-wise median of all, and `info.ok` is False.

    Returns:
      An `Aggregator` that reads `weights=` and `mesh=` and whose state is a `RuleState`; `info.selected` are the
      clients of the first stage. Weights weigh medians and means; clients are counted.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = bulyan(f=1)
      >>> updates = {"a": jnp.array([0.0, 1.0, 1.5, 2.5, 3.0, 4.0, 90.0])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(())}))[0])
      {'a': Array(1.6666666, dtype=float32)}
    """
    check_num_byzantine(f)

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        check_enough(f, num_clients(told.updates), 4 * f + 3, "4 * f + 3 <= num_clients")
        presence, gram, rows, layered = read_gram(told.updates, told.weights, told.mesh)
        kept = jnp.where(presence.present, presence.clients, 0)
        enough = num_present(kept) >= 4 * f + 3
        selected = bulyan_selection(gram, kept, f) | (presence.present & ~enough)

        def second_stage(block: jax.Array, there: jax.Array) -> jax.Array:
            theta = num_present(there).astype(accumulator(block))
            centre = median_of(block.astype(theta.dtype), there)
            few = ~enough | (theta <= 2 * f)
            return jnp.where(few, centre, mean_of_nearest(block, there, centre, jnp.maximum(theta - 2 * f, 1)))

        of_selected = jax.tree.map(lambda w: jnp.where(selected, w, 0), presence.weights)
        out = by_columns(second_stage, rows, of_selected, layered=layered, mesh=told.mesh)
        return out, RuleInfo(None, presence.nonfinite, enough, selected)

    return from_round(answer)
