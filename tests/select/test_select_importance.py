import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cedarjax as cj
from tests.select import select_oracles as oracles

SIGNAL = np.array([4.0, 1.0, 0.0, 3.0])


def probabilities(signal, available, share):
    """In float64 from the formula, client by client."""
    known = [s for s, a in zip(signal, available, strict=True) if a and np.isfinite(s)]
    mean = np.mean([max(s, 0) for s in known]) if known else 0.0
    value = [(max(s, 0) if np.isfinite(s) else mean) if a else 0.0 for s, a in zip(signal, available, strict=True)]
    total, count = sum(value), max(sum(available), 1)
    uniform = [a / count for a in available]
    by_signal = [v / total for v in value] if total > 0 else uniform
    return np.array([(1 - share) * b + share * u for b, u in zip(by_signal, uniform, strict=True)])


def observed(selector, signal=SIGNAL):
    everyone = cj.Selection(jnp.arange(len(signal), dtype=jnp.int32), jnp.ones(len(signal)))
    return selector.observe(selector.init(len(signal)), everyone, jnp.asarray(signal, jnp.float32))


def importance(*args, **kwargs):
    return cj.select.importance(*args, signal_fn=lambda info: info, **kwargs)


@given(data=st.data(), num_clients=st.integers(1, 6), share=st.floats(0, 1))
def test_probabilities_by_the_formula(data, num_clients, share):
    # XLA flushes subnormal numbers to zero.
    values = st.one_of(st.floats(0, 100, width=32, allow_subnormal=False), st.sampled_from([-1.0, 0.0, np.inf, np.nan]))
    signal = data.draw(st.lists(values, min_size=num_clients, max_size=num_clients))
    available = data.draw(st.lists(st.booleans(), min_size=num_clients, max_size=num_clients))
    got = cj.select.importance_probabilities(jnp.array(signal, jnp.float32), jnp.array(available), share)
    np.testing.assert_allclose(got, probabilities(signal, available, share), rtol=1e-4, atol=1e-6)


def test_signals_near_the_end_of_float32_do_not_overflow():
    got = cj.select.importance_probabilities(jnp.full(4, 3e38), oracles.everybody(4), 0.0)
    np.testing.assert_allclose(got, 0.25)


def test_successive_sampling_by_default():
    selector = importance(2, uniform_share=0.2)
    selection, _ = oracles.draw(selector, 4, 20_000, state=observed(selector))
    exact = oracles.sequential(probabilities(SIGNAL, [True] * 4, 0.2), 2)
    assert oracles.chi_square(oracles.rows(selection.client_id), exact) > 1e-3
    assert (selection.weights == 1).all()


def test_clients_that_were_never_heard_of_are_average():
    selector = importance(1, uniform_share=0.0)
    state = selector.observe(
        selector.init(3), cj.Selection(jnp.array([0, 1], jnp.int32), jnp.ones(2)), jnp.array([3.0, 1.0])
    )
    selection, _ = oracles.draw(selector, 3, 10_000, state=state)
    assert oracles.chi_square(oracles.rows(selection.client_id), {(0,): 3 / 6, (1,): 1 / 6, (2,): 2 / 6}) > 1e-3
    selection, _ = oracles.draw(selector, 3, 10_000)
    assert oracles.chi_square(oracles.rows(selection.client_id), dict.fromkeys([(0,), (1,), (2,)], 1 / 3)) > 1e-3


def multinomial(p, num_draws):
    """`{((id, times), ...): probability}` of draws with replacement, by enumeration."""
    found = {}
    for draws in itertools.product(range(len(p)), repeat=num_draws):
        counts = tuple((i, draws.count(i)) for i in range(len(p)) if i in draws)
        found[counts] = found.get(counts, 0) + np.prod(p[list(draws)])
    return {counts: q for counts, q in found.items() if q > 0}


