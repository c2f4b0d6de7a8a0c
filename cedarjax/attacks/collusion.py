"""What colluding attackers share: they see every honest update, and all of them send the same one.

Honest are the clients that are present, finite and not flagged; their means are unweighted. A layer that an honest
client left out counts as the mean of the honest clients that sent it. With no honest client at all there is nothing to
lean on, and means and standard deviations are 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.attacks.rows import check_byzantine, overwrite_rows
from cedarjax.core.axis import by_layer, claimed_weights, num_clients
from cedarjax.core.columns import map_columns
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.trees import finite_rows, weighted_sum
from cedarjax.core.types import Aggregator, PyTree


class Knowledge(NamedTuple):
    """What attackers know of a round."""

    updates: PyTree
    """Leaves `[C, ...]` in float32 or wider; only honest rows may be read."""
    honest: jax.Array
    """`[C]` bool."""
    byzantine: jax.Array
    """`[C]` bool, the rows that will be overwritten."""
    present: jax.Array
    """`[C]` bool, honest clients and attackers that are not absent."""
    mesh: Mesh | None
    """Mesh that the client axis lies on, or `None`."""

    @property
    def num_present(self) -> jax.Array:
        """int32 scalar, honest clients and present attackers, `n`."""
        return self.present.sum(dtype=jnp.int32)

    @property
    def num_byzantine(self) -> jax.Array:
        """int32 scalar, present attackers, `f`."""
        return (self.present & self.byzantine).sum(dtype=jnp.int32)

    @property
    def num_honest(self) -> jax.Array:
        """int32 scalar, `n - f`."""
        return self.honest.sum(dtype=jnp.int32)


def know(updates: PyTree, weights: PyTree | None, byzantine: jax.Array | None, mesh: Mesh | None = None) -> Knowledge:
    """What attackers know of a round.

    Args:
      updates: dense tree with leaves `[C, ...]`.
      weights: `None`, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.
      byzantine: `[C]` bool.
      mesh: mesh that the client axis lies on.

    Returns:
      A `Knowledge`.

    Raises:
      ValueError: if the client axes or the structures disagree or `byzantine` is missing.
      TypeError: if `byzantine` is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = {"a": jnp.array([1.0, jnp.nan, 3.0, 4.0])}
      >>> known = know(updates, jnp.array([1.0, 1.0, 0.0, 1.0]), jnp.array([False, False, False, True]))
      >>> print(known.honest, known.num_present, known.num_byzantine)
      [ True False False False] 2 1
    """
    count = num_clients(updates)
    flags = check_byzantine(byzantine, count)
    leaves, structure = jax.tree.flatten(updates)
    shared = not by_layer(updates, weights)
    sent = [w > 0 for w in jax.tree.leaves(claimed_weights(updates, weights))]  # by whom each leaf, or all, was sent
    present = jnp.stack(sent).any(axis=0)
    if shared:
        finite = finite_rows(updates)
    else:
        finite = jnp.stack([finite_rows(x) | ~s for x, s in zip(leaves, sent, strict=True)]).all(axis=0)
    honest = present & finite & ~flags
    wide = [x.astype(accumulator(x)) for x in leaves]
    if not shared:
        wide = [_fill(x, honest & s, mesh) for x, s in zip(wide, sent, strict=True)]
    return Knowledge(jax.tree.unflatten(structure, wide), honest, flags, honest | (present & flags), mesh)


def _fill(x: jax.Array, sent: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Rows that were not sent replaced by the mean of those that were."""
    mean = weighted_sum(_equal_shares(sent, x.dtype), x, mesh=mesh)
    return overwrite_rows(sent, jnp.broadcast_to(mean[None], x.shape), x)


def _equal_shares(chosen: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`[C]`, 1 over the number of chosen rows where chosen."""
    return chosen.astype(dtype) / jnp.maximum(chosen.sum(dtype=jnp.int32), 1).astype(dtype)


def honest_mean(known: Knowledge) -> PyTree:
    """Mean over the honest clients.

    Args:
      known: what attackers know.

    Returns:
      Tree with leaves `[...]` in float32 or wider; zeros with nobody honest.
    """
    shares = _equal_shares(known.honest, accumulator(*jax.tree.leaves(known.updates)))
    return weighted_sum(shares, known.updates, mesh=known.mesh)


def honest_std(known: Knowledge) -> PyTree:
    """Standard deviation over the honest clients, coordinate by coordinate, with `|B| - 1` in the denominator.

    Args:
      known: what attackers know.

    Returns:
      Tree with leaves `[...]` in float32 or wider; zeros with fewer than two honest clients.
    """

    def std(block: jax.Array) -> jax.Array:
        shares = _equal_shares(known.honest, block.dtype)[None, :]
        honest = known.honest[:, None]
        mean = jnp.matmul(shares, jnp.where(honest, block, 0), precision=jax.lax.Precision.HIGHEST)
        squares = jnp.square(jnp.where(honest, block - mean, 0))
        total = jnp.matmul(known.honest.astype(block.dtype), squares, precision=jax.lax.Precision.HIGHEST)
        return jnp.sqrt(total / jnp.maximum(known.num_honest - 1, 1).astype(block.dtype))

    return map_columns(std, known.updates, mesh=known.mesh)


def send(updates: PyTree, byzantine: jax.Array, vector: PyTree) -> PyTree:
    """The updates with the same vector in every flagged row.

    Args:
      updates: leaves `[C, ...]`.
      byzantine: `[C]` bool.
      vector: leaves `[...]`.

    Returns:
      Leaves `[C, ...]` in the dtype of `updates`.
    """
    return jax.tree.map(
        lambda x, v: overwrite_rows(byzantine, x, jnp.broadcast_to(v.astype(x.dtype)[None], x.shape)), updates, vector
    )


def step(start: PyTree, strength: jax.Array | float, direction: PyTree) -> PyTree:
    """`start + strength * direction`, and `start` where the strength is 0.

    Args:
      start: tree of floating arrays.
      strength: scalar.
      direction: tree of the same shapes and dtypes.

    Returns:
      A tree of the same shapes and dtypes.
    """

    def leaf(x: jax.Array, d: jax.Array) -> jax.Array:
        s = jnp.asarray(strength, x.dtype)
        return jnp.where(s == 0, x, x + s * d)

    return jax.tree.map(leaf, start, direction)


def collude(plan: Callable[[Knowledge], PyTree]) -> Aggregator:
    """Lifts `plan(known) -> vector` to a transformation that sends the vector from every flagged client.

    Args:
      plan: what all attackers send, leaves `[...]`.

    Returns:
      A stateless transformation that reads `byzantine=`, `weights=` and `mesh=`.
    """

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        byzantine: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        updates = dense(updates)
        known = know(updates, weights, byzantine, mesh)
        return send(updates, known.byzantine, plan(known)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
