"""The places of a cohort: the best-scored of those available take them, and what is left over stays empty."""

import jax
import jax.numpy as jnp

from cedarjax.core.dataset import ABSENT_ID
from cedarjax.core.selection import Selection


def check_size(name: str, size: int, num_clients: int) -> None:
    """Raises unless a cohort of this size can be filled.

    Args:
      name: of the argument.
      size: its value.
      num_clients: clients in the federation, `N`.

    Raises:
      ValueError: naming the argument and its value.
    """
    if not 1 <= size <= num_clients:
        raise ValueError(f"{name} must satisfy 1 <= {name} <= {num_clients} (all clients), got {size}.")


def check_per_client(name: str, values: jax.Array, num_clients: int) -> None:
    """Raises unless there is one number a client.

    Args:
      name: of the argument.
      values: its value.
      num_clients: clients in the federation, `N`.

    Raises:
      ValueError: naming the argument and its shape.
    """
    if jnp.shape(values) != (num_clients,):
        raise ValueError(f"{name} must have shape [N] = [{num_clients}], got {jnp.shape(values)}.")


def fill_places(client_id: jax.Array, weights: jax.Array) -> Selection:
    """A selection whose places of weight 0 have the id `ABSENT_ID`.

    Args:
      client_id: `[C]` integers.
      weights: `[C]`, numbers or bool; 0 or False = nobody in this place.

    Returns:
      A `Selection`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(fill_places(jnp.array([5, 6]), jnp.array([True, False])).client_id)
      [         5 2147483647]
    """
    weights = weights.astype(jnp.float32)
    return Selection(jnp.where(weights > 0, client_id.astype(jnp.int32), ABSENT_ID), weights)


def highest(scores: jax.Array, available: jax.Array, num_selected: int, *, name: str = "num_selected") -> Selection:
    """The available clients of highest score, best first; equal scores go to the lower id.

    Args:
      scores: `[N]`; a client of minus infinity or NaN is never chosen.
      available: `[N]` bool.
      num_selected: static size `C` of the cohort.
      name: what the caller calls `num_selected`, for the message of the error.

    Returns:
      A `Selection` with weights 1; places are empty, last, where fewer than `C` can be chosen.

    Raises:
      ValueError: if `num_selected` is out of range or the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(highest(jnp.array([0.1, 0.9, 0.9, 5.0]), jnp.array([True, True, True, False]), 2).client_id)
      [1 2]
    """
    num_clients = available.shape[0]
    check_size(name, num_selected, num_clients)
    check_per_client("scores", scores, num_clients)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(jnp.float32)
    # In the order of `top_k`, -0.0 may lie below 0.0, and NaN above everything.
    scores = jnp.where(scores == 0, 0, scores)
    scores = jnp.where(available & (scores > -jnp.inf), scores, -jnp.inf)
    best, client_id = jax.lax.top_k(scores, num_selected)
    return fill_places(client_id, best > -jnp.inf)
