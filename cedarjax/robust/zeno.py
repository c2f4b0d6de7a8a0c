"""Zeno: updates are ranked by how much they lower the server's loss on data of its own.

Reference: Xie et al., `Zeno: Distributed Stochastic Gradient Descent with Suspicion-based Fault-tolerance
<https://arxiv.org/abs/1805.10032>`_, 2019.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.axis import by_layer, num_clients
from cedarjax.core.cohort import MapFn, cohort_map
from cedarjax.core.lowrank import dense
from cedarjax.core.trees import sq_norms
from cedarjax.core.types import Aggregator, LossFn, PyTree
from cedarjax.robust.layers import layered_sq_norms
from cedarjax.robust.presence import read_presence
from cedarjax.robust.rule import Round, RuleInfo, combine, from_round
from cedarjax.robust.selection import check_enough, check_num_byzantine, lowest, mean_over, num_present


def zeno(
    f: int,
    loss_fn: LossFn,
    batch: PyTree,
    *,
    learning_rate: float = 1.0,
    penalty: float = 5e-4,
    map_fn: MapFn | None = None,
) -> Aggregator:
    """The mean of the `n - f` updates of highest stochastic descendant score.

    `s_i = loss(params) - loss(params - learning_rate x_i) - penalty |x_i|^2` on the server's batch.

    It withstands any number of attackers `f < n`, as far as the batch tells good updates from bad ones. With `f = 0` it
    is the mean. It costs a forward pass of every client's model.

    Args:
      f: number of attackers to withstand; `f < n` for `n` present clients. If only values tell that they are fewer, the
        best client alone is taken, and `info.ok` is False.
      loss_fn: `loss_fn(params, batch, key) -> scalar`; a client with a loss that is not finite is never taken.
      batch: the server's data.
      learning_rate: what the updates, pseudo-gradients, are multiplied by; the server's own is the usual choice.
      penalty: of the squared length, at least 0; the paper's rho.
      map_fn: how the client axis is laid out while the losses are computed; default: one vmap.

    Returns:
      An `Aggregator` that reads `params`, `key=`, `weights=` (`[C]`, a tree of `[C]` leaves, or `None`) and `mesh=`; a
      layer that a client left out is the received one. Its state is a `RuleState`.

    Raises:
      ValueError: if an argument is out of range (here), `params` is missing, or there are too few clients for `f` (when
        `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, batch, key: jnp.square(params - batch).mean()
      >>> rule = zeno(1, loss_fn, jnp.array([0.0]))
      >>> updates, params = jnp.array([1.0, 0.5, -900.0]), jnp.array(1.0)
      >>> update, state = rule.update(updates, rule.init(params), params)
      >>> print(update, state.info.coefficients)
      0.75 [0.5 0.5 0. ]
    """
    check_num_byzantine(f)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}.")
    if not penalty >= 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}.")
    map_fn = cohort_map() if map_fn is None else map_fn

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        if told.params is None:
            raise ValueError("params must be given to score the clients' updates; got None.")
        check_enough(f, num_clients(told.updates), f + 1, "f < num_clients")
        layered = by_layer(told.updates, told.weights)
        presence = read_presence(told.updates, told.weights)
        updates = dense(told.updates)
        key = jax.random.key(0) if told.key is None else told.key

        def drop(shared: PyTree, delta: PyTree, sent: PyTree) -> jax.Array:
            """How much one client's update lowers the loss."""

            def moved(p: jax.Array, d: jax.Array, u: jax.Array) -> jax.Array:
                return p - jnp.where(u, learning_rate * d, jnp.zeros_like(d)).astype(p.dtype).reshape(p.shape)

            return loss_fn(shared, batch, key) - loss_fn(jax.tree.map(moved, shared, delta, sent), batch, key)

        drops = map_fn(drop, told.params, updates, jax.tree.map(lambda w: w > 0, presence.weights))
        squares = layered_sq_norms(updates, presence.weights) if layered else sq_norms(updates)
        scores = drops.astype(squares.dtype) - penalty * squares
        scores = jnp.where(presence.present & jnp.isfinite(scores), scores, -jnp.inf)
        kept = jnp.where(presence.present, presence.clients, 0).astype(squares.dtype)
        n = num_present(kept)
        coefficients = mean_over(lowest(-scores, jnp.maximum(n - f, 1)) & jnp.isfinite(scores), kept)
        info = RuleInfo(coefficients, presence.nonfinite, n > f)
        return combine(updates, presence, coefficients, layered=layered, mesh=told.mesh), info

    return from_round(answer)
