"""Clients that can only be asked at times: charged, idle, on the home network."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.selection import Selection, Selector
from cedarjax.core.types import PyTree
from cedarjax.select.places import check_per_client

MaskFn = Callable[[jax.Array, jax.Array], jax.Array]
"""`(round, key) -> [N]` bool, who can be asked in that round."""


class AvailableState(NamedTuple):
    """State of a selector that sees only those who are available."""

    inner: PyTree
    """Of the selector."""
    round: jax.Array
    """int32 scalar, rounds that were selected."""


def available(selector: Selector, masks: jax.Array | MaskFn) -> Selector:
    """Lets a selector choose among those who are available.

    Round `r` sees `masks[r % P]`, or `masks(r, key)`. Where too few are available, places stay empty. With everybody
    available it is the selector itself, bit for bit. Wrapped twice, both must say yes.

    Args:
      selector: any selector.
      masks: a trace `[P, N]` bool with the period `P`, which may be traced; or a function `(round, key) -> [N]` bool,
        for availability that is drawn.

    Returns:
      A `Selector` with an `AvailableState`.

    Raises:
      ValueError: if the shape of the masks does not fit.
      TypeError: if a mask is not bool.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import cedarjax as cj
      >>> by_day = jnp.array([[True, True, False, False], [False, False, False, True]])
      >>> selector = available(cj.select.uniform(2), by_day)
      >>> state, everybody = selector.init(4), jnp.ones(4, bool)
      >>> for _ in range(2):
      ...     selection, state = selector.select(state, jax.random.key(0), everybody)
      ...     print(jnp.sort(selection.client_id), selection.weights)
      [0 1] [1. 1.]
      [         3 2147483647] [1. 0.]
    """
    if callable(masks):
        mask_fn = masks
    else:
        trace = jnp.asarray(masks)
        if trace.ndim != 2 or trace.shape[0] < 1:
            raise ValueError(f"masks must have shape [P, N] with P >= 1, got {trace.shape}.")

        def mask_fn(round_: jax.Array, key: jax.Array) -> jax.Array:
            del key
            return trace[round_ % trace.shape[0]]

    def init(num_clients: int) -> AvailableState:
        return AvailableState(selector.init(num_clients), jnp.zeros((), jnp.int32))

    def select(state: AvailableState, key: jax.Array, others: jax.Array) -> tuple[Selection, AvailableState]:
        # The selector's own draws stay as they are without masks.
        mask = mask_fn(state.round, jax.random.fold_in(key, jnp.uint32(2**32 - 1)))
        check_per_client("masks", mask, others.shape[0])
        if mask.dtype != jnp.bool_:
            raise TypeError(f"masks must be bool, got {mask.dtype}.")
        selection, inner = selector.select(state.inner, key, others & mask)
        return selection, AvailableState(inner, state.round + 1)

    def observe(state: AvailableState, selection: Selection, info: PyTree) -> AvailableState:
        return state._replace(inner=selector.observe(state.inner, selection, info))

    return Selector(init, select, observe)