def test_unbiased_cohorts_are_merged_draws_with_the_weights_of_the_formula():
    selector, p = importance(3, uniform_share=0.5, unbiased=True), probabilities(SIGNAL, [True] * 4, 0.5)
    selection, _ = oracles.draw(selector, 4, 20_000, state=observed(selector))
    outcomes = []
    for one in zip(*selection, strict=True):
        ids, weights = oracles.present(cj.Selection(*one)), one[1][one[1] > 0]
        times = weights * 4 * p[ids]
        np.testing.assert_allclose(times, np.round(times), rtol=1e-5)
        outcomes.append(tuple(zip(ids, np.round(times).astype(int).tolist(), strict=True)))
        assert len(set(ids)) == len(ids)
    exact = multinomial(p, 3)
    assert sum(exact.values()) == pytest.approx(1) and oracles.chi_square(outcomes, exact) > 1e-3


@pytest.mark.parametrize("available", [[True] * 4, [True, True, False, True]])
def test_the_weights_are_unbiased(available):
    """By enumeration of all draws: the expectation of `1/C sum_i weight_i x_i` is the mean over those available."""
    selector, p, x = (
        importance(2, uniform_share=0.3, unbiased=True),
        probabilities(SIGNAL, available, 0.3),
        SIGNAL**2 - 5,
    )
    selection, _ = oracles.draw(selector, 4, 5_000, state=observed(selector), available=available)
    estimate_of = {}
    for one in zip(*selection, strict=True):
        ids, weights = oracles.present(cj.Selection(*one)), one[1][one[1] > 0].astype(np.float64)
        counts = tuple((i, round(float(w * sum(available) * p[i]))) for i, w in zip(ids, weights, strict=True))
        estimate_of[counts] = (weights * x[ids]).sum() / 2
    exact = multinomial(p, 2)
    assert set(estimate_of) == set(exact)  # every possible cohort came up
    expectation = sum(exact[counts] * estimate for counts, estimate in estimate_of.items())
    assert expectation == pytest.approx(x[np.array(available)].mean(), rel=1e-5)


def test_the_weights_are_unbiased_in_the_mean_of_many_draws():
    x, selector = np.random.default_rng(0).normal(size=50), importance(10, uniform_share=0.1, unbiased=True)
    state = observed(selector, np.abs(x) + 0.01)
    selection, _ = oracles.draw(selector, 50, 20_000, state=state)
    estimates = (selection.weights * x[np.minimum(selection.client_id, 49)]).sum(1) / 10
    assert abs(estimates.mean() - x.mean()) < 4 * estimates.std() / np.sqrt(len(estimates))
    totals = selection.weights.sum(1)
    assert abs(totals.mean() - 10) < 4 * totals.std() / np.sqrt(len(totals))


def test_a_share_bounds_the_weight_of_a_single_draw():
    selector = importance(1, uniform_share=0.25, unbiased=True)
    selection, _ = oracles.draw(selector, 4, 2_000, state=observed(selector))
    assert selection.weights.max() == pytest.approx(4.0)  # client 2, whose signal is 0


def test_rare_clients_among_many_have_their_exact_probability():
    """One client in 100,000 holds half of the signal; float32 sums of the others would have lost digits."""
    signal = np.ones(100_000, np.float32)
    signal[7] = 99_999.0
    p = cj.select.importance_probabilities(jnp.asarray(signal), oracles.everybody(100_000), 0.0)
    draws = jax.vmap(lambda key: cj.select.merged_draws(key, p, 50))(jax.random.split(jax.random.key(0), 200))
    client_id, times, probability = jax.tree.map(np.asarray, draws)
    of_seven = times[client_id == 7].sum()
    assert times.sum() == 10_000 and abs(of_seven - 5_000) < 4 * 50
    rare = probability[(times > 0) & (client_id != 7)]
    np.testing.assert_allclose(rare, 1 / 199_998, rtol=1e-3)
    parts = np.repeat(client_id[(times > 0) & (client_id != 7)] // 10_000, times[(times > 0) & (client_id != 7)])
    assert oracles.chi_square(parts.tolist(), dict.fromkeys(range(10), 0.1)) > 1e-3


@pytest.mark.parametrize("unbiased", [False, True])
def test_nobody_available(unbiased):
    selector = importance(2, unbiased=unbiased)
    selection, _ = selector.select(observed(selector), jax.random.key(0), jnp.zeros(4, bool))
    assert oracles.present(selection) == [] and selection.weights.tolist() == [0.0, 0.0]
