"""One object from which both a run and its privacy come, so that what is accounted for is what is run.

Two federations are neighbours if one has one client more and neither has more than `num_clients`. The places of a
compiled cohort are limited, and a round in which more clients are drawn is not Poisson sampling. Given that among the
*others* fewer than all places are drawn, which has the same chance in both federations and tells nothing of the client
in question, every round is a mixture of pairs that the accountant bounds; so the chance that it ever happens is added
to delta, and that is all that it costs.
"""

from typing import NamedTuple

from cedarjax.core.selection import FixedSizeSampling, PoissonSampling, Selector
from cedarjax.core.types import Aggregator
from cedarjax.privacy.accounting import Accountant, binomial_tail, calibrate_noise, check_probability, epsilon
from cedarjax.privacy.adaptive import adaptive_clipping
from cedarjax.privacy.mechanism import gaussian_mechanism


class AdaptiveNorm(NamedTuple):
    """Arguments of `adaptive_clipping`, in the place of a `max_norm`."""

    initial_norm: float = 0.1
    """The first clip norm."""
    target_quantile: float = 0.5
    """Share of the clients that the norm is to leave unclipped."""
    learning_rate: float = 0.2
    """Rate of the geometric steps."""
    count_std: float | None = None
    """Standard deviation of the noise on the counts."""


class PrivatePlan(NamedTuple):
    """A run and what it costs. Use its selector and its aggregator, with nothing between the clients and the latter."""

    selector: Selector
    """For `init_run` and `run_rounds`."""
    aggregator: Aggregator
    """The first of the server's chain; only server optimisers behind it. After `num_rounds` it tells nothing more."""
    epsilon: float
    """Of `(epsilon, delta)`-differential privacy of whole clients, adding or removing one, after all rounds."""
    delta: float
    """All of it, `overflow_probability` included."""
    noise_multiplier: float
    """Standard deviation of the noise on the sum over the clip norm."""
    sampling_rate: float
    """Chance of each client to take part in a round in which it may."""
    expected_cohort: float
    """The fixed denominator."""
    num_clients: int
    """Clients in the federation, at most."""
    num_rounds: int
    """Rounds that were accounted for."""
    overflow_probability: float
    """Chance that in any round more clients are drawn than there are places."""
    accountant: str
    """Whose epsilon it is."""


def poisson_law(selector: Selector, num_clients: int) -> PoissonSampling:
    """The law of a selector's cohorts, if it is one that can be accounted for.

    Args:
      selector: from `select.bernoulli`.
      num_clients: clients in the federation.

    Returns:
      Its `PoissonSampling`.

    Raises:
      ValueError: saying why it cannot.
    """
    law = selector.sampling
    if isinstance(law, FixedSizeSampling):
        raise ValueError(
            f"selector must sample each client independently (Poisson sampling), got cohorts of fixed size {law.size}: "
            "there, adding one client takes another one's place, which the accounting of Poisson sampling does not "
            "cover. Use select.bernoulli(probability, max_selected=select.bernoulli_size(...))."
        )
    if not isinstance(law, PoissonSampling):
        raise ValueError(
            "selector must be select.bernoulli with a Python number for its probability, got one whose law is not "
            "known before the run (a traced or unequal probability, a wrapper such as select.available, or choices "
            "that depend on what clients told): what privacy it gives cannot be accounted for."
        )
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}.")
    if law.max_selected > num_clients:
        raise ValueError(
            f"max_selected of the selector must be at most num_clients, got {law.max_selected} and {num_clients}."
        )
    return law


def overflow_probability(num_clients: int, probability: float, max_selected: int, num_rounds: int) -> float:
    """Bound on the chance that in any round the others of a client fill all places.

    Args:
      num_clients: clients that may be drawn in a round, the one in question included.
      probability: of each.
      max_selected: places.
      num_rounds: rounds.

    Returns:
      `num_rounds P(Binomial(num_clients - 1, probability) >= max_selected)`, at most 1; 0 with a place for everybody.

    Example:
      >>> print(overflow_probability(3, 0.5, 2, 2), overflow_probability(3, 0.5, 3, 2))
      0.5 0.0
    """
    return min(1.0, num_rounds * binomial_tail(num_clients - 1, probability, max_selected))


def delta_left(delta: float, overflow: float) -> float:
    """What is left of delta for the accountant.

    Args:
      delta: all of it.
      overflow: from `overflow_probability`.

    Returns:
      The difference.

    Raises:
      ValueError: if nothing is left.
    """
    check_probability("delta", delta, is_open=True)
    if not overflow < delta:
        raise ValueError(
            f"delta must be above the chance that more clients are drawn than there are places, got {delta} and "
            f"{overflow:.3g}; give the selector more places (max_selected), see select.bernoulli_size."
        )
    return delta - overflow


