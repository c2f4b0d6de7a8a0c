"""The weighted mean of the clients that are there and finite, without a copy of their updates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cedarjax.core.axis import as_rows, as_update, by_layer, claimed_weights, per_leaf
from cedarjax.core.lowrank import is_low_rank
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import finite_rows, weighted_mean
from cedarjax.core.types import PyTree


class ClientMean(NamedTuple):
    """What a round's uploads come to."""

    mean: PyTree
    """Tree with leaves `[...]`, 0 where nobody sent a leaf."""
    sent: PyTree
    """Tree of bool scalars, whether anybody sent the leaf."""
    num_nonfinite: jax.Array
    """int32 scalar, uploads left out because they were not finite."""


def _finite_weights(rows: PyTree, weights: PyTree, layered: bool) -> tuple[PyTree, jax.Array]:
    """Weights by leaf without the clients that sent something that is not finite, and how many those are."""
    by_leaf = per_leaf(weights, rows)
    uploaded = jax.tree.leaves(jax.tree.map(lambda w: w > 0, by_leaf))
    present = jnp.stack(uploaded).any(axis=0)
    if not layered:
        bad = present & ~finite_rows(rows)
    elif isinstance(rows, Mixture):
        bad = jnp.zeros_like(present)
    else:  # what a client left out is not read
        leaves = jax.tree.leaves(rows, is_leaf=is_low_rank)
        bad = jnp.stack([u & ~finite_rows(x) for u, x in zip(uploaded, leaves, strict=True)]).any(axis=0)
    kept = jax.tree.map(lambda w: jnp.where(bad | ~(w > 0), jnp.zeros_like(w), w), by_leaf)
    return kept, bad.sum(dtype=jnp.int32)


def client_mean(updates: PyTree, weights: PyTree | None, *, mesh: Mesh | None = None) -> ClientMean:
    """Weighted mean over clients, leaf by leaf; clients whose upload is not finite are absent.

    Args:
      updates: tree with leaves `[C, ...]`.
      weights: `None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.
      mesh: mesh that the client axis lies on.

    Returns:
      A `ClientMean`. While everything is finite no copy of the updates is made.

    Raises:
      ValueError: if the client axes or the structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> found = client_mean({"a": jnp.array([[1.0, 2.0], [4.0, 5.0], [jnp.inf, 0.0]])}, jnp.array([2.0, 1.0, 1.0]))
      >>> print(found.mean["a"], found.num_nonfinite)
      [2. 3.] 1
    """
    rows = as_rows(updates)
    layered = by_layer(rows, weights)
    claimed = claimed_weights(rows, weights)

    def sent_by(by_leaf: PyTree) -> PyTree:
        return jax.tree.map(lambda w: (w > 0).any(), by_leaf)

    def of_finite() -> ClientMean:
        kept, num_nonfinite = _finite_weights(rows, claimed, layered)
        return ClientMean(weighted_mean(rows, kept, mesh=mesh), sent_by(kept), num_nonfinite)

    if mesh is None:
        # The mean tells by itself whether the uploads are finite; only if it is not are the finite ones looked for.
        plain = weighted_mean(rows, claimed, guarded=False)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(plain)]).all()
        all_there = ClientMean(plain, sent_by(per_leaf(claimed, rows)), jnp.zeros((), jnp.int32))
        found = jax.lax.cond(finite, lambda: all_there, of_finite)
    else:  # where a second mean would be a second all-reduce
        found = of_finite()
    return found._replace(mean=as_update(found.mean, updates))
