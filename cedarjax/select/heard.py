"""What was last heard of each client, one number each, for selectors that learn from the rounds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cedarjax.core.dataset import ABSENT_ID
from cedarjax.core.selection import Selection
from cedarjax.core.types import PyTree

TellFn = Callable[[PyTree], jax.Array]
"""`info -> [C]`: reads one number a client from what a round told."""


def local_loss(info: PyTree) -> jax.Array:
    """The training loss that local updates tell: `info.local.loss`.

    Args:
      info: of a `federated_round` whose local update tells a `loss`.

    Returns:
      `[C]`.
    """
    return info.local.loss


def unheard(num_clients: int) -> jax.Array:
    """Nobody has been heard of.

    Args:
      num_clients: clients in the federation, `N`.

    Returns:
      `[N]` float32, infinity everywhere.
    """
    return jnp.full((num_clients,), jnp.inf, jnp.float32)


def hear(heard: jax.Array, selection: Selection, told: jax.Array) -> jax.Array:
    """Replaces what was known of those who took part; what is not finite counts as not heard.

    Args:
      heard: `[N]` float32.
      selection: `C` places.
      told: `[C]`.

    Returns:
      `[N]` float32.

    Raises:
      ValueError: if `told` has not the shape `[C]`.

    Example:
      >>> import jax.numpy as jnp
      >>> selection = Selection(jnp.array([2, 0]), jnp.array([1.0, 0.0]))
      >>> print(hear(unheard(3), selection, jnp.array([0.5, 0.7])))
      [inf inf 0.5]
    """
    if jnp.shape(told) != selection.client_id.shape:
        raise ValueError(
            f"What a round tells must be one number a place, shape {selection.client_id.shape}, got {jnp.shape(told)}."
        )
    told = told.astype(jnp.float32)
    # A negative id would wrap around.
    real = (selection.weights > 0) & (selection.client_id >= 0) & jnp.isfinite(told)
    return heard.at[jnp.where(real, selection.client_id, ABSENT_ID)].set(told, mode="drop")
