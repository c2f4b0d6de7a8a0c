import math

import numpy as np
import pytest
from scipy import integrate, stats

from cedarjax.privacy import accounting

pytest.importorskip("dp_accounting")

# Sampling rate, noise multiplier, rounds, delta; epsilon by PLD and by RDP, as dp-accounting 0.6.0 tells it:
#   event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), rounds)
#   pld.PLDAccountant().compose(event).get_epsilon(delta), rdp.RdpAccountant().compose(event).get_epsilon(delta)
RECORDED = [
    (1.0, 1.0, 1, 1e-05, 4.377178, 4.728507),
    (1.0, 4.0, 1, 1e-05, 0.926342, 1.012551),
    (1.0, 10.0, 50, 1e-06, 3.307601, 3.542361),
    (0.5, 2.0, 20, 1e-4, 4.897734, 5.461514),
    (0.25, 1.5, 40, 1e-4, 5.072221, 5.728336),
    (0.1, 1.0, 100, 1e-05, 7.046603, 7.903850),
    (0.1, 4.0, 1000, 1e-05, 3.444345, 3.736242),
    (0.05, 0.8, 200, 1e-05, 7.702170, 8.743239),
    (0.02, 1.2, 500, 1e-06, 2.256149, 2.486053),
    (0.01, 1.0, 1000, 1e-05, 1.828244, 2.101367),
    (0.01, 0.6, 300, 1e-05, 4.965424, 6.057646),
    (0.001, 0.8, 5000, 1e-07, 0.980893, 1.905799),
]


@pytest.mark.parametrize("rate, noise, rounds, delta, by_pld, by_rdp", RECORDED)
def test_recorded_points(rate, noise, rounds, delta, by_pld, by_rdp):
    given = {"sampling_rate": rate, "noise_multiplier": noise, "num_rounds": rounds, "delta": delta}
    assert accounting.epsilon(**given) == pytest.approx(by_pld, rel=1e-3)
    assert accounting.epsilon(**given, accountant="rdp") == pytest.approx(by_rdp, rel=2e-3)


@pytest.mark.parametrize("noise, delta", [(0.8, 1e-3), (2.0, 1e-5), (7.0, 1e-6)])
def test_one_round_with_everybody_is_the_gaussian_mechanism(noise, delta):
    """Against the closed form of Balle and Wang (2018)."""
    epsilon = accounting.epsilon(sampling_rate=1.0, noise_multiplier=noise, num_rounds=1, delta=delta)
    exact = stats.norm.cdf(0.5 / noise - epsilon * noise)
    exact -= np.exp(epsilon) * stats.norm.cdf(-0.5 / noise - epsilon * noise)
    assert delta * (1 - 5e-3) < exact <= delta * (1 + 1e-6)


@pytest.mark.parametrize("rate, noise, epsilon", [(0.3, 1.0, 0.5), (0.05, 0.7, 1.0)])
def test_one_sampled_round_is_an_integral(rate, noise, epsilon):
    """Delta is the larger of the two hockey-stick divergences between the mixture and the noise alone."""

    def densities(x):
        without = stats.norm.pdf(x, 0, noise)
        return rate * stats.norm.pdf(x, 1, noise) + (1 - rate) * without, without

    def over(x, sign):
        p, q = densities(x)[::sign]
        return max(p - np.exp(epsilon) * q, 0)

    exact = max(integrate.quad(over, -12, 12, args=(sign,), limit=500, points=[0, 1])[0] for sign in (1, -1))
    told = accounting.delta(sampling_rate=rate, noise_multiplier=noise, num_rounds=1, epsilon=epsilon)
    assert told == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    "accountant, rate, rounds, delta, target",
    [
        ("pld", 0.1, 100, 1e-5, 2.0),
        ("pld", 1.0, 10, 1e-4, 0.3),
        ("pld", 1.0, 1, 1e-3, 30),
        ("rdp", 1.0, 10, 1e-4, 0.3),
        ("rdp", 0.5, 5, 1e-3, 30),
    ],
)
def test_calibration_inverts(accountant, rate, rounds, delta, target):
    given = {"sampling_rate": rate, "num_rounds": rounds, "delta": delta, "accountant": accountant}
    noise = accounting.calibrate_noise(target_epsilon=target, **given)
    assert target * (1 - 1e-3) < accounting.epsilon(noise_multiplier=noise, **given) <= target
    assert accounting.epsilon(noise_multiplier=noise * (1 - 1e-4), **given) > target


def test_delta_inverts_epsilon():
    given = {"sampling_rate": 0.2, "noise_multiplier": 1.5, "num_rounds": 30}
    epsilon = accounting.epsilon(**given, delta=1e-5)
    assert accounting.delta(**given, epsilon=epsilon) == pytest.approx(1e-5, rel=1e-3)


