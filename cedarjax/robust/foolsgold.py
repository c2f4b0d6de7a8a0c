"""FoolsGold: clients whose histories are alike count for less.

Reference: Fung et al., `The Limitations of Federated Learning in Sybil Settings
<https://www.usenix.org/conference/raid2020/presentation/fung>`_, 2020. The released code divides by zero when all
clients are alike; here nobody is trusted then.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.axis import by_layer
from cedarjax.core.axis import num_clients as _count
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.trees import gram
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.presence import read_presence
from cedarjax.robust.rule import RuleInfo, combine
from cedarjax.robust.selection import mean_over

_LARGEST = 0.99  # a credibility of 1 would be infinite on the scale of odds


class FoolsGoldState(NamedTuple):
    """State of `foolsgold`."""

    history: PyTree | None
    """Leaves `[C, ...]`, the sum of each client's updates so far, float32 or wider; `None` before the first round
    unless the number of clients was given."""
    num_nonfinite: jax.Array
    """int32 scalar, uploads left out so far because they were not finite, summed over rounds."""
    info: RuleInfo | None = None
    """What the last round tells; `None` after `init`."""


def foolsgold_weights(gram: jax.Array, present: jax.Array) -> jax.Array:
    """Credibility of each client in `[0, 1]`.

    With `s_ij` the cosines of the histories, `v_i = max_j s_ij`: honest clients are pardoned, `s_ij *= v_i / v_j` where
    `v_j > v_i`; then `a_i = 1 - max_j s_ij`, divided by the largest, and `ln(a_i / (1 - a_i)) + 0.5`, each step clipped
    to `[0, 1]`.

    Args:
      gram: `[C, C]` inner products of the histories.
      present: `[C]` bool.

    Returns:
      `[C]`; 0 for absent clients, and 0 for all if all are alike.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
      >>> print(foolsgold_weights(x @ x.T, jnp.ones(3, bool)))
      [1. 0. 0.]
    """
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    scale = lengths[:, None] * lengths[None, :]
    others = present[:, None] & present[None, :] & ~jnp.eye(present.size, dtype=bool)
    cosines = jnp.where(others & (scale > 0), jnp.clip(gram / jnp.where(scale > 0, scale, 1), -1, 1), 0)
    highest = jnp.where(others, cosines, -jnp.inf).max(axis=1)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)  # of a client alone
    above = highest[None, :] > highest[:, None]
    pardon = jnp.where(above & (highest[None, :] != 0), highest[:, None] / jnp.where(above, highest[None, :], 1), 1)
    similar = jnp.where(others, cosines * pardon, -jnp.inf).max(axis=1)
    credibility = jnp.clip(1 - jnp.where(jnp.isfinite(similar), similar, 0), 0, 1)
    credibility = jnp.where(present, credibility, 0)
    # Cosines of equal histories are 1 only up to rounding.
    largest = credibility.max()
    some = largest > 8 * jnp.finfo(gram.dtype).eps
    share = jnp.minimum(credibility / jnp.where(some, largest, 1), _LARGEST)
    share = jnp.where(some & (share > 0), share, 0)
    odds = jnp.log(jnp.where(share > 0, share, 1) / (1 - share)) + 0.5
    return jnp.where(share > 0, jnp.clip(odds, 0, 1), 0)


def foolsgold(*, num_clients: int | None = None) -> Aggregator:
    """The mean of the updates weighted by credibility, see `foolsgold_weights`, over histories that the state keeps.

    `sum_i w_i a_i x_i / sum_i w_i a_i`. It is made against sybils: attackers that share a goal are more alike than
    honest clients with different data, however many they are. Honest clients with equal data look like sybils too. If
    all clients are alike the update is 0 and `info.ok` is False.

    A row of the cohort is a client: the same clients must come in the same rows in every round, absent ones with weight
    0; a round in which a client is absent leaves its history as it is.

    Args:
      num_clients: `C`. With it the histories exist from `init` on, so that a scan over rounds can carry the state;
        without it they are made in the first round.

    Returns:
      An `Aggregator` with a `FoolsGoldState` that holds a copy of the updates' size. It reads `weights=` (`[C]`, a tree
      of `[C]` leaves, or `None`) and `mesh=`.

    Raises:
      ValueError: if `num_clients` is less than 1 (here) or not that of the updates (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> rule = foolsgold()
      >>> updates = {"a": jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(2)}))
      >>> print(update, state.info.coefficients)
      {'a': Array([1., 0.], dtype=float32)} [1. 0. 0.]
    """
    if num_clients is not None and num_clients < 1:
        raise ValueError(f"num_clients must be at least 1 or None, got {num_clients}.")
    expected = num_clients

    def init(params: PyTree) -> FoolsGoldState:
        def empty(x: jax.Array) -> jax.Array:
            return jnp.zeros((expected, *x.shape), accumulator(x))

        return FoolsGoldState(None if expected is None else jax.tree.map(empty, params), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: FoolsGoldState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, FoolsGoldState]:
        del params, extra_args
        count = _count(updates)
        before = state.history
        if expected not in (None, count) or (before is not None and _count(before) != count):
            known = expected if before is None else _count(before)
            raise ValueError(f"num_clients must be that of the updates, {count}, got {known}.")
        updates = dense(updates)
        layered = by_layer(updates, weights)
        presence = read_presence(updates, weights, squared=True)

        def grown(x: jax.Array, w: jax.Array, *old: jax.Array) -> jax.Array:
            sent = (w > 0).reshape(-1, *[1] * (x.ndim - 1))
            new = jnp.where(sent, x, jnp.zeros((), x.dtype)).astype(accumulator(x))
            return old[0] + new if old else new

        history = jax.tree.map(grown, updates, presence.weights, *([] if before is None else [before]))
        credibility = foolsgold_weights(gram(history, mesh=mesh), presence.present)
        kept = jnp.where(presence.present, presence.clients, 0).astype(credibility.dtype) * credibility
        coefficients = mean_over(kept > 0, kept)
        info = RuleInfo(coefficients, presence.nonfinite, (kept > 0).any())
        num_nonfinite = state.num_nonfinite + presence.nonfinite.sum(dtype=jnp.int32)
        out = combine(updates, presence, coefficients, layered=layered, mesh=mesh)
        return out, FoolsGoldState(history, num_nonfinite, info)

    return optax.GradientTransformationExtraArgs(init, update)
