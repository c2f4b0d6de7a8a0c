"""What simulated attacks on updates share: the flagged rows are overwritten, the client axis stays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.trees import num_clients
from cedarjax.core.types import Aggregator, PyTree


def check_byzantine(byzantine: jax.Array | None, count: int) -> jax.Array:
    """Checks the flags of the attackers.

    Args:
      byzantine: `[C]` bool, or `None` when the caller forgot it.
      count: `C`.

    Returns:
      `byzantine`.

    Raises:
      ValueError: if it is missing or not `[C]`.
      TypeError: if it is not bool.
    """
    if byzantine is None:
        raise ValueError(f"byzantine must be given, [C] bool with C = {count}, to simulate an attack; got None.")
    byzantine = jnp.asarray(byzantine)
    if byzantine.shape != (count,):
        raise ValueError(
            f"byzantine must be [C] with C = {count}, the client axis of updates, got the shape {byzantine.shape}."
        )
    if byzantine.dtype != bool:
        raise TypeError(f"byzantine must be bool, got {byzantine.dtype}.")
    return byzantine


def overwrite_rows(byzantine: jax.Array, honest: jax.Array, poisoned: jax.Array) -> jax.Array:
    """Rows of `poisoned` where `byzantine`, of `honest` elsewhere.

    Args:
      byzantine: `[C]` bool.
      honest: `[C, ...]`.
      poisoned: `[C, ...]`.

    Returns:
      `[C, ...]`.

    Example:
      >>> import jax.numpy as jnp
      >>> overwrite_rows(jnp.array([True, False]), jnp.array([[1.0], [2.0]]), jnp.array([[8.0], [9.0]])).tolist()
      [[8.0], [2.0]]
    """
    return jnp.where(byzantine.reshape(byzantine.shape + (1,) * (honest.ndim - 1)), poisoned, honest)


def poison_leaves(poison: Callable[[jax.Array, jax.Array], jax.Array], needs_key: bool) -> Aggregator:
    """Lifts `poison(leaf [C, ...], key) -> [C, ...]` to a transformation that overwrites the flagged rows.

    Args:
      poison: what an attacker sends in place of its update; `key` differs between leaves.
      needs_key: whether `key=` has to be given; without it `poison` receives `None`.

    Returns:
      A stateless transformation that reads `byzantine=` and `key=`.
    """

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        byzantine: jax.Array | None = None,
        key: jax.Array | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        flags = check_byzantine(byzantine, num_clients(updates))
        if needs_key and key is None:
            raise ValueError("key must be given to draw the attackers' updates; got None.")
        leaves, structure = jax.tree.flatten(updates)
        keys = [jax.random.fold_in(key, i) if needs_key else None for i in range(len(leaves))]
        poisoned = [overwrite_rows(flags, x, poison(x, k)) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, poisoned), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
