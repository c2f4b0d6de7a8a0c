import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import cedarjax as cj
from tests.select import select_oracles as oracles


@pytest.mark.parametrize(
    ("weights", "num_selected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 2),
        ([0.5, 2.0, 1.0, 4.0], 3),
        ([1.0, 2.0, 4.0, 2.0, 3.0], 2),
        ([2.0, 1.0, 1.0, 3.0, 2.0], 3),
    ],
)
def test_the_exact_distribution_of_successive_sampling(weights, num_selected):
    """Ordered, so that every single draw is tested and not only who is in the end among those chosen."""
    selection, _ = oracles.draw(cj.select.weighted(num_selected, jnp.array(weights)), len(weights), 30_000)
    exact = oracles.sequential(weights, num_selected)
    assert sum(exact.values()) == pytest.approx(1)
    assert oracles.chi_square(oracles.rows(selection.client_id), exact) > 1e-3


def test_chi_square_would_notice_other_weights():
    selection, _ = oracles.draw(cj.select.weighted(2, jnp.array([1.0, 2.0, 3.0, 4.4])), 4, 30_000)
    exact = oracles.sequential([1.0, 2.0, 3.0, 4.0], 2)
    assert oracles.chi_square(oracles.rows(selection.client_id), exact) < 1e-6


def test_successive_sampling_among_those_available():
    weights, available = [1.0, 5.0, 2.0, 3.0], [True, False, True, True]
    selection, _ = oracles.draw(cj.select.weighted(2, jnp.array(weights)), 4, 10_000, available=available)
    exact = oracles.sequential([1.0, 0.0, 2.0, 3.0], 2)
    assert oracles.chi_square(oracles.rows(selection.client_id), exact) > 1e-3


def test_clients_without_weight_are_never_chosen_even_if_places_stay_empty():
    weights = jnp.array([0.0, 1.0, -2.0, 3.0, jnp.nan])
    selection, _ = oracles.draw(cj.select.weighted(4, weights), 5, 50)
    assert {tuple(sorted(row[:2])) for row in oracles.rows(selection.client_id)} == {(1, 3)}
    np.testing.assert_array_equal(selection.weights, np.tile([1.0, 1.0, 0.0, 0.0], (50, 1)))
    assert (selection.client_id[:, 2:] == cj.core.dataset.ABSENT_ID).all()


@given(scale=st.floats(1e-30, 1e30), seed=st.integers(0, 2**31 - 1))
def test_the_scale_of_the_weights_does_not_matter(scale, seed):
    weights, key = np.array([1.0, 2.0, 4.0, 8.0, 0.5, 3.0]), jax.random.key(seed)
    scores = cj.select.gumbel_scores(key, jnp.asarray(weights, jnp.float32))
    scaled = cj.select.gumbel_scores(key, jnp.asarray(weights * scale, jnp.float32))
    np.testing.assert_allclose(scaled - jnp.float32(np.log(scale)), scores, atol=2e-5)


def test_scores_are_log_weights_and_standard_gumbel_noise():
    weights = jnp.array([3.0, 1.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    scores = np.asarray(jax.vmap(lambda key: cj.select.gumbel_scores(key, weights))(keys), np.float64)
    for column, weight in zip(scores.T, [3.0, 1.0], strict=True):
        assert stats.kstest(column - np.log(weight), stats.gumbel_r.cdf).pvalue > 1e-3


def test_the_best_of_many_rarely_tie():
    """The 1000 best of 400,000: with the 23 random bits of a float32 more than twenty would."""
    scores = np.asarray(cj.select.gumbel_scores(jax.random.key(0), jnp.ones(400_000)))
    assert len(set(np.sort(scores)[-1000:].tolist())) >= 997


def test_draws_are_inside_the_unit_interval_and_uniform():
    draws = np.asarray(cj.select.open_uniform(jax.random.key(0), 100_000))
    assert 0 < draws.min() < 1e-4 and 1 - 1e-4 < draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_weights_may_be_traced_and_vmapped():
    weights, key = jnp.array([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]), jax.random.key(0)

    def select(w):
        return cj.select.weighted(2, w).select((), key, oracles.everybody(3))[0].client_id

    swept = jax.jit(jax.vmap(select))(weights)
    assert [sorted(row) for row in swept.tolist()] == [[0, 2], [1, 2]]
    np.testing.assert_array_equal(swept, [select(w) for w in weights])
