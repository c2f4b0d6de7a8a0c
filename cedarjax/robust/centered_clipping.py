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

from cedarjax.core.axis import by_layer, claimed_weights, per_leaf
from cedarjax.core.inner import centered_gram
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import sq_norms, weighted_sum
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.clip import clip_factors
from cedarjax.robust.layers import layered_sq_norms, renormalised
from cedarjax.robust.presence import Presence, finite_lengths, read_presence
from cedarjax.robust.rule import RuleInfo
from cedarjax.robust.selection import mean_over, num_present


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
      (`[C]`, a tree of `[C]` leaves, or `None`) and `mesh=`. Where layers are masked, lengths are over the uploaded
      ones, scaled to all parameters, and a layer moves by the mean of the clients that uploaded it. With nobody present
      the aggregate is 0 and the centre stays.

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
        walk = _layer_by_layer if by_layer(updates, weights) else _together
        presence, coefficients, out = walk(updates, weights, state.center, radius, num_iters, mesh)
        anybody = num_present(presence.clients) > 0
        center = jax.tree.map(lambda new, old: jnp.where(anybody, new.astype(old.dtype), old), out, state.center)
        out = jax.tree.map(lambda x: jnp.where(anybody, x, jnp.zeros_like(x)), out)
        info = RuleInfo(coefficients, presence.nonfinite, anybody)
        num_nonfinite = state.num_nonfinite + presence.nonfinite.sum(dtype=jnp.int32)
        return out, CenteredClippingState(center, num_nonfinite, info)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(center: PyTree, coefficients: PyTree, updates: PyTree, mesh: Mesh | None) -> PyTree:
    """`(1 - sum_i c_i) v + sum_i c_i x_i` with coefficients for each leaf, in the dtype of the updates."""

    def add(total: jax.Array, v: jax.Array, c: jax.Array) -> jax.Array:
        return (total.astype(c.dtype) + (1 - c.sum()) * v.astype(c.dtype)).astype(total.dtype)

    return jax.tree.map(add, weighted_sum(coefficients, updates, mesh=mesh), center, coefficients)


def _together(
    updates: PyTree, weights: PyTree | None, center: PyTree, radius: float, num_iters: int, mesh: Mesh | None
) -> tuple[Presence, jax.Array, PyTree]:
    """Who is there, coefficients of the clients, and where the steps end, one coefficient a client for all layers."""
    claimed = claimed_weights(updates, weights)
    if num_iters == 1 and not isinstance(updates, Mixture):
        squares = sq_norms(_apart(updates, center))
        presence = Presence.of(updates, claimed, (claimed > 0) & ~finite_lengths(updates, squares))
        factors = clip_factors(jnp.where(presence.present, squares, 0), float(radius) ** 2)
        coefficients = mean_over(presence.present, presence.clients.astype(squares.dtype)) * factors
    else:
        presence = read_presence(updates, claimed, squared=True)
        there = presence.present
        if not isinstance(updates, Mixture):
            updates = Mixture.kept(updates, there.astype(jnp.float32))
        gram = centered_gram(updates.beside(center), jnp.concatenate([there, jnp.ones(1, bool)]), mesh=mesh)
        kept = jnp.where(there, presence.clients, 0).astype(gram.dtype)
        coefficients = clipped_steps(gram, kept, radius, num_iters)[:-1]
    return presence, coefficients, _moved(center, per_leaf(coefficients, updates), updates, mesh)


def _apart(updates: PyTree, center: PyTree) -> PyTree:
    return jax.tree.map(lambda x, v: x - v[None].astype(x.dtype), dense(updates), center)


def _layer_by_layer(
    updates: PyTree, weights: PyTree, center: PyTree, radius: float, num_iters: int, mesh: Mesh | None
) -> tuple[Presence, jax.Array, PyTree]:
    """The same where layers are masked: a layer's mean is over the clients that uploaded it."""
    updates = dense(updates)
    presence = read_presence(updates, weights, squared=True)

    def step(_: jax.Array, place: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        coefficients, center = place
        squares = layered_sq_norms(_apart(updates, center), presence.weights)
        share = mean_over(presence.present, presence.clients.astype(squares.dtype))
        factors = clip_factors(squares, float(radius) ** 2)
        by_leaf = jax.tree.map(lambda w: renormalised(share, w) * factors, presence.weights)
        moved = share * factors
        coefficients = coefficients * (1 - moved.sum()).astype(coefficients.dtype) + moved.astype(coefficients.dtype)
        return coefficients, _moved(center, by_leaf, updates, mesh)

    start = jax.tree.map(lambda v, x: v.astype(x.dtype), center, updates)
    return presence, *lax.fori_loop(0, num_iters, step, (jnp.zeros(presence.present.size, jnp.float32), start))
