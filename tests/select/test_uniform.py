import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cedarjax as cj
from tests.select import select_oracles as oracles


@pytest.mark.parametrize(("num_clients", "num_selected"), [(5, 1), (5, 2), (4, 3)])
def test_every_ordered_cohort_is_equally_likely(num_clients, num_selected):
    selection, _ = oracles.draw(cj.select.uniform(num_selected), num_clients, 20_000)
    orders = list(itertools.permutations(range(num_clients), num_selected))
    exact = dict.fromkeys(orders, 1 / math.perm(num_clients, num_selected))
    assert oracles.chi_square(oracles.rows(selection.client_id), exact) > 1e-3
    assert (selection.weights == 1).all()


def test_it_is_uniform_over_those_available():
    available = [True, False, True, True, False]
    selection, _ = oracles.draw(cj.select.uniform(2), 5, 10_000, available=available)
    exact = dict.fromkeys(itertools.permutations([0, 2, 3], 2), 1 / 6)
    assert oracles.chi_square(oracles.rows(selection.client_id), exact) > 1e-3


@pytest.mark.parametrize("num_selected", [3, 7])
def test_the_cohorts_of_sample_cohort(num_selected):
    dataset = cj.data.federated_dataset(np.zeros(7, np.float32), client_id=np.arange(7))
    for seed in range(5):
        key = jax.random.key(seed)
        selection, _ = cj.select.uniform(num_selected).select((), key, oracles.everybody(7))
        want = cj.core.sample_cohort(key, dataset, num_selected).client_id
        np.testing.assert_array_equal(selection.client_id, want)


def test_all_who_are_available_in_the_order_of_their_ids():
    selection, _ = cj.select.uniform(4).select((), jax.random.key(0), jnp.array([True, False, True, True]))
    assert oracles.present(selection) == [0, 2, 3]


def test_among_many_clients_none_is_chosen_twice_or_more_than_the_others():
    """Ten clients of 50,000: ids are spread evenly over ten equal parts of the federation."""
    selection, _ = oracles.draw(cj.select.uniform(10), 50_000, 100)
    assert all(len(set(row)) == 10 for row in oracles.rows(selection.client_id))
    parts = (selection.client_id // 5_000).ravel().tolist()
    assert oracles.chi_square(parts, dict.fromkeys(range(10), 0.1)) > 1e-3
