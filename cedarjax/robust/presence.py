"""Which rows of the updates a rule may read: absent and non-finite clients out, leaf by leaf."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.axis import by_layer, claimed_weights, per_leaf
from cedarjax.core.lowrank import is_low_rank
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import finite_rows, sq_norms
from cedarjax.core.types import PyTree
from cedarjax.robust.layers import layered_sq_norms

_ROOM = 64.0


class Presence(NamedTuple):
    """The clients as a rule sees them."""

    weights: PyTree
    """Tree of `[C]` leaves shaped like the updates, 0 for an absent or non-finite client and for a layer left out."""
    present: jax.Array
    """`[C]` bool, clients that uploaded at least one leaf, all of it finite."""
    nonfinite: jax.Array
    """`[C]` bool, clients that uploaded a number that is not finite."""

    @classmethod
    def of(cls, updates: PyTree, weights: jax.Array, nonfinite: jax.Array) -> "Presence":
        """The clients when nobody left a layer out.

        Args:
          updates: tree with leaves `[C, ...]`, or a `Mixture`.
          weights: `[C]`, 0 = absent.
          nonfinite: `[C]` bool.

        Returns:
          A `Presence`.
        """
        present = (weights > 0) & ~nonfinite
        return cls(per_leaf(jnp.where(present, weights, jnp.zeros_like(weights)), updates), present, nonfinite)

    @property
    def clients(self) -> jax.Array:
        """`[C]` weight of each client: the largest among its layers, 0 for an absent one."""
        leaves = jax.tree.leaves(self.weights)
        return leaves[0] if all(x is leaves[0] for x in leaves) else jnp.stack(leaves).max(axis=0)


def read_presence(updates: PyTree, weights: PyTree | None, *, squared: bool = False) -> Presence:
    """Reads the weights of a round and removes clients whose upload is not finite.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.
      squared: whether lengths will be squared, so that an upload is not finite either if its squared length is not.

    Returns:
      A `Presence`. What an absent client or a left-out layer holds is never read.

    Raises:
      ValueError: if the client axes or the structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> presence = read_presence({"a": jnp.array([1.0, jnp.nan, jnp.nan])}, jnp.array([2.0, 1.0, 0.0]))
      >>> print(presence.weights, presence.nonfinite)
      {'a': Array([2., 0., 0.], dtype=float32)} [False  True False]
    """
    layered = by_layer(updates, weights)
    weights = claimed_weights(updates, weights)
    if not layered:
        finite = finite_lengths(updates) if squared else finite_rows(updates)
        return Presence.of(updates, weights, (weights > 0) & ~finite)
    uploaded = [leaf > 0 for leaf in jax.tree.leaves(weights)]
    sent = jnp.stack(uploaded).any(axis=0)
    if isinstance(updates, Mixture):
        bad = jnp.zeros(sent.shape, bool)
    elif squared:
        bad = sent & ~finite_lengths(updates, layered_sq_norms(updates, weights))
    else:
        leaves = jax.tree.leaves(updates, is_leaf=is_low_rank)
        bad = jnp.stack([u & ~finite_rows(x) for u, x in zip(uploaded, leaves, strict=True)]).any(axis=0)
    kept = jax.tree.map(lambda w: jnp.where(bad | ~(w > 0), jnp.zeros_like(w), w), weights)
    return Presence(kept, sent & ~bad, bad)


def finite_lengths(updates: PyTree, squares: jax.Array | None = None) -> jax.Array:
    """Which clients sent finite numbers whose squares add up to a finite one, with room for sums over clients.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      squares: their squared lengths, if they are known.

    Returns:
      `[C]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> print(finite_lengths({"a": jnp.array([1.0, jnp.inf, 1e30])}))
      [ True False False]
    """
    if isinstance(updates, Mixture):
        return finite_rows(updates)
    squares = sq_norms(updates) if squares is None else squares
    return squares < jnp.finfo(squares.dtype).max / _ROOM  # False for NaN