def epsilon_of(
    selector: Selector,
    *,
    num_clients: int,
    noise_multiplier: float,
    num_rounds: int,
    delta: float,
    accountant: Accountant = "pld",
) -> float:
    """`accounting.epsilon` of the clients that a selector draws, its limited places included.

    Args:
      selector: from `select.bernoulli`.
      num_clients: clients in the federation.
      noise_multiplier: as in `epsilon`.
      num_rounds: as in `epsilon`.
      delta: all of it, above the chance of an overflow.
      accountant: as in `epsilon`.

    Returns:
      Epsilon.

    Raises:
      ValueError: if the selector cannot be accounted for, or an argument is out of range.
      ImportError: if `dp-accounting` is not installed.

    Example:
      >>> import cedarjax as cj
      >>> selector = cj.select.bernoulli(0.1, max_selected=cj.select.bernoulli_size(100, 0.1))
      >>> found = epsilon_of(selector, num_clients=100, noise_multiplier=2.0, num_rounds=100, delta=1e-5)
      >>> print(f"{found:.2f}")
      2.34
    """
    law = poisson_law(selector, num_clients)
    overflow = overflow_probability(num_clients, law.probability, law.max_selected, num_rounds)
    return epsilon(
        sampling_rate=law.probability,
        noise_multiplier=noise_multiplier,
        num_rounds=num_rounds,
        delta=delta_left(delta, overflow),
        accountant=accountant,
    )


def chosen_noise(
    noise_multiplier: float | None,
    target_epsilon: float | None,
    *,
    sampling_rate: float,
    num_rounds: int,
    delta: float,
    accountant: Accountant,
) -> float:
    """The noise that was given, or the least that keeps a promise.

    Args:
      noise_multiplier: a Python number, or None.
      target_epsilon: epsilon to keep, or None.
      sampling_rate: as in `epsilon`.
      num_rounds: as in `epsilon`.
      delta: what is left for the accountant.
      accountant: as in `epsilon`.

    Returns:
      The noise multiplier.

    Raises:
      ValueError: if not exactly one of them is given.
      TypeError: if the noise is not a Python number, which alone can be accounted for.
    """
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError(
            "exactly one of noise_multiplier and target_epsilon must be given, got "
            f"{noise_multiplier} and {target_epsilon}."
        )
    if target_epsilon is not None:
        return calibrate_noise(
            target_epsilon=target_epsilon,
            sampling_rate=sampling_rate,
            num_rounds=num_rounds,
            delta=delta,
            accountant=accountant,
        )
    if not isinstance(noise_multiplier, int | float):
        raise TypeError(f"noise_multiplier must be a Python number in a plan, got {type(noise_multiplier).__name__}.")
    return float(noise_multiplier)


def poisson_plan(
    selector: Selector,
    *,
    num_clients: int,
    num_rounds: int,
    delta: float,
    max_norm: float | AdaptiveNorm,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    accountant: Accountant = "pld",
) -> PrivatePlan:
    """A run of the Gaussian mechanism behind Poisson sampling, and its epsilon, from one set of numbers.

    The denominator is `probability * num_clients`; the aggregator refuses cohorts of another size than the selector's
    and stops after `num_rounds`.

    Args:
      selector: from `select.bernoulli`, with a Python number for its probability.
      num_clients: clients in the federation, which counts as public.
      num_rounds: rounds of the run, all runs on these clients together: what is tuned on them counts too.
      delta: chance with which the promise may fail; well below `1 / num_clients`.
      max_norm: clip norm, or `AdaptiveNorm()`.
      noise_multiplier: noise, at least 0; or else
      target_epsilon: epsilon to keep with the least noise.
      accountant: `"pld"` or `"rdp"`.

    Returns:
      A `PrivatePlan`.

    Raises:
      ValueError: if the selector cannot be accounted for, or an argument is out of range.
      TypeError: if `noise_multiplier` is traced.
      ImportError: if `dp-accounting` is not installed.

    Example:
      >>> import cedarjax as cj
      >>> selector = cj.select.bernoulli(0.1, max_selected=cj.select.bernoulli_size(100, 0.1))
      >>> plan = poisson_plan(selector, num_clients=100, num_rounds=50, delta=1e-4, max_norm=1.0, target_epsilon=2.0)
      >>> print(f"{plan.epsilon:.3f} {plan.noise_multiplier:.2f} {plan.expected_cohort:.0f}")
      2.000 1.55 10
    """
    law = poisson_law(selector, num_clients)
    if law.probability == 0:
        raise ValueError("probability of the selector must be above 0, got 0: nobody would take part.")
    overflow = overflow_probability(num_clients, law.probability, law.max_selected, num_rounds)
    noise = chosen_noise(
        noise_multiplier,
        target_epsilon,
        sampling_rate=law.probability,
        num_rounds=num_rounds,
        delta=delta_left(delta, overflow),
        accountant=accountant,
    )
    expected = law.probability * num_clients
    if isinstance(max_norm, AdaptiveNorm):
        aggregator = adaptive_clipping(
            noise, expected, **max_norm._asdict(), num_rounds=num_rounds, cohort_size=law.max_selected
        )
    else:
        aggregator = gaussian_mechanism(noise, max_norm, expected, num_rounds=num_rounds, cohort_size=law.max_selected)
    spent = epsilon_of(
        selector,
        num_clients=num_clients,
        noise_multiplier=noise,
        num_rounds=num_rounds,
        delta=delta,
        accountant=accountant,
    )
    return PrivatePlan(
        selector,
        aggregator,
        spent,
        delta,
        noise,
        law.probability,
        expected,
        num_clients,
        num_rounds,
        overflow,
        accountant,
    )
