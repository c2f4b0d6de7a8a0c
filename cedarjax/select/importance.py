"""Importance sampling: clients that have more to tell are asked more often.

References:
  Katharopoulos, Fleuret, `Not All Samples Are Created Equal: Deep Learning with Importance Sampling
  <https://arxiv.org/abs/1803.00942>`_, 2018: variance is least with probabilities in proportion to gradient norms.

  Rizk, Vlaski, Sayed, `Optimal Importance Sampling for Federated Learning <https://arxiv.org/abs/2010.13600>`_, 2020:
  the same for clients.

Optimal probabilities need the norms of this round, before anybody is asked. Here they are the last known ones, mixed
with a uniform share, which bounds the weights `1 / (N p_i)` by `1 / uniform_share` and lets nobody be forgotten.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.batches import check_positive
from cedarjax.core.selection import Selection, Selector
from cedarjax.core.types import PyTree
from cedarjax.select.heard import TellFn, hear, local_loss, unheard
from cedarjax.select.places import check_per_client, check_size, fill_places, highest
from cedarjax.select.weighted import gumbel_scores

_SCALE = 2**30


class ImportanceState(NamedTuple):
    """What the server knows of the clients."""

    signal: jax.Array
    """`[N]` float32, each client's last known signal; infinity where none is known."""


def importance_probabilities(signal: jax.Array, available: jax.Array, uniform_share: jax.Array | float) -> jax.Array:
    """`p_i = (1 - u) s_i / sum_j s_j + u / N` over the `N` available clients.

    Args:
      signal: `[N]`; negative counts as 0, and what is not finite as the mean of the others.
      available: `[N]` bool; the others have probability 0.
      uniform_share: `u`, between 0 and 1.

    Returns:
      `[N]` float32 with sum 1, or zeros if nobody is available. Uniform if no signal is positive.

    Example:
      >>> import jax.numpy as jnp
      >>> signal, available = jnp.array([3.0, 1.0, jnp.inf, 9.0]), jnp.array([True, True, True, False])
      >>> print(importance_probabilities(signal, available, 0.0))
      [0.5        0.16666667 0.33333334 0.        ]
    """
    signal = signal.astype(jnp.float32)
    known = available & jnp.isfinite(signal)
    value = jnp.where(known, jnp.maximum(signal, 0), 0)
    largest = value.max()
    value = value / jnp.where(largest > 0, largest, 1)  # no sum of finite numbers is infinite then
    mean = value.sum() / jnp.maximum(known.sum(), 1).astype(jnp.float32)
    value = jnp.where(available & ~known, mean, value)
    total = value.sum()
    uniform = jnp.where(available, 1 / jnp.maximum(available.sum(), 1).astype(jnp.float32), 0)
    by_signal = jnp.where(total > 0, value / jnp.where(total > 0, total, 1), uniform)
    share = jnp.asarray(uniform_share, jnp.float32)
    return (1 - share) * by_signal + share * uniform


