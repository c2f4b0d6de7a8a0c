"""The clients of highest score, without chance."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cedarjax.core.batches import check_positive
from cedarjax.core.selection import Selection, Selector
from cedarjax.select.places import check_per_client, highest


def ranked(num_selected: int, scores: ArrayLike) -> Selector:
    """The `num_selected` available clients of highest score, every round; equal scores go to the lower id.

    Args:
      num_selected: static size `C` of the cohort, between 1 and `N`.
      scores: `[N]`, may be traced; a client of minus infinity or NaN is never chosen.

    Returns:
      A `Selector` without state, with weights 1; the last places are empty where too few can be chosen.

    Raises:
      ValueError: if `num_selected` is out of range or `scores` has not the shape `[N]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> selector = ranked(2, jnp.array([0.5, 0.1, 0.9]))
      >>> selection, _ = selector.select((), jax.random.key(0), jnp.ones(3, bool))
      >>> print(selection.client_id)
      [2 0]
    """
    check_positive(num_selected=num_selected)

    def select(state: tuple[()], key: jax.Array, available: jax.Array) -> tuple[Selection, tuple[()]]:
        values = jnp.asarray(scores)
        check_per_client("scores", values, available.shape[0])
        return highest(values, available, num_selected), state

    return Selector(lambda num_clients: (), select)
