"""What a mechanism on the server may read: rows that each depend on one client, clipped and added up.

Privacy rests on one inequality: adding or removing a client changes the sum by at most `max_norm`. So every row is
clipped here, whatever was promised before; every client that is present counts once, whatever its weight; and what is
not one client's own row is refused.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cedarjax.core.axis import as_rows, as_update, claimed_weights, num_clients, per_leaf
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense, is_low_rank
from cedarjax.core.mixture import Mixture
from cedarjax.core.names import leaf_names
from cedarjax.core.trees import sq_norms, weighted_sum
from cedarjax.core.types import Params, PyTree
from cedarjax.privacy.clip import safe_scale

_ROOM = 64.0
_SHORT = 1e-15  # below, the squares of numbers that would have to be clipped may be 0


class Clipped(NamedTuple):
    """How the clients of a round were clipped. It is not private."""

    norms: jax.Array
    """`[C]` lengths before, over the layers that were sent; 0 for those who are absent or not finite."""
    counted: jax.Array
    """`[C]` bool, clients that count."""
    clipped: jax.Array
    """`[C]` bool, those among them that were longer than allowed."""
    nonfinite: jax.Array
    """`[C]` bool, clients that are present and count as zeros because they sent NaN or Inf."""


def check_rows(
    updates: PyTree,
    weights: PyTree | None,
    key: jax.Array | None,
    params: Params | None,
    *,
    mixed: bool = False,
    **extra_args: PyTree,
) -> None:
    """Raises where what one client moves the sum by would not be bounded, or not be noised.

    Args:
      updates: what the mechanism was given.
      weights: as in `Aggregator`.
      key: as in `Aggregator`.
      params: as in `Aggregator`; where they are given, their shapes tell whether there is a client axis.
      mixed: whether whoever hands over the rows says that each is made of several clients'.
      **extra_args: what others in the chain read.

    Raises:
      ValueError: saying what is wrong and what to do.
    """
    del extra_args
    if mixed or isinstance(updates, Mixture):
        raise ValueError(
            "updates must be the clients' own rows, got mixtures of them: a pre-aggregator around the mechanism "
            "(robust.nnm, robust.bucketing, robust.clip) hands it rows that depend on several clients, so that one "
            "client moves the sum by more than max_norm and the accounting is wrong. The mechanism clips by itself; "
            "put it directly behind the clients."
        )
    if key is None:
        raise ValueError("key must be given, the noise is drawn from it, got None.")
    if weights is None:
        raise ValueError("weights must be given, they tell who is present, got None.")
    if params is not None:
        shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
        found = [x.shape for x in jax.tree.leaves(updates, is_leaf=is_low_rank)]
        if found == shapes:
            raise ValueError(
                "updates must have a client axis, got the shapes of the parameters: a rule before the mechanism "
                "(robust.mean, robust.krum, ...) has made one update of the clients', and one client may have moved it "
                "by more than max_norm, so that the accounting would be wrong. A private mechanism is the aggregator "
                "of its chain: put it first, and only server optimisers behind it."
            )
        for name, got, want in zip(leaf_names(params), found, shapes, strict=False):
            if got[1:] != want:
                raise ValueError(f"updates must be [C, *{list(want)}] at {name!r}, got {list(got)}.")


def clipped_sum(
    updates: PyTree, weights: PyTree, max_norm: jax.Array | float, mesh: Mesh | None = None
) -> tuple[PyTree, Clipped]:
    """`sum_i x_i min(1, max_norm / |x_i|)` over the clients present, each counted once.

    A client with a weight above 0 is present, of which a layer counts where its weight is above 0 and is 0 elsewhere.
    Where its numbers are not finite, or their length is above `5e36` (in float32), the client counts as zeros. To
    rounding, the sums of two cohorts of which one has one client more differ by at most `max_norm`, whatever that
    client sends.

    Args:
      updates: tree with leaves `[C, ...]`.
      weights: `[C]`, or a tree of `[C]` leaves shaped like `updates`.
      max_norm: `C` of the clip, above 0 and finite; may be traced.
      mesh: mesh over which the client axis lies.

    Returns:
      Tree with leaves `[...]` in float32 or wider, and a `Clipped`.

    Raises:
      ValueError: if the client axes or the structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> rows = {"a": jnp.array([[3.0, 4.0], [0.5, 0.0], [jnp.nan, 0.0]])}
      >>> total, told = clipped_sum(rows, jnp.array([20.0, 1.0, 1.0]), 1.0)
      >>> print(total["a"], told.norms, told.nonfinite)
      [1.1 0.8] [5.  0.5 0. ] [False False  True]
    """
    sent = jax.tree.map(lambda w: w > 0, per_leaf(claimed_weights(updates, weights), updates))
    flags = jax.tree.leaves(sent)
    present = jnp.stack(flags).any(axis=0)
    rows = as_rows(updates)
    leaves = jax.tree.leaves(rows, is_leaf=is_low_rank)
    dtype = accumulator(*leaves)
    limit = jnp.asarray(max_norm, dtype)
    squares = sum(jnp.where(f, sq_norms(x).astype(dtype), 0) for f, x in zip(flags, leaves, strict=True))
    plain = (squares < jnp.finfo(dtype).max / _ROOM).all() & (limit > _SHORT)  # False for NaN

    def by_squares() -> tuple[jax.Array, jax.Array]:
        return jnp.sqrt(squares), present

    norms, counted = jax.lax.cond(plain, by_squares, lambda: _scaled_norms(rows, flags, present, dtype))
    is_long = counted & (norms > limit)
    factors = jnp.where(counted, jnp.where(is_long, limit / jnp.where(is_long, norms, 1), 1), 0)
    wide = jax.tree.map(lambda x: x.astype(dtype), rows, is_leaf=is_low_rank)
    coefficients = jax.tree.map(lambda f: jnp.where(f, factors, 0), sent)
    total = as_update(weighted_sum(coefficients, wide, mesh=mesh), updates)
    return total, Clipped(jnp.where(counted, norms, 0), counted, is_long, present & ~counted)


def _scaled_norms(
    rows: PyTree, flags: list[jax.Array], present: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Lengths of rows whose squares may overflow, and which of them count."""
    leaves = jax.tree.leaves(as_rows(dense(rows)))  # what was low-rank is a matrix a client now
    read = [jnp.where(f[:, None], x, jnp.zeros((), x.dtype)) for f, x in zip(flags, leaves, strict=True)]
    finite = jnp.stack([jnp.isfinite(x).all(axis=1) for x in read]).all(axis=0)
    kept = [jnp.where(finite[:, None], x, jnp.zeros((), x.dtype)).astype(dtype) for x in read]
    largest = jnp.stack([jnp.abs(x).max(axis=1, initial=0) for x in kept]).max(axis=0)
    scale = safe_scale(largest)
    norms = jnp.sqrt(sum(jnp.square(x * scale[:, None]).sum(axis=1) for x in kept)) / scale
    return norms, present & finite & (norms < jnp.finfo(dtype).max / _ROOM)


def check_cohort_size(updates: PyTree, cohort_size: int | None) -> None:
    """Raises unless as many rows come as a plan says.

    Args:
      updates: tree with leaves `[C, ...]`.
      cohort_size: `C`, or None if nobody said.

    Raises:
      ValueError: naming both.
    """
    if cohort_size is not None and num_clients(updates) != cohort_size:
        raise ValueError(
            f"updates must have the {cohort_size} places of the plan's selector, got {num_clients(updates)} rows: the "
            "round was not selected as it was accounted for. Pass selector=plan.selector to init_run and run_rounds."
        )
