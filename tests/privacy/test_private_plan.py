import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import cedarjax as cj
from cedarjax import privacy
from cedarjax.core import FixedSizeSampling, LocalUpdate, PoissonSampling, Upload
from cedarjax.privacy import accounting

pytest.importorskip("dp_accounting")

N = 12


def upload_of(value_fn):
    """Clients that upload a function of their data."""

    def update(shared, state, data, key):
        return Upload(jax.tree.map(lambda p: value_fn(data) + 0 * p, shared)), state, ()

    return LocalUpdate(lambda params: (), update)


def make_dataset():
    """One number a client, `0 .. N - 1`, and one client with two."""
    return cj.data.federated_dataset(np.r_[np.arange(N), 0.0].astype(np.float32), np.r_[np.arange(N), 0])


def plan_of(probability=0.4, places=N, **options):
    given = {"num_clients": N, "num_rounds": 30, "delta": 1e-3, "max_norm": 1.0, "noise_multiplier": 2.0}
    selector = cj.select.bernoulli(probability, max_selected=places)
    return privacy.poisson_plan(selector, **{**given, **options})


def run(plan, local, num_rounds, seed=0, server=None):
    algorithm = cj.federated_round(local, optax.chain(plan.aggregator, optax.sgd(1.0) if server is None else server))
    dataset = make_dataset()
    state = cj.init_run(algorithm, dataset, jnp.float32(0.0), selector=plan.selector)
    return cj.run_rounds(algorithm, dataset, state, jax.random.key(seed), num_rounds=num_rounds, selector=plan.selector)


def test_selectors_say_how_they_sample():
    assert cj.select.bernoulli(0.25, max_selected=3).sampling == PoissonSampling(0.25, 3)
    assert cj.select.bernoulli(1, max_selected=3).sampling == PoissonSampling(1.0, 3)
    assert cj.select.uniform(4).sampling == FixedSizeSampling(4)
    everybody = jnp.ones((1, N), bool)
    for selector in (
        cj.select.bernoulli(jnp.float32(0.25), max_selected=3),
        cj.select.bernoulli([0.25] * N, max_selected=3),
        cj.select.available(cj.select.bernoulli(0.25, max_selected=3), everybody),
        cj.select.available(cj.select.uniform(3), everybody),
        cj.select.weighted(3, jnp.ones(N)),
        cj.select.importance(3),
        cj.select.power_of_choice(2, 4, jnp.ones(N)),
        privacy.in_turns(cj.select.bernoulli(0.25, max_selected=3), 2),
    ):
        assert selector.sampling is None


def test_a_plan_is_what_the_accountant_says():
    plan = plan_of(places=N)
    told = accounting.epsilon(sampling_rate=0.4, noise_multiplier=2.0, num_rounds=30, delta=1e-3)
    assert plan.epsilon == told and plan.overflow_probability == 0
    assert plan.expected_cohort == pytest.approx(4.8) and plan.sampling_rate == 0.4 and plan.delta == 1e-3


def test_the_chance_of_an_overflow_is_paid_from_delta():
    plan = plan_of(probability=0.1, places=7)
    overflow = 30 * stats.binom.sf(6, N - 1, 0.1)
    assert plan.overflow_probability == pytest.approx(overflow, rel=1e-6)
    assert 1e-5 < overflow < 1e-3
    told = accounting.epsilon(sampling_rate=0.1, noise_multiplier=2.0, num_rounds=30, delta=1e-3 - overflow)
    assert plan.epsilon == pytest.approx(told, rel=1e-9)
    assert plan.epsilon > plan_of(probability=0.1, places=N).epsilon
    with pytest.raises(ValueError, match="delta must be above the chance that more clients are drawn.*max_selected"):
        plan_of(probability=0.1, places=3)


@pytest.mark.slow
def test_the_noise_can_be_calibrated():
    plan = plan_of(noise_multiplier=None, target_epsilon=1.5, num_rounds=4, probability=1.0)
    assert 1.5 * (1 - 1e-3) < plan.epsilon <= 1.5
    given = {"sampling_rate": 1.0, "num_rounds": 4, "delta": 1e-3}
    assert plan.noise_multiplier == accounting.calibrate_noise(target_epsilon=1.5, **given)
    by_rdp = plan_of(num_rounds=4, probability=1.0, accountant="rdp")
    assert by_rdp.epsilon > plan_of(num_rounds=4, probability=1.0).epsilon and by_rdp.accountant == "rdp"


def test_a_run_without_noise_is_the_sum_over_the_fixed_number():
    """Clients upload their number, clipped to 5; whoever was drawn counts once, also the one with two examples."""
    plan = plan_of(noise_multiplier=0.0, max_norm=5.0)
    assert plan.epsilon == math.inf
    state, history, _ = run(plan, upload_of(lambda data: data.examples[0]), 30, server=optax.scale(1.0))
    taken = np.where(history.weights > 0, np.minimum(history.client_id, 5), 0).sum()
    np.testing.assert_allclose(state.server.params, taken / 4.8, rtol=1e-5)
    assert state.selection.num_overflowed == 0


