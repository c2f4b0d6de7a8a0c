"""How a metric is distributed over clients, each client counting once whatever its number of examples.

The worst tenth is the usual report of fairness in federated learning (Li, Sanjabi, Beirami and Smith, `Fair Resource
Allocation in Federated Learning <https://arxiv.org/abs/1905.10497>`_, 2020).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.metrics.presence import presence


class Fairness(NamedTuple):
    """Distribution of a metric over the present clients; all 0 when none is present."""

    mean: jax.Array
    """Mean."""
    std: jax.Array
    """Standard deviation of the population (divided by the number of clients)."""
    worst_decile: jax.Array
    """Mean of the worst `ceil(0.1 * num_clients)` clients."""
    min: jax.Array
    """Smallest value."""
    median: jax.Array
    """Median, the mean of the two middle values for an even number."""
    max: jax.Array
    """Largest value."""
    num_clients: jax.Array
    """int32 scalar, clients present."""


def fairness(values: jax.Array, weights: jax.Array | None = None, *, higher_is_better: bool = True) -> Fairness:
    """Describes one value a client.

    Args:
      values: `[C]`.
      weights: `[C]` mask or weights, present where positive, and no more than that; everybody by default.
      higher_is_better: whether the worst clients are those of the lowest values, as for accuracy, or of the highest,
        as for loss.

    Returns:
      The distribution. Values of absent clients are not read; a NaN of a present client, of a diverged model say,
      makes every number NaN, so that it cannot hide.

    Raises:
      ValueError: if `values` is not `[C]`, or `weights` of another shape.

    Example:
      >>> accuracy = jnp.array([0.9, 0.5, 0.7, 0.0])
      >>> told = fairness(accuracy, jnp.array([True, True, True, False]))
      >>> [round(float(number), 3) for number in (told.mean, told.worst_decile, told.median)]
      [0.7, 0.5, 0.7]
    """
    if values.ndim != 1:
        raise ValueError(f"values must be [C], got shape {values.shape}.")
    values = values.astype(accumulator(values))
    present = presence(weights, len(values), name="weights")
    num_clients = present.sum(dtype=jnp.int32)
    undefined = (present & jnp.isnan(values)).any()

    badness = jnp.sort(jnp.where(present, -values if not higher_is_better else values, jnp.inf))
    place = jnp.arange(values.shape[0], dtype=jnp.int32)
    num_worst = (num_clients + 9) // 10
    low, high = (badness[jnp.maximum(middle, 0)] for middle in ((num_clients - 1) // 2, num_clients // 2))
    sign = 1.0 if higher_is_better else -1.0
    first, last = sign * badness[0], sign * badness[jnp.maximum(num_clients - 1, 0)]

    mean = _masked_mean(values, present)
    told = {
        "mean": mean,
        "std": jnp.sqrt(_masked_mean(jnp.square(values - mean), present)),
        "worst_decile": sign * _masked_mean(badness, place < num_worst),
        "min": jnp.minimum(first, last),
        "median": sign * (0.5 * low + 0.5 * high),
        "max": jnp.maximum(first, last),
    }
    told = {name: jnp.where(undefined, jnp.nan, jnp.where(num_clients > 0, told[name], 0)) for name in told}
    return Fairness(**told, num_clients=num_clients)


def _masked_mean(values: jax.Array, present: jax.Array) -> jax.Array:
    """Mean of the present values, 0 if there is none."""
    count = jnp.maximum(present.sum(dtype=jnp.int32), 1).astype(values.dtype)
    return jnp.where(present, values, 0).sum() / count
