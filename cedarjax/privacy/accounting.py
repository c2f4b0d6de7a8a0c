"""What a run of the sampled Gaussian mechanism costs, by the accountants of `dp-accounting` (the extra `privacy`).

Neighbours are two federations of which one has one client more, with all its data: privacy of whole clients, by adding
or removing one. In every round each client takes part independently with one probability (Poisson sampling), clipped
updates are added up, and Gaussian noise of the standard deviation `noise_multiplier * max_norm` is added to the sum.
All updates of the server are told, not only the last model. The functions run on the host, on Python numbers.

References:
  Mironov, Talwar, Zhang, `Rényi Differential Privacy of the Sampled Gaussian Mechanism
  <https://arxiv.org/abs/1908.10530>`_, 2019: `accountant="rdp"`.

  Koskela, Jälkö, Honkela, `Computing Tight Differential Privacy Guarantees Using FFT
  <https://arxiv.org/abs/1906.03049>`_, 2020, and Doroshenko et al., `Connect the Dots: Tighter Discrete Approximations
  of Privacy Loss Distributions <https://arxiv.org/abs/2207.04380>`_, 2022: `accountant="pld"`, which is tighter and
  never below the truth.
"""

import math
import operator
from types import ModuleType
from typing import Any, Literal, get_args

Accountant = Literal["pld", "rdp"]
"""By privacy loss distributions, or by Rényi divergences."""

_INTERVAL = 1e-4  # of the discretised losses, as dp-accounting has it
_COARSER_BELOW = 1.0  # noise under which losses are so large that this interval takes long, and then gigabytes


def _library() -> ModuleType:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs dp-accounting: pip install 'cedarjax[privacy]' (or pip install dp-accounting)."
        ) from error
    return dp_accounting


def check_probability(name: str, value: float, *, is_open: bool = False) -> None:
    """Raises unless a number is a probability.

    Args:
      name: of the argument.
      value: its value.
      is_open: whether 0 and 1 are out of range.

    Raises:
      ValueError: naming the argument, its value and the range.
    """
    sign = "<" if is_open else "<="
    if not (0 < value < 1 if is_open else 0 <= value <= 1):
        raise ValueError(f"{name} must satisfy 0 {sign} {name} {sign} 1, got {value}.")


def _check(sampling_rate: float, noise_multiplier: float, num_rounds: int, accountant: str) -> None:
    check_probability("sampling_rate", sampling_rate)
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier must be at least 0, got {noise_multiplier}.")
    if operator.index(num_rounds) < 0:
        raise ValueError(f"num_rounds must be at least 0, got {num_rounds}.")
    if accountant not in get_args(Accountant):
        raise ValueError(f"accountant must be one of {get_args(Accountant)}, got {accountant!r}.")


def _event(sampling_rate: float, noise_multiplier: float, num_rounds: int) -> Any:
    library = _library()
    event = library.GaussianDpEvent(float(noise_multiplier))
    if sampling_rate < 1:
        event = library.PoissonSampledDpEvent(float(sampling_rate), event)
    return library.SelfComposedDpEvent(event, operator.index(num_rounds))


def _fresh(accountant: str, least_noise: float) -> Any:
    """An accountant of `dp-accounting` for noise multipliers from the least one on."""
    library = _library()
    if accountant == "rdp":
        return library.rdp.RdpAccountant()
    interval = _INTERVAL * max(1.0, (_COARSER_BELOW / least_noise) ** 2)
    return library.pld.PLDAccountant(value_discretization_interval=interval)


def _spent(sampling_rate: float, noise_multiplier: float, num_rounds: int, accountant: str) -> Any:
    """An accountant that was told of all rounds."""
    event = _event(sampling_rate, noise_multiplier, num_rounds)
    return _fresh(accountant, noise_multiplier).compose(event)


def epsilon(
    *, sampling_rate: float, noise_multiplier: float, num_rounds: int, delta: float, accountant: Accountant = "pld"
) -> float:
    """The `epsilon` of `(epsilon, delta)`-differential privacy of whole clients, after all rounds.

    It holds for `gaussian_mechanism` behind Poisson sampling, `select.bernoulli`, and for nothing else; `poisson_plan`
    makes both from one object. For cohorts of a fixed size it would be wrong.

    Args:
      sampling_rate: chance of each client to take part in a round, between 0 and 1.
      noise_multiplier: standard deviation of the noise on the sum over `max_norm`, at least 0.
      num_rounds: rounds, at least 0.
      delta: chance with which the promise may fail, above 0 and below 1; well below one over the number of clients.
      accountant: `"pld"` is tighter, `"rdp"` an older upper bound.

    Returns:
      Epsilon, an upper bound; 0 without rounds or clients, infinity without noise.

    Raises:
      ValueError: if an argument is out of range.
      ImportError: if `dp-accounting` is not installed.

    Example:
      >>> print(f"{epsilon(sampling_rate=0.1, noise_multiplier=2.0, num_rounds=100, delta=1e-5):.2f}")
      2.34
    """
    _check(sampling_rate, noise_multiplier, num_rounds, accountant)
    check_probability("delta", delta, is_open=True)
    if num_rounds == 0 or sampling_rate == 0 or math.isinf(noise_multiplier):
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    return float(_spent(sampling_rate, noise_multiplier, num_rounds, accountant).get_epsilon(delta))


