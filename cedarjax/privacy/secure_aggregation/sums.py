"""Sums of integers by way of masked uploads, block by block, so that the masked uploads are never all there."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.columns import block_width, even_width, walk
from cedarjax.privacy.secure_aggregation import masks
from cedarjax.privacy.secure_aggregation.graph import Ring
from cedarjax.privacy.secure_aggregation.protocol import Recovery, check_threshold, client_keys, recover, setup_round

_WIDER = 4  # than blocks of other rules: drawing few numbers costs as much as drawing a thousand


class Round(NamedTuple):
    """A round in which every block of columns is masked, sent, summed and unmasked."""

    ring: Ring
    """Who shares masks with whom."""
    order: jax.Array
    """`[C]` int32, the client at each place."""
    survived: jax.Array
    """`[C]` bool, place by place."""
    keys: jax.Array
    """`[1 + H, C]` PRNG keys of the masks."""
    recovery: Recovery
    """What the server has learned."""

    @classmethod
    def of(
        cls, ring: Ring, threshold: int, survived: jax.Array, key: jax.Array, answered: jax.Array | None = None
    ) -> "Round":
        """Everything but the numbers that are summed.

        Args:
          ring: who shares masks with whom.
          threshold: `t`, shares that tell a secret.
          survived: `[C]` bool, clients whose masked upload comes.
          key: PRNG key of the round.
          answered: `[C]` bool, survivors that answer with shares; default: all of them.

        Returns:
          A `Round`.
        """
        setup = setup_round(ring, threshold, key)
        recovery = recover(ring, threshold, setup, survived, answered)
        return cls(ring, setup.order, survived[setup.order], client_keys(ring, setup), recovery)

    def sum_block(self, values: jax.Array, block: jax.Array) -> jax.Array:
        """The sum of a block of columns over survivors.

        Args:
          values: `[C, B]` uint32, a row for each client.
          block: int32 scalar, another one for each block.

        Returns:
          `[B]` uint32 modulo 2^32, 0 if the round is refused.
        """
        sent = masks.mask_block(self.ring, values[self.order], self.keys, block)
        total = masks.add_rows(jnp.where(self.survived[:, None], sent, 0))
        left = masks.removal_block(self.recovery.removal, block, values.shape[1])
        return jnp.where(self.recovery.ok, total - left, 0)


def walk_blocks(fun: Callable[..., jax.Array], rows: list[jax.Array], first: int = 0) -> jax.Array:
    """`fun` of blocks of columns that know their number, put side by side.

    Args:
      fun: `fun(block, *blocks) -> [B]`, of an int32 scalar and of `[C_p, B]`.
      rows: arrays `[C_p, K]`.
      first: number of the first block; blocks are numbered by the column that they start with.

    Returns:
      `[K]`.
    """
    length = rows[0].shape[1]
    width = even_width(length, block_width(max(x.shape[0] for x in rows), factor=_WIDER))
    columns = first + jnp.arange(length, dtype=jnp.int32)[None]
    return walk(lambda columns, *blocks: fun(columns[0, 0], *blocks), [columns, *rows], width)


def secure_integer_sum(
    values: jax.Array,
    survived: jax.Array,
    key: jax.Array,
    *,
    threshold: int | None = None,
    num_neighbors: int | None = None,
    answered: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the survivors' integers modulo 2^32, by way of masked uploads.

    Every mask is drawn, so a round costs `C k / 2 + C` draws of `D` numbers, and at the server one more for each
    survivor and for each pair of which one dropped out. Memory beside the arguments is a block of columns, `C k`
    numbers of keys and `C k` shares. Equal, bit for bit, to the plain sum.

    Args:
      values: `[C, D]` uint32; what a client that dropped out holds is not in the sum.
      survived: `[C]` bool, clients whose masked upload came.
      key: PRNG key of the round, never used for another.
      threshold: `t`, shares that tell a secret; default: a majority of the clients that hold shares of one.
      num_neighbors: `k`, clients that a client shares masks with (see `choose_graph`); default: all others.
      answered: `[C]` bool, survivors that also answer when shares are asked for; default: all of them.

    Returns:
      The sum, `[D]` uint32, and a bool scalar that is False if the round is refused: a secret that is needed has fewer
      than `t` shares. The sum is then 0.

    Raises:
      ValueError: if shapes disagree, `num_neighbors` or `threshold` is out of range, or there is but one client; and,
        unless traced, if the round is refused.
      TypeError: if `values` are not uint32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> values = jnp.array([[1, 2], [30, 40], [500, 600]], jnp.uint32)
      >>> survived = jnp.array([True, False, True])
      >>> total, ok = jax.jit(secure_integer_sum)(values, survived, jax.random.key(0))
      >>> print(total, ok)
      [501 602] True
    """
    if values.dtype != jnp.uint32:
        raise TypeError(f"values must be uint32, got {values.dtype}.")
    if values.ndim != 2:
        raise ValueError(f"values must be [C, D], got the shape {values.shape}.")
    for name, flags in (("survived", survived), ("answered", answered)):
        if flags is not None and flags.shape != values.shape[:1]:
            raise ValueError(f"{name} must be [C] with C = {values.shape[0]}, got the shape {flags.shape}.")
    ring = make_ring(values.shape[0], num_neighbors)
    threshold = check_threshold(ring, threshold)
    work = Round.of(ring, threshold, survived, key, answered)
    ok = work.recovery.ok
    if not isinstance(ok, jax.core.Tracer) and not ok:
        heard = survived if answered is None else survived & answered
        raise ValueError(
            f"survived must leave threshold = {threshold} shares of every secret that is needed, "
            f"got {int(heard.sum())} survivors of {values.shape[0]} clients."
        )
    return walk_blocks(lambda block, x: work.sum_block(x, block), [values]), ok


def make_ring(num_clients: int, num_neighbors: int | None) -> Ring:
    """Who shares masks with whom.

    Args:
      num_clients: `C`.
      num_neighbors: `k`; default: all others.

    Returns:
      A `Ring`.

    Raises:
      ValueError: if there are too few clients or `num_neighbors` is out of range.
    """
    return Ring(num_clients, max(1, num_clients - 1) if num_neighbors is None else num_neighbors)
