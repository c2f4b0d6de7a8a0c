"""Independent participation: everybody tosses a coin of their own, which is Poisson sampling.

It is what privacy amplification by subsampling assumes. The size of the cohort is random, `Binomial(N, p)`, and a
compiled round has a static one: `bernoulli_size` says how many places make an overflow as rare as wished, and the state
counts what did not fit.

Reference: Mironov, Talwar, Zhang, `Rényi Differential Privacy of the Sampled Gaussian Mechanism
<https://arxiv.org/abs/1908.10530>`_, 2019. The bound where the exact tail begins is Bernstein's inequality; that the
Binomial covers unequal probabilities, far from its mean, is Hoeffding, `On the Distribution of the Number of Successes
in Independent Trials <https://doi.org/10.1214/aoms/1177728178>`_, 1956.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cedarjax.core.batches import check_positive
from cedarjax.core.selection import PoissonSampling, Selection, Selector
from cedarjax.select.places import check_per_client, highest
from cedarjax.select.weighted import open_uniform


class BernoulliState(NamedTuple):
    """What did not fit so far."""

    num_overflowed: jax.Array
    """int32 scalar, rounds in which more clients were drawn than there are places."""
    num_dropped: jax.Array
    """int32 scalar, clients that were drawn and left out, summed over rounds."""


def bernoulli(probability: ArrayLike, max_selected: int) -> Selector:
    """Every available client takes part with its probability, independently of all others.

    The sum over those present, divided by the *fixed* number `p N`, is an unbiased estimate of the mean over all
    clients; the weighted mean of the robust rules divides by those present instead. Where more are drawn than there are
    places, a uniformly random subset of them takes part, and the state tells. A round that overflowed is not Poisson
    sampling: for privacy, add the chance of an overflow to delta.

    Args:
      probability: between 0 and 1, a scalar or `[N]`; may be traced.
      max_selected: static size `C` of the cohort, between 1 and `N`; see `bernoulli_size`.

    Returns:
      A `Selector` with a `BernoulliState` and weights 1, in random order, empty places last. Its `sampling` says so if
      `probability` is a Python number.

    Raises:
      ValueError: if `max_selected` or a `probability` that is a Python number is out of range, or the shape of
        `probability` does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> selector = bernoulli(1.0, max_selected=2)
      >>> selection, state = selector.select(selector.init(3), jax.random.key(0), jnp.ones(3, bool))
      >>> print(selection.weights, state.num_overflowed, state.num_dropped)
      [1. 1.] 1 1
    """
    check_positive(max_selected=max_selected)
    if isinstance(probability, int | float) and not 0 <= probability <= 1:
        raise ValueError(f"probability must satisfy 0 <= probability <= 1, got {probability}.")

    def init(num_clients: int) -> BernoulliState:
        del num_clients
        return BernoulliState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def select(state: BernoulliState, key: jax.Array, available: jax.Array) -> tuple[Selection, BernoulliState]:
        num_clients = available.shape[0]
        p = jnp.asarray(probability, jnp.float32)
        if p.ndim == 0:
            p = jnp.full((num_clients,), p)
        check_per_client("probability", p, num_clients)
        draws = open_uniform(key, num_clients)
        drawn = available & (draws < p)
        # Among those drawn, u / p is uniform whatever their p: the smallest are a random subset, without another draw.
        scores = jnp.where(drawn, -draws / jnp.where(drawn, p, 1), -jnp.inf)
        selection = highest(scores, drawn, max_selected, name="max_selected")
        excess = jnp.maximum(drawn.sum(dtype=jnp.int32) - max_selected, 0)
        return selection, BernoulliState(
            state.num_overflowed + (excess > 0).astype(jnp.int32), state.num_dropped + excess
        )

    if not isinstance(probability, int | float):
        return Selector(init, select)
    return Selector(init, select, sampling=PoissonSampling(float(probability), max_selected))


def bernoulli_size(
    num_clients: int, probability: float, *, failure_probability: float = 1e-9, num_rounds: int = 1
) -> int:
    """Places that suffice: the smallest `m` with `num_rounds * P(Binomial(N, p) > m) <= failure_probability`.

    Exact to a relative `1e-6` of the tail and never too small. For unequal probabilities give their mean: above it, the
    number of those drawn has no heavier tail.

    Args:
      num_clients: clients in the federation, `N`.
      probability: chance of each to take part, between 0 and 1.
      failure_probability: largest chance that any of the rounds overflows, positive.
      num_rounds: rounds of the run.

    Returns:
      The number of places, between 1 and `N`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> bernoulli_size(1000, 0.01), bernoulli_size(1000, 0.01, num_rounds=1000)
      (34, 39)
    """
    check_positive(num_clients=num_clients, num_rounds=num_rounds)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must satisfy 0 <= probability <= 1, got {probability}.")
    if not 0 < failure_probability <= 1:
        raise ValueError(f"failure_probability must satisfy 0 < failure_probability <= 1, got {failure_probability}.")
    if probability in (0, 1):
        return max(1, num_clients * int(probability))
    allowed = failure_probability / num_rounds
    # Bernstein: beyond this count lies less than a millionth of the allowed tail. From there down it is summed up.
    mean, variance = num_clients * probability, num_clients * probability * (1 - probability)
    surprise = math.log(1e6 / allowed)
    count = math.ceil(mean + surprise / 3 + math.sqrt(surprise**2 / 9 + 2 * variance * surprise))
    tail = 1e-6 * allowed if count < num_clients else 0.0
    count = min(count, num_clients)
    log_odds = (math.log(probability), math.log1p(-probability))
    log_all = math.lgamma(num_clients + 1)
    while count > 0:
        log_ways = log_all - math.lgamma(count + 1) - math.lgamma(num_clients - count + 1)
        tail += math.exp(log_ways + count * log_odds[0] + (num_clients - count) * log_odds[1])
        if tail > allowed:
            break
        count -= 1
    return max(1, count)
