"""Centered clipping: the mean of the updates, each clipped to a ball around the previous aggregate.

Reference: Karimireddy et al., `Learning from History for Byzantine Robust Optimization
<https://arxiv.org/abs/2012.10333>`_, 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from cedarjax.core.inner import centered_gram
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import num_clients, sq_norms, tree_structure, weighted_sum
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.clip import clip_factors
from cedarjax.robust.layers import layered_sq_norms, renormalised
from cedarjax.robust.presence import Presence, by_layer, claimed_weights, finite_lengths, read_presence
from cedarjax.robust.rule import RuleInfo, num_present
from cedarjax.robust.selection import mean_over


class CenteredClippingState(NamedTuple):
    """State of `centered_clipping`."""

    center: PyTree
    """The last aggregate, where the next round begins; zeros before the first."""
    num_nonfinite: jax.Array
    """int32 scalar, uploads left out so far because they were not finite, summed over rounds."""
    info: RuleInfo | None = None
    """What the last round tells; `None` after `init`. The coefficients are of the updates; what they lack of 1 is the
    share of the previous aggregate."""


def clipped_steps(gram: jax.Array, weights: jax.Array, radius: float, num_iters: int) -> jax.Array:
    """Where centered clipping ends, in terms of the clients and of where it began.

    `v <- v + sum_i w_i (x_i - v) min(1, radius / |x_i - v|) / sum_i w_i`.

    Args:
      gram: `[C + 1, C + 1]` inner products of the clients and, last, of the starting point, about any centre.
      weights: `[C]`; 0 = absent.
      radius: of the ball.
      num_iters: number of steps.

    Returns:
      `[C + 1]` coefficients that add up to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([2.0, 8.0, 0.0])
      >>> clipped_steps(x[:, None] * x[None, :], jnp.ones(2), radius=4.0, num_iters=1)
      Array([0.5 , 0.25, 0.25], dtype=float32)
    """
    count = weights.size
    share = mean_over(weights > 0, weights).astype(gram.dtype)
    squares = jnp.diagonal(gram)

    def step(_: jax.Array, place: jax.Array) -> jax.Array:
        at = jnp.matmul(gram, place, precision=lax.Precision.HIGHEST)
        distances = jnp.maximum(squares[:count] - 2 * at[:count] + place @ at, 0)
        moved = share * clip_factors(distances, float(radius) ** 2)
        return place * (1 - moved.sum()) + jnp.concatenate([moved, jnp.zeros(1, moved.dtype)])

    start = jnp.zeros(count + 1, gram.dtype).at[-1].set(1)
    return lax.fori_loop(0, num_iters, step, start)


def centered_clipping(radius: float, num_iters: int = 1) -> Aggregator:
    """The previous aggregate, moved by the mean of what the clients differ from it, each difference clipped.

    `v <- v + sum_i w_i (x_i - v) min(1, radius / |x_i - v|) / sum_i w_i`, `num_iters` times, from the last aggregate.

    Guarantee: one round moves the aggregate by at most `num_iters * radius`, and attackers by their share of the
    weights of it; with momentum at the clients and a radius of the order of the honest spread it converges at the best
    rate (Karimireddy et al. 2021). With a large radius it is the mean. It moves and scales along only if the centre and
    the radius do.

    Args:
      radius: of the ball around the centre, above 0, in units of the updates' length.
      num_iters: number of steps, at least 1. One step reads lengths only; more take inner products.

    Returns:
      An `Aggregator` with a `CenteredClippingState`, whose `init` needs the parameters' shapes. It reads `weights=`
      (`[C]`, a tree of `[C]` leaves, or `None`) and `mesh=`. Where layers are masked the missing ones are taken to be
      the centre's, and lengths are scaled to all parameters in the first step and in the only one that is then taken.
      With nobody present the aggregate is 0 and the centre stays.

    Raises:
      ValueError: if an argument is out of range (here), or client axes disagree (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> rule = centered_clipping(radius=4.0)
      >>> updates = {"a": jnp.array([[2.0], [8.0]])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(1)}))
      >>> print(update, state.info.coefficients)
      {'a': Array([3.], dtype=float32)} [0.5  0.25]
    """
    if not radius > 0:
        raise ValueError(f"radius must be above 0, got {radius}.")
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}.")

    def init(params: PyTree) -> CenteredClippingState:
        return CenteredClippingState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: CenteredClippingState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, CenteredClippingState]:
        del params, extra_args
        count, layered = num_clients(updates), by_layer(updates, weights)
        center = state.center
        presence, coefficients, layer_weights = _coefficients(updates, weights, center, layered, mesh)
        rest = jax.tree.map(lambda c: 1 - c.sum(), layer_weights)
        moved = weighted_sum(layer_weights, updates, mesh=mesh)

        def add(total: jax.Array, c: jax.Array, left: jax.Array) -> jax.Array:
            kept = jnp.where(left == 0, 0, left.astype(total.dtype) * c.astype(total.dtype))
            return (total + kept).astype(total.dtype)

        out = jax.tree.map(add, moved, center, rest)
        anybody = num_present(presence.clients) > 0
        new_center = jax.tree.map(lambda new, old: jnp.where(anybody, new.astype(old.dtype), old), out, center)
        out = jax.tree.map(lambda x: jnp.where(anybody, x, jnp.zeros_like(x)), out)
        info = RuleInfo(coefficients[:count], presence.nonfinite, anybody)
        num_nonfinite = state.num_nonfinite + presence.nonfinite.sum(dtype=jnp.int32)
        return out, CenteredClippingState(new_center, num_nonfinite, info)

    def _coefficients(
        updates: PyTree, weights: PyTree | None, center: PyTree, layered: bool, mesh: Mesh | None
    ) -> tuple[Presence, jax.Array, PyTree]:
        """Who is there, coefficients of the clients, and the same for each layer."""
        structure = tree_structure(updates)
        single = isinstance(updates, Mixture) or num_iters > 1
        if layered:
            presence = read_presence(updates, weights)
            apart = jax.tree.map(lambda x, c: x - c[None].astype(x.dtype), dense(updates), center)
            squares = layered_sq_norms(apart, presence.weights)
            kept = presence.clients.astype(squares.dtype)
            factors = clip_factors(squares, float(radius) ** 2)
            share = mean_over(presence.present, kept)
            by_leaf = jax.tree.map(lambda w: jnp.where(w > 0, renormalised(share, w) * factors, 0), presence.weights)
            return presence, share * factors, by_leaf
        claimed = claimed_weights(updates, weights)
        if single:
            rows = updates if isinstance(updates, Mixture) else None
            presence = read_presence(updates, claimed)
            if rows is None:
                kept = presence.present.astype(jnp.float32)
                rows = Mixture.of(jnp.eye(kept.size, dtype=jnp.float32) * kept[:, None], updates, means=True)
            seen = jnp.concatenate([presence.present, jnp.ones(1, bool)])
            gram = centered_gram(rows.beside(center), seen, mesh=mesh)
            kept = jnp.where(presence.present, presence.clients, 0).astype(gram.dtype)
            coefficients = clipped_steps(gram, kept, radius, num_iters)[:-1]
        else:
            apart = jax.tree.map(lambda x, c: x - c[None].astype(x.dtype), dense(updates), center)
            squares = sq_norms(apart)
            nonfinite = (claimed > 0) & ~finite_lengths(updates, squares)
            kept = jnp.where((claimed > 0) & ~nonfinite, claimed, jnp.zeros_like(claimed)).astype(squares.dtype)
            presence = Presence(jax.tree.unflatten(structure, [kept] * structure.num_leaves), kept > 0, nonfinite)
            factors = clip_factors(jnp.where(kept > 0, squares, 0), float(radius) ** 2)
            coefficients = mean_over(kept > 0, kept) * factors
        return presence, coefficients, jax.tree.unflatten(structure, [coefficients] * structure.num_leaves)

    return optax.GradientTransformationExtraArgs(init, update)
