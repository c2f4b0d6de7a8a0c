import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import cedarjax as cj
from tests.select import select_oracles as oracles


@given(data=st.data(), num_clients=st.integers(1, 8))
def test_a_stable_sort_of_those_available(data, num_clients):
    """With many ties, both zeros, infinities and NaN."""
    values = st.sampled_from([-1.5, -0.0, 0.0, 1.0, 2.0, np.inf, -np.inf, np.nan])
    scores = np.array(data.draw(st.lists(values, min_size=num_clients, max_size=num_clients)), np.float32)
    available = np.array(data.draw(st.lists(st.booleans(), min_size=num_clients, max_size=num_clients)))
    num_selected = data.draw(st.integers(1, num_clients))
    selection, _ = cj.select.ranked(num_selected, scores).select((), jax.random.key(0), jnp.asarray(available))
    possible = [i for i in range(num_clients) if available[i] and not np.isnan(scores[i]) and scores[i] != -np.inf]
    want = sorted(possible, key=lambda i: (-float(scores[i]), i))[:num_selected]
    assert oracles.present(selection) == want
    assert selection.weights.tolist() == [1.0] * len(want) + [0.0] * (num_selected - len(want))


def test_both_zeros_are_equal():
    scores = jnp.array([-0.0, 0.0, -0.0, 0.0, -1.0])
    selection = cj.select.highest(scores, oracles.everybody(5), 3)
    assert selection.client_id.tolist() == [0, 1, 2]


def test_integer_scores():
    selection, _ = cj.select.ranked(2, jnp.array([3, 9, 9, 1])).select((), jax.random.key(0), oracles.everybody(4))
    assert selection.client_id.tolist() == [1, 2]


def test_empty_places_are_the_last_and_name_nobody():
    selection = cj.select.fill_places(jnp.array([3, 4, 5]), jnp.array([0.5, 0.0, 2.0]))
    assert selection.client_id.tolist() == [3, cj.core.dataset.ABSENT_ID, 5]
    assert selection.weights.tolist() == [0.5, 0.0, 2.0]