def test_edges():
    given = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "num_rounds": 10, "delta": 1e-5}
    assert accounting.epsilon(**{**given, "noise_multiplier": 0.0}) == math.inf
    assert accounting.epsilon(**{**given, "num_rounds": 0}) == 0
    assert accounting.epsilon(**{**given, "sampling_rate": 0.0}) == 0
    assert accounting.epsilon(**{**given, "noise_multiplier": math.inf}) == 0
    assert accounting.epsilon(**{**given, "noise_multiplier": 0.0, "num_rounds": 0}) == 0
    told = {"sampling_rate": 0.1, "num_rounds": 10}
    assert accounting.delta(**told, noise_multiplier=0.0, epsilon=1.0) == 1
    assert accounting.delta(**told, noise_multiplier=1.0, epsilon=math.inf) == 0
    assert accounting.calibrate_noise(target_epsilon=math.inf, delta=1e-5, **told) == 0
    assert accounting.calibrate_noise(target_epsilon=1.0, delta=1e-5, sampling_rate=0.1, num_rounds=0) == 0


def test_little_noise_is_accounted_for_without_gigabytes():
    """The losses of one round reach 1 / (2 z^2) = 5,000; about there epsilon must be."""
    found = accounting.epsilon(sampling_rate=0.5, noise_multiplier=0.01, num_rounds=1, delta=1e-5)
    assert 5_000 < found < 5_600


def test_epsilon_moves_as_it_must():
    given = {"sampling_rate": 0.1, "noise_multiplier": 2.0, "num_rounds": 10, "delta": 1e-5}
    base = accounting.epsilon(**given)
    assert accounting.epsilon(**{**given, "sampling_rate": 0.2}) > base
    assert accounting.epsilon(**{**given, "noise_multiplier": 3.0}) < base
    assert accounting.epsilon(**{**given, "num_rounds": 20}) > base
    assert accounting.epsilon(**{**given, "delta": 1e-4}) < base
    assert accounting.epsilon(**given, accountant="rdp") > base


def test_a_report_counts_half_its_noise():
    told = accounting.local_epsilon(noise_multiplier=4.0, num_reports=3, delta=1e-5)
    central = accounting.epsilon(sampling_rate=1.0, noise_multiplier=2.0, num_rounds=3, delta=1e-5)
    assert told == central > accounting.epsilon(sampling_rate=1.0, noise_multiplier=4.0, num_rounds=3, delta=1e-5)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"sampling_rate": 1.5}, "sampling_rate must satisfy 0 <= sampling_rate <= 1, got 1.5"),
        ({"sampling_rate": math.nan}, "sampling_rate must satisfy"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be at least 0, got -1.0"),
        ({"num_rounds": -1}, "num_rounds must be at least 0, got -1"),
        ({"delta": 0.0}, "delta must satisfy 0 < delta < 1, got 0.0"),
        ({"delta": 1.0}, "delta must satisfy 0 < delta < 1, got 1.0"),
        ({"accountant": "moments"}, "accountant must be one of .*, got 'moments'"),
    ],
)
def test_errors_name_the_argument(changed, message):
    given = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "num_rounds": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=message):
        accounting.epsilon(**{**given, **changed})


def test_other_errors():
    given = {"sampling_rate": 0.1, "num_rounds": 10}
    with pytest.raises(ValueError, match="target_epsilon must be above 0, got 0"):
        accounting.calibrate_noise(target_epsilon=0, delta=1e-5, **given)
    with pytest.raises(ValueError, match="epsilon must be at least 0, got -1"):
        accounting.delta(epsilon=-1, noise_multiplier=1.0, **given)
    with pytest.raises(TypeError):
        accounting.epsilon(noise_multiplier=1.0, delta=1e-5, sampling_rate=0.1, num_rounds=1.5)
    with pytest.raises(ValueError, match="num_reports must be at least 0, got -2"):
        accounting.local_epsilon(noise_multiplier=1.0, num_reports=-2, delta=1e-5)


@pytest.mark.parametrize("n, p", [(1, 0.3), (12, 0.05), (40, 0.5), (1000, 0.01), (1000, 0.99), (100_000, 0.002)])
def test_binomial_tail(n, p):
    for count in {0, 1, int(n * p), int(n * p) + 1, int(n * p + 6 * np.sqrt(n * p)) + 1, n}:
        assert accounting.binomial_tail(n, p, count) == pytest.approx(stats.binom.sf(count - 1, n, p), rel=1e-7)
    assert accounting.binomial_tail(n, p, n + 1) == 0
    assert accounting.binomial_tail(n, 0.0, 1) == 0 and accounting.binomial_tail(n, 1.0, n) == 1
