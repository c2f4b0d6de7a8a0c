"""Uniform sampling without replacement.

Reference: McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
<https://arxiv.org/abs/1602.05629>`_, 2017.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.batches import check_positive
from cedarjax.core.selection import FixedSizeSampling, Selection, Selector
from cedarjax.select.places import highest


def uniform(num_selected: int) -> Selector:
    """Every set of `num_selected` available clients is equally likely.

    With everybody available these are the cohorts of `run_rounds(num_clients=num_selected)`, bit for bit; with
    `num_selected == N` all who are available take part, in the order of the ids, and the key is not used.

    Args:
      num_selected: static size `C` of the cohort, between 1 and `N`.

    Returns:
      A `Selector` without state, with weights 1.

    Raises:
      ValueError: if `num_selected` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> selection, _ = uniform(3).select((), jax.random.key(0), jnp.array([True, False, True, True]))
      >>> print(jnp.sort(selection.client_id))
      [0 2 3]
    """
    check_positive(num_selected=num_selected)

    def select(state: tuple[()], key: jax.Array, available: jax.Array) -> tuple[Selection, tuple[()]]:
        if num_selected == available.shape[0]:
            scores = jnp.zeros(available.shape, jnp.float32)
        else:
            scores = -jax.random.bits(key, available.shape, jnp.uint32).astype(jnp.float32)
        return highest(scores, available, num_selected), state

    return Selector(lambda num_clients: (), select, sampling=FixedSizeSampling(num_selected))
