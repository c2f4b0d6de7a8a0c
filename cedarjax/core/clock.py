"""Simulated time: how long clients take, what a synchronous round costs, and when a target was reached.

A duration is a function `(key, client_id, count) -> seconds`, where `count` says how many jobs the client has done
before; it is vmapped where many are wanted. Durations that are not at least 0 count as never.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator

DurationFn: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(key, client_id, count) -> seconds`, a float scalar."""

Seconds: TypeAlias = float | jax.Array


def _of_client(name: str, values: Seconds) -> Callable[[jax.Array], jax.Array]:
    array = jnp.asarray(values)
    array = array.astype(accumulator(array))
    if array.ndim > 1:
        raise ValueError(f"{name} must be a scalar or [N], got the shape {array.shape}.")
    return lambda client_id: array if array.ndim == 0 else array.at[client_id].get(mode="clip")


def fixed_durations(seconds: Seconds) -> DurationFn:
    """Each client always takes the same time.

    Args:
      seconds: scalar or `[N]`.

    Returns:
      A `DurationFn`.

    Raises:
      ValueError: if the array has another rank.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(fixed_durations(jnp.array([1.0, 2.0]))(jax.random.key(0), jnp.int32(1), jnp.int32(0)))
      2.0
    """
    of_client = _of_client("seconds", seconds)
    return lambda key, client_id, count: of_client(client_id)


def exponential_durations(mean: Seconds) -> DurationFn:
    """Exponentially distributed, `mean * E` with `E ~ Exp(1)`.

    Args:
      mean: seconds, scalar or `[N]`.

    Returns:
      A `DurationFn`.

    Raises:
      ValueError: if the array has another rank.
    """
    return shifted_exponential_durations(0.0, mean)


def shifted_exponential_durations(shift: Seconds, mean: Seconds) -> DurationFn:
    """A least time and an exponential rest, `shift + mean * E` with `E ~ Exp(1)`: the usual model of a straggler.

    Args:
      shift: seconds that a job takes at least, scalar or `[N]`.
      mean: mean seconds beyond them, scalar or `[N]`.

    Returns:
      A `DurationFn`, whose mean is `shift + mean`.

    Raises:
      ValueError: if an array has another rank.
    """
    least, rest = _of_client("shift", shift), _of_client("mean", mean)

    def duration(key: jax.Array, client_id: jax.Array, count: jax.Array) -> jax.Array:
        del count
        beyond = rest(client_id)
        return least(client_id).astype(beyond.dtype) + beyond * jax.random.exponential(key, (), beyond.dtype)

    return duration


def lognormal_durations(mean: Seconds, sigma: float | jax.Array) -> DurationFn:
    """Log-normally distributed, `mean * exp(sigma Z - sigma^2 / 2)` with `Z ~ N(0, 1)`.

    Args:
      mean: seconds, scalar or `[N]`.
      sigma: standard deviation of the logarithm, at least 0, scalar or `[N]`.

    Returns:
      A `DurationFn`, whose mean is `mean`.

    Raises:
      ValueError: if an array has another rank or `sigma` is negative.
    """
    if isinstance(sigma, int | float) and sigma < 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}.")
    means, sigmas = _of_client("mean", mean), _of_client("sigma", sigma)

    def duration(key: jax.Array, client_id: jax.Array, count: jax.Array) -> jax.Array:
        del count
        m = means(client_id)
        s = sigmas(client_id).astype(m.dtype)
        return m * jnp.exp(s * jax.random.normal(key, (), m.dtype) - jnp.square(s) / 2)

    return duration


class RoundTimes(NamedTuple):
    """When synchronous rounds end."""

    seconds: jax.Array
    """`[R]`, how long each round takes."""
    elapsed: jax.Array
    """`[R]`, simulated time at the end of each round."""
    in_time: jax.Array
    """`[R, C]` bool, who takes part and is done by the deadline."""


def synchronous_time(
    durations: jax.Array, weights: jax.Array, *, deadline: float | jax.Array | None = None
) -> RoundTimes:
    """A synchronous round lasts as long as its slowest participant, or until the deadline.

    Args:
      durations: `[R, C]` seconds of each client in each round; NaN counts as never.
      weights: `[R, C]`; clients of weight 0 do not take part and nobody waits for them.
      deadline: seconds after which the server goes on without the rest, above 0; None waits for all.

    Returns:
      A `RoundTimes`. A round without participants takes no time. Weights of a round with a deadline are
      `jnp.where(in_time, weights, 0)`.

    Raises:
      ValueError: if the shapes differ or the deadline is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> seconds, weights = jnp.array([[1.0, 5.0], [2.0, 3.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
      >>> print(synchronous_time(seconds, weights).elapsed, synchronous_time(seconds, weights, deadline=4.0).elapsed)
      [5. 7.] [4. 6.]
    """
    if durations.ndim != 2 or durations.shape != weights.shape:
        raise ValueError(f"durations and weights must both be [R, C], got {durations.shape} and {weights.shape}.")
    if isinstance(deadline, int | float) and deadline <= 0:
        raise ValueError(f"deadline must be above 0, got {deadline}.")
    never = jnp.asarray(jnp.inf, durations.dtype)
    takes_part = weights > 0
    waited = jnp.where(takes_part, jnp.where(jnp.isnan(durations), never, durations), jnp.zeros_like(durations))
    limit = never if deadline is None else jnp.asarray(deadline, durations.dtype)
    seconds = jnp.minimum(waited.max(axis=1, initial=0), limit)
    return RoundTimes(seconds, jnp.cumsum(seconds), takes_part & (waited <= limit) & (waited < never))


def time_to_target(
    times: jax.Array, metric: jax.Array, target: float | jax.Array, *, lower_is_better: bool = False
) -> jax.Array:
    """The first time at which a metric is as good as the target.

    Args:
      times: `[..., R]` seconds of each evaluation.
      metric: `[..., R]`; NaN reaches nothing.
      target: what the metric has to reach.
      lower_is_better: whether the metric is a loss.

    Returns:
      `[...]` seconds, inf where the target was not reached.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(time_to_target(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.8, 0.7]), 0.6))
      2.0
    """
    if times.shape != metric.shape or times.ndim < 1:
        raise ValueError(f"times and metric must have the same shape [..., R], got {times.shape} and {metric.shape}.")
    goal = jnp.asarray(target, metric.dtype)
    reached = metric <= goal if lower_is_better else metric >= goal
    return jnp.where(reached, times, jnp.asarray(jnp.inf, times.dtype)).min(axis=-1, initial=jnp.inf)
