"""Power-of-choice: of a few random candidates, those whose loss is highest.

Reference: Cho, Wang, Joshi, `Client Selection in Federated Learning: Convergence Analysis and Power-of-Choice Selection
Strategies <https://arxiv.org/abs/2010.01243>`_, 2020. This is the paper's variant that costs no communication
(`rpow-d`): the loss of a candidate is the one that it told when it last took part, infinity if it never did. The
paper's other variants ask all candidates for their loss under the current model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cedarjax.core.batches import check_positive
from cedarjax.core.selection import Selection, Selector
from cedarjax.core.types import PyTree
from cedarjax.select.heard import TellFn, hear, local_loss, unheard
from cedarjax.select.places import check_per_client, fill_places, highest
from cedarjax.select.weighted import gumbel_scores


class PowerOfChoiceState(NamedTuple):
    """What the server knows of the clients."""

    loss: jax.Array
    """`[N]` float32, each client's last known loss; infinity where none is known."""


def power_of_choice(
    num_selected: int,
    num_candidates: int,
    weights: ArrayLike | None = None,
    *,
    loss_fn: TellFn = local_loss,
) -> Selector:
    """Draws candidates in proportion to `weights` without replacement and takes those of highest last known loss.

    Clients that were never heard of come first, and among equal losses the candidate that was drawn first. More
    candidates are a stronger bias towards high losses; with `num_candidates == num_selected` this is `weighted`. A loss
    that is not finite is not heard: what was known before stays.

    Args:
      num_selected: static size `C` of the cohort.
      num_candidates: candidates `d`, with `num_selected <= num_candidates <= N`.
      weights: `[N]`, in the paper the data sizes; may be traced; default: all alike. A client whose weight is not
        positive is never a candidate.
      loss_fn: reads the losses `[C]` from what a round told.

    Returns:
      A `Selector` with a `PowerOfChoiceState` and weights 1; the last places are empty where too few can be chosen.

    Raises:
      ValueError: if a count is out of range or a shape does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> selector = power_of_choice(1, 3, loss_fn=lambda info: info)
      >>> state = selector.observe(selector.init(3), Selection(jnp.arange(3), jnp.ones(3)), jnp.array([0.2, 0.9, 0.4]))
      >>> selection, _ = selector.select(state, jax.random.key(0), jnp.ones(3, bool))
      >>> print(selection.client_id)
      [1]
    """
    check_positive(num_selected=num_selected)
    if num_candidates < num_selected:
        raise ValueError(
            f"num_candidates must satisfy num_selected <= num_candidates, got {num_selected} and {num_candidates}."
        )

    def init(num_clients: int) -> PowerOfChoiceState:
        return PowerOfChoiceState(unheard(num_clients))

    def select(state: PowerOfChoiceState, key: jax.Array, available: jax.Array) -> tuple[Selection, PowerOfChoiceState]:
        w = jnp.ones(available.shape, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
        check_per_client("weights", w, available.shape[0])
        candidates = highest(gumbel_scores(key, w), available, num_candidates, name="num_candidates")
        loss = state.loss.at[candidates.client_id].get(mode="clip")
        best = highest(loss, candidates.weights > 0, num_selected)
        chosen = candidates.client_id.at[best.client_id].get(mode="clip")
        return fill_places(chosen, best.weights), state

    def observe(state: PowerOfChoiceState, selection: Selection, info: PyTree) -> PowerOfChoiceState:
        return PowerOfChoiceState(hear(state.loss, selection, loss_fn(info)))

    return Selector(init, select, observe)