def delta(
    *, sampling_rate: float, noise_multiplier: float, num_rounds: int, epsilon: float, accountant: Accountant = "pld"
) -> float:
    """The `delta` that belongs to an epsilon, the other way round.

    Args:
      sampling_rate: as in `epsilon`.
      noise_multiplier: as in `epsilon`.
      num_rounds: as in `epsilon`.
      epsilon: at least 0.
      accountant: as in `epsilon`.

    Returns:
      Delta, an upper bound; 0 without rounds or clients, 1 without noise.

    Raises:
      ValueError: if an argument is out of range.
      ImportError: if `dp-accounting` is not installed.

    Example:
      >>> spent = delta(sampling_rate=0.1, noise_multiplier=2.0, num_rounds=100, epsilon=2.6)
      >>> bool(1e-6 < spent < 1e-5)
      True
    """
    _check(sampling_rate, noise_multiplier, num_rounds, accountant)
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}.")
    if num_rounds == 0 or sampling_rate == 0 or math.isinf(noise_multiplier) or math.isinf(epsilon):
        return 0.0
    if noise_multiplier == 0:
        return 1.0
    return float(_spent(sampling_rate, noise_multiplier, num_rounds, accountant).get_delta(epsilon))


def calibrate_noise(
    *, target_epsilon: float, sampling_rate: float, num_rounds: int, delta: float, accountant: Accountant = "pld"
) -> float:
    """The smallest `noise_multiplier` whose `epsilon` is no more than a target, to a millionth of it.

    Args:
      target_epsilon: above 0.
      sampling_rate: as in `epsilon`.
      num_rounds: as in `epsilon`.
      delta: as in `epsilon`.
      accountant: as in `epsilon`.

    Returns:
      The noise multiplier; its epsilon is at most the target. 0 if nothing needs to be hidden.

    Raises:
      ValueError: if an argument is out of range, or no noise below 2^30 reaches the target.
      ImportError: if `dp-accounting` is not installed.

    Example:
      >>> noise = calibrate_noise(target_epsilon=1.0, sampling_rate=1.0, num_rounds=1, delta=1e-5)
      >>> print(f"{noise:.2f} {epsilon(sampling_rate=1.0, noise_multiplier=noise, num_rounds=1, delta=1e-5):.4f}")
      3.73 1.0000
    """
    _check(sampling_rate, 0.0, num_rounds, accountant)
    check_probability("delta", delta, is_open=True)
    if not target_epsilon > 0:
        raise ValueError(f"target_epsilon must be above 0, got {target_epsilon}.")
    if num_rounds == 0 or sampling_rate == 0 or math.isinf(target_epsilon):
        return 0.0

    def is_enough(noise: float) -> bool:
        return _spent(sampling_rate, noise, num_rounds, accountant).get_epsilon(delta) <= target_epsilon

    upper = 1.0
    while not is_enough(upper):
        upper *= 2
        if upper > 2.0**30:
            raise ValueError(f"target_epsilon must be within reach of noise below 2^30, got {target_epsilon}.")
    while is_enough(upper / 2):
        upper /= 2
        if upper < 2.0**-20:
            return upper
    library = _library()
    noise = float(
        library.calibrate_dp_mechanism(
            lambda: _fresh(accountant, upper / 2),
            lambda noise: _event(sampling_rate, noise, num_rounds),
            target_epsilon,
            delta,
            library.ExplicitBracketInterval(upper / 2, upper),
            tol=1e-6 * upper,
        )
    )
    while not is_enough(noise):  # the interval of the losses may be another one
        noise *= 1 + 1e-6
    return noise


def local_epsilon(*, noise_multiplier: float, num_reports: int, delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon of a client that noises its own uploads, `local_gaussian`, against whoever receives them.

    In the local model any two uploads must be hard to tell apart, and two that are clipped to `C` can lie `2 C` apart:
    the noise counts half. Everybody knows who reported, so nothing is gained by sampling.

    Args:
      noise_multiplier: standard deviation of the noise over `max_norm`, at least 0.
      num_reports: uploads of this client, at least 0.
      delta: as in `epsilon`.
      accountant: as in `epsilon`.

    Returns:
      Epsilon, an upper bound.

    Raises:
      ValueError: if an argument is out of range.
      ImportError: if `dp-accounting` is not installed.

    Example:
      >>> print(f"{local_epsilon(noise_multiplier=10.0, num_reports=1, delta=1e-5):.2f}")
      0.73
    """
    if operator.index(num_reports) < 0:
        raise ValueError(f"num_reports must be at least 0, got {num_reports}.")
    return epsilon(
        sampling_rate=1.0,
        noise_multiplier=noise_multiplier / 2,
        num_rounds=num_reports,
        delta=delta,
        accountant=accountant,
    )


def binomial_tail(num_clients: int, probability: float, count: int) -> float:
    """`P(Binomial(num_clients, probability) >= count)`, never below the truth by more than rounding.

    Args:
      num_clients: trials, at least 0.
      probability: of each, between 0 and 1.
      count: successes.

    Returns:
      The chance.

    Example:
      >>> binomial_tail(2, 0.5, 1), binomial_tail(5, 0.5, 6)
      (0.75, 0.0)
    """
    check_probability("probability", probability)
    if count <= 0:
        return 1.0
    if count > num_clients or probability == 0:
        return 0.0
    if probability == 1:
        return 1.0
    if count <= num_clients * probability:  # the short side of the distribution is the exact one
        return 1.0 - binomial_tail(num_clients, 1 - probability, num_clients - count + 1)
    log_ways = math.lgamma(num_clients + 1) - math.lgamma(count + 1) - math.lgamma(num_clients - count + 1)
    term = math.exp(log_ways + count * math.log(probability) + (num_clients - count) * math.log1p(-probability))
    odds, total = probability / (1 - probability), 0.0
    for successes in range(count, num_clients + 1):
        total += term
        if term < 1e-18 * total:
            break
        term *= odds * (num_clients - successes) / (successes + 1)
    return min(1.0, total)
