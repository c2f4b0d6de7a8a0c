"""What simulated attacks on updates share: the flagged rows are overwritten, the client axis stays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.axis import num_clients
from cedarjax.core.lowrank import dense
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


def overwrite_byzantine(poison: Callable[[PyTree, jax.Array | None], PyTree]) -> Aggregator:
    """Lifts `poison(updates, key) -> updates` to a transformation that overwrites the flagged rows.

    Args:
      poison: what attackers send in place of their updates, leaves `[C, ...]` for leaves `[C, ...]`; `key` is `None`
        when the caller gave none.

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
        updates = dense(updates)
        flags = check_byzantine(byzantine, num_clients(updates))
        poisoned = jax.tree.map(lambda x, y: overwrite_rows(flags, x, y), updates, poison(updates, key))
        return poisoned, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