def test_the_update_estimates_the_mean_over_all_clients_without_bias():
    """Over Poisson cohorts and noise, by its standard error; dividing by those present would be another number."""
    plan = plan_of(probability=0.2, num_rounds=1, max_norm=20.0, noise_multiplier=0.1, delta=0.5)
    local = upload_of(lambda data: data.examples[0] ** 2 / 11)

    def one(key):
        algorithm = cj.federated_round(local, plan.aggregator)
        state = cj.init_run(algorithm, dataset, jnp.float32(0.0), selector=plan.selector)
        return cj.run_rounds(algorithm, dataset, state, key, num_rounds=1, selector=plan.selector)[0].server.params

    dataset = make_dataset()
    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 8192)), np.float64)
    mean = np.mean(np.arange(N) ** 2 / 11)
    assert abs(found.mean() - mean) < 4 * found.std() / np.sqrt(len(found))
    assert found.std() / np.sqrt(len(found)) < 0.02 * mean


def test_a_run_that_goes_on_for_too_long_tells_nothing_more():
    plan = plan_of(num_rounds=5)
    five, *_ = run(plan, upload_of(lambda data: 1.0), 5)
    nine, history, _ = run(plan, upload_of(lambda data: 1.0), 9)
    assert five.server.params == nine.server.params != 0
    assert history.info.server[0].ok.tolist() == [True] * 5 + [False] * 4


def test_a_run_without_the_selector_is_refused():
    plan = plan_of(probability=0.1, places=7)
    algorithm = cj.federated_round(upload_of(lambda data: 1.0), plan.aggregator)
    dataset = make_dataset()
    state = cj.init_run(algorithm, dataset, jnp.float32(0.0))
    with pytest.raises(ValueError, match="the 7 places of the plan's selector, got 12 rows.*selector=plan.selector"):
        cj.run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=1)


def test_an_adaptive_norm():
    plan = plan_of(max_norm=privacy.AdaptiveNorm(initial_norm=0.05, learning_rate=0.5))
    state, history, _ = run(plan, upload_of(lambda data: 2.0), 30)
    norms = history.info.server[0].max_norm
    assert norms[0] == np.float32(0.05) and norms[-1] > 0.2
    assert plan.epsilon == plan_of().epsilon


@pytest.mark.parametrize(
    "selector, message",
    [
        (
            cj.select.uniform(4),
            "must sample each client independently .Poisson.*fixed size 4.*takes another one's place",
        ),
        (cj.select.weighted(3, [1.0] * N), "law is not known before the run"),
        (cj.select.available(cj.select.bernoulli(0.5, max_selected=N), np.ones((1, N), bool)), "select.available"),
        (cj.select.bernoulli(0.5, max_selected=N + 1), "max_selected .* at most num_clients, got 13 and 12"),
    ],
)
def test_selectors_that_cannot_be_accounted_for_are_refused(selector, message):
    given = {"num_clients": N, "num_rounds": 3, "delta": 1e-3, "noise_multiplier": 1.0}
    with pytest.raises(ValueError, match=message):
        privacy.poisson_plan(selector, max_norm=1.0, **given)
    with pytest.raises(ValueError, match=message):
        privacy.epsilon_of(selector, **given)


def test_a_traced_probability_is_refused():
    def one(p):
        return privacy.epsilon_of(
            cj.select.bernoulli(p, max_selected=N), num_clients=N, num_rounds=1, delta=0.1, noise_multiplier=1.0
        )

    with pytest.raises(ValueError, match="a traced or unequal probability"):
        jax.jit(one)(0.5)


def test_other_errors():
    with pytest.raises(ValueError, match="exactly one of noise_multiplier and target_epsilon must be given"):
        plan_of(target_epsilon=1.0)
    with pytest.raises(ValueError, match="exactly one of noise_multiplier and target_epsilon must be given"):
        plan_of(noise_multiplier=None)
    with pytest.raises(TypeError, match="noise_multiplier must be a Python number in a plan"):
        plan_of(noise_multiplier=jnp.float32(1.0))
    with pytest.raises(ValueError, match="probability of the selector must be above 0"):
        plan_of(probability=0.0)
    with pytest.raises(ValueError, match="num_clients must be at least 1, got 0"):
        plan_of(num_clients=0)
    with pytest.raises(ValueError, match="delta must satisfy 0 < delta < 1, got 2.0"):
        plan_of(delta=2.0)


def test_an_overflow_is_as_rare_as_it_is_said_to_be():
    """Of those drawn beside one client, more than leave it a place."""
    p, places, rounds = 0.3, 5, 4_000
    selector = cj.select.bernoulli(p, max_selected=places)
    chance = privacy.overflow_probability(N, p, places, 1)

    def crowded(key):
        draws, _ = cj.select.bernoulli(p, max_selected=N).select(selector.init(N), key, jnp.arange(N) > 0)
        return (draws.weights > 0).sum() >= places

    seen = np.asarray(jax.vmap(crowded)(jax.random.split(jax.random.key(0), rounds)))
    assert abs(seen.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / rounds)
