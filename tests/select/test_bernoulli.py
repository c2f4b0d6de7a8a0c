import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import cedarjax as cj
from tests.select import select_oracles as oracles


def inclusion(probabilities):
    """`{set of ids: probability}` of independent coins."""
    found = {}
    for coins in itertools.product([False, True], repeat=len(probabilities)):
        p = np.prod([q if coin else 1 - q for q, coin in zip(probabilities, coins, strict=True)])
        if p > 0:
            found[tuple(i for i, coin in enumerate(coins) if coin)] = p
    return found


def sets(selection):
    ids = [oracles.present(cj.Selection(*one)) for one in zip(*selection, strict=True)]
    return [tuple(sorted(row)) for row in ids]


@pytest.mark.parametrize("probability", [0.3, [0.1, 0.5, 0.9, 0.25]])
def test_clients_are_drawn_independently(probability):
    """Against the distribution of whole cohorts, so that dependence would be noticed and not only wrong rates."""
    p = jnp.asarray(probability, jnp.float32)
    selection, state = oracles.draw(cj.select.bernoulli(p, max_selected=4), 4, 30_000)
    assert oracles.chi_square(sets(selection), inclusion(np.broadcast_to(probability, 4))) > 1e-3
    assert not state.num_overflowed.any() and not state.num_dropped.any()


def test_the_sum_over_a_fixed_number_is_unbiased():
    values, p = np.array([1.0, -3.0, 10.0, 2.0, 5.0]), 0.4
    selection, _ = oracles.draw(cj.select.bernoulli(p, max_selected=5), 5, 20_000)
    taken = np.where(selection.weights > 0, values[np.minimum(selection.client_id, 4)], 0)
    estimates = (taken * selection.weights).sum(1) / (p * 5)
    assert abs(estimates.mean() - values.mean()) < 4 * estimates.std() / np.sqrt(len(estimates))


def test_always_never_and_only_those_available():
    p, available = [0.0, 1.0, 1.0, 0.5], [True, True, False, False]
    selection, _ = oracles.draw(cj.select.bernoulli(jnp.array(p), max_selected=3), 4, 2_000, available=available)
    assert set(sets(selection)) == {(1,)}


def test_an_overflow_is_a_random_subset_and_is_counted():
    """Of those drawn each is as likely to stay, whatever its probability and its id."""
    probabilities = [0.9, 0.3, 0.6, 0.9]
    selection, state = oracles.draw(cj.select.bernoulli(jnp.array(probabilities), max_selected=2), 4, 30_000)
    exact = {}
    for members, p in inclusion(probabilities).items():
        subsets = list(itertools.combinations(members, min(2, len(members))))
        for subset in subsets:
            exact[subset] = exact.get(subset, 0) + p / len(subsets)
    assert oracles.chi_square(sets(selection), exact) > 1e-3
    sizes = {s: sum(p for members, p in inclusion(probabilities).items() if len(members) == s) for s in range(5)}
    assert (
        oracles.chi_square(state.num_dropped.tolist(), {0: sizes[0] + sizes[1] + sizes[2], 1: sizes[3], 2: sizes[4]})
        > 1e-3
    )
    np.testing.assert_array_equal(state.num_overflowed, state.num_dropped > 0)


def test_overflows_add_up_over_rounds():
    selector = cj.select.bernoulli(1.0, max_selected=1)
    state = selector.init(4)
    for r in range(3):
        _, state = selector.select(state, jax.random.key(r), oracles.everybody(4))
    _, state = selector.select(state, jax.random.key(9), jnp.array([True, False, False, False]))
    assert (int(state.num_overflowed), int(state.num_dropped)) == (3, 9)


@given(
    num_clients=st.integers(1, 300),
    probability=st.floats(0, 1),
    failure_probability=st.floats(1e-12, 1.0),
    num_rounds=st.integers(1, 1000),
)
def test_the_size_is_a_quantile_of_the_binomial(num_clients, probability, failure_probability, num_rounds):
    size = cj.select.bernoulli_size(
        num_clients, probability, failure_probability=failure_probability, num_rounds=num_rounds
    )
    binomial, allowed = stats.binom(num_clients, probability), failure_probability / num_rounds
    assert 1 <= size <= num_clients
    assert binomial.sf(size) <= allowed * (1 + 1e-9)
    assert size == 1 or binomial.sf(size - 1) > allowed * (1 - 1e-5)


def test_the_size_for_many_clients():
    binomial = stats.binom(1_000_000, 1e-3)
    size = cj.select.bernoulli_size(1_000_000, 1e-3, failure_probability=1e-6)
    assert binomial.sf(size) <= 1e-6 < binomial.sf(size - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 0, "probability": 0.1}, "num_clients must be at least 1, got 0"),
        ({"num_clients": 5, "probability": 1.5}, "probability must satisfy 0 <= probability <= 1, got 1.5"),
        (
            {"num_clients": 5, "probability": 0.5, "failure_probability": 0.0},
            "failure_probability must satisfy 0 < failure_probability <= 1, got 0.0",
        ),
        ({"num_clients": 5, "probability": 0.5, "num_rounds": 0}, "num_rounds must be at least 1, got 0"),
    ],
)
def test_sizes_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        cj.select.bernoulli_size(**options)