def merged_draws(key: jax.Array, probabilities: jax.Array, num_draws: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws clients with replacement and merges those drawn more than once.

    The probabilities are rounded to multiples of 2^-30, a positive one never to 0, and drawn from exactly; what is
    returned are the rounded ones. Cost `O(N + C log N)`.

    Args:
      key: PRNG key.
      probabilities: `[N]` float32 with sum 1, or all 0.
      num_draws: static number of draws, `C`.

    Returns:
      `[C]` int32 ids in ascending order, `[C]` int32 how often the client was drawn (0 in a place that merging left
      empty, or if nobody can be drawn), and `[C]` float32 the probability of that client in a single draw.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> client_id, times, probability = merged_draws(jax.random.key(0), jnp.array([0.0, 1.0]), 3)
      >>> print(client_id, times, probability)
      [1 1 1] [3 0 0] [1. 1. 1.]
    """
    shares = jnp.where(probabilities > 0, jnp.maximum(jnp.round(probabilities * _SCALE), 1), 0).astype(jnp.int32)
    ends = jnp.cumsum(shares, dtype=jnp.int32)
    total = ends[-1]
    draws = jax.random.randint(key, (num_draws,), 0, jnp.maximum(total, 1), jnp.int32)
    client_id = jnp.sort(jnp.searchsorted(ends, draws, side="right").astype(jnp.int32))
    client_id = jnp.minimum(client_id, probabilities.shape[0] - 1)
    places = jnp.arange(num_draws, dtype=jnp.int32)
    first = jnp.searchsorted(client_id, client_id, side="left").astype(jnp.int32)
    after = jnp.searchsorted(client_id, client_id, side="right").astype(jnp.int32)
    times = jnp.where((first == places) & (total > 0), after - first, 0)
    probability = shares[client_id].astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    return client_id, times, probability


def importance(
    num_selected: int,
    *,
    uniform_share: float | jax.Array = 0.1,
    unbiased: bool = False,
    signal_fn: TellFn = local_loss,
) -> Selector:
    """Samples clients in proportion to what they last told, mixed with a uniform share.

    With `p` of `importance_probabilities`, either

    - `unbiased=False`: successive sampling without replacement, as `weighted`, with weights 1. This is a bias towards
      clients of large signal;
    - `unbiased=True`: `C = num_selected` draws with replacement. A client that was drawn `m_i` times takes one place
      with the weight `m_i / (N p_i)`, `N` being the clients available; the places that merging leaves stay empty. Then
      `1/C sum_i weight_i x_i` has the expectation `1/N sum_i x_i`, to rounding, for any numbers `x_i` that do not
      depend on the draw, such as the clients' updates from the present parameters. The divisor is the fixed `C`. The
      weighted mean of the rules divides by `sum_i weight_i`, whose expectation is `C`: that estimate is consistent as
      `C` grows, with a bias of order `1 / C`.

    A client that was never heard of counts as the mean of those known. A signal that is not finite is not heard: what
    was known before stays.

    Args:
      num_selected: static size `C` of the cohort, between 1 and `N`.
      uniform_share: between 0 and 1, positive if `unbiased`; may be traced.
      unbiased: how to draw and to weigh, see above.
      signal_fn: reads `[C]` numbers, losses or norms of gradients, from what a round told.

    Returns:
      A `Selector` with an `ImportanceState`.

    Raises:
      ValueError: if `num_selected` or a `uniform_share` that is a Python number is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> selector = importance(2, unbiased=True, signal_fn=lambda info: info)
      >>> state = selector.observe(selector.init(2), Selection(jnp.arange(2), jnp.ones(2)), jnp.array([1e6, 0.0]))
      >>> selection, _ = selector.select(state, jax.random.key(0), jnp.ones(2, bool))
      >>> print(selection.weights)  # two draws of client 0, whose p is 0.95
      [1.0526316 0.       ]
    """
    check_positive(num_selected=num_selected)
    if isinstance(uniform_share, int | float) and not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share must satisfy 0 <= uniform_share <= 1, got {uniform_share}.")
    if unbiased and isinstance(uniform_share, int | float) and uniform_share == 0:
        raise ValueError("uniform_share must be positive if unbiased: a client that is never drawn is a bias, got 0.")

    def init(num_clients: int) -> ImportanceState:
        return ImportanceState(unheard(num_clients))

    def select(state: ImportanceState, key: jax.Array, available: jax.Array) -> tuple[Selection, ImportanceState]:
        check_size("num_selected", num_selected, available.shape[0])
        check_per_client("available", available, state.signal.shape[0])
        p = importance_probabilities(state.signal, available, uniform_share)
        if not unbiased:
            return highest(gumbel_scores(key, p), available, num_selected), state
        client_id, times, probability = merged_draws(key, p, num_selected)
        drawn = times > 0
        num_available = available.sum().astype(jnp.float32)
        weights = times.astype(jnp.float32) / (num_available * jnp.where(drawn, probability, 1))
        return fill_places(client_id, jnp.where(drawn, weights, 0)), state

    def observe(state: ImportanceState, selection: Selection, info: PyTree) -> ImportanceState:
        return ImportanceState(hear(state.signal, selection, signal_fn(info)))

    return Selector(init, select, observe)
