"""Adding masks to integers modulo 2^32, and taking away those that do not cancel.

What client `i` sends is `y_i = x_i + self_i + sum_(j > i) m_ij - sum_(j < i) m_ij` over its neighbours `j`. Summed over
clients that all arrive, the masks of pairs cancel; what is left to remove are the survivors' own masks, and those that
a survivor shares with a client that dropped out.

A mask of a pair is drawn once, for a block of columns, added to one row and subtracted from another: neighbours at one
offset around the ring are all rows and the same rows rolled. Nothing is ever larger than a block of all clients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.privacy.secure_aggregation.graph import Ring

_LANES = 16  # masks that are drawn at once where they are removed


class Removal(NamedTuple):
    """Masks that the server draws to take them from the sum."""

    keys: jax.Array
    """`[E]` PRNG keys, those that are needed first."""
    coefficients: jax.Array
    """`[E]` int32: how often the sum has the mask, 1 or -1, and 0 where it is not needed."""
    num_needed: jax.Array
    """int32 scalar."""


def mask_block(ring: Ring, values: jax.Array, keys: jax.Array, block: jax.Array) -> jax.Array:
    """What the clients send of a block of columns.

    Args:
      ring: who shares masks with whom.
      values: `[C, B]` uint32, the clients' numbers place by place.
      keys: `[1 + H, C]` PRNG keys of the masks, the clients' own first.
      block: int32 scalar, another one for each block; the masks are `random.bits(fold_in(key, block))`.

    Returns:
      `[C, B]` uint32.
    """
    offsets = jnp.array(ring.offsets, jnp.int32)
    signs = ring.signs().astype(jnp.uint32)  # -1 is 2^32 - 1

    def share(h: jax.Array, sent: jax.Array) -> jax.Array:
        shared = _draw(keys[h + 1], block, values.shape[1]) * signs[h][:, None]
        return sent + shared - jnp.roll(shared, offsets[h], axis=0)

    return lax.fori_loop(0, len(ring.offsets), share, values + _draw(keys[0], block, values.shape[1]))


def plan_removal(ring: Ring, survived: jax.Array, keys: jax.Array) -> Removal:
    """Which masks are left in the sum over survivors.

    Args:
      ring: who shares masks with whom.
      survived: `[C]` bool, place by place, whose uploads are in the sum.
      keys: `[1 + H, C]` PRNG keys as the server has them; read are those of survivors' own masks, and of pairs of
        which one dropped out.

    Returns:
      A `Removal`.
    """
    here = survived.astype(jnp.int32)
    # A pair's mask is in the sum as often as its lower end survived, less as often as its higher end did.
    pairs = ring.signs() * (here[None] - here[ring.ahead()])
    coefficients = jnp.concatenate([here, pairs.reshape(-1)])
    first = jnp.argsort(coefficients == 0, stable=True)
    return Removal(keys.reshape(-1)[first], coefficients[first], (coefficients != 0).sum(dtype=jnp.int32))


def removal_block(removal: Removal, block: jax.Array, width: int) -> jax.Array:
    """The masks left in the sum, of a block of columns; only the masks that are needed are drawn.

    Args:
      removal: from `plan_removal`.
      block: as in `mask_block`.
      width: columns in the block, `B`.

    Returns:
      `[B]` uint32.
    """
    lanes = jnp.arange(_LANES, dtype=jnp.int32)

    def remove(i: jax.Array, total: jax.Array) -> jax.Array:
        places = jnp.minimum(i * _LANES + lanes, removal.keys.shape[0] - 1)
        coefficients = jnp.where(i * _LANES + lanes < removal.num_needed, removal.coefficients[places], 0)
        masks = _draw(removal.keys[places], block, width)
        return total + add_rows(masks * coefficients.astype(jnp.uint32)[:, None])

    num_steps = (removal.num_needed + _LANES - 1) // _LANES
    return lax.fori_loop(0, num_steps, remove, jnp.zeros(width, jnp.uint32))


def add_rows(rows: jax.Array) -> jax.Array:
    """Sum of rows modulo 2^32, the second half of them added to the first until one is left.

    Args:
      rows: `[R, B]` uint32.

    Returns:
      `[B]` uint32.
    """
    while rows.shape[0] > 1:
        half = -(-rows.shape[0] // 2)
        folded = rows[: rows.shape[0] - half] + rows[half:]
        rows = jnp.concatenate([folded, rows[rows.shape[0] - half : half]])
    return rows[0]


def _draw(keys: jax.Array, block: jax.Array, width: int) -> jax.Array:
    """`[R, B]` masks of a block."""
    return jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, block), (width,), jnp.uint32))(keys)
