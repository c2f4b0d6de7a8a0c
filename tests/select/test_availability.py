import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cedarjax as cj
from tests.select import select_oracles as oracles

TRACE = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
SELECTORS = {
    "uniform": lambda: cj.select.uniform(2),
    "weighted": lambda: cj.select.weighted(2, jnp.arange(1.0, 7.0)),
    "ranked": lambda: cj.select.ranked(2, jnp.array([1.0, 5.0, 2.0, 9.0, 4.0, 3.0])),
    "bernoulli": lambda: cj.select.bernoulli(1.0, 2),
    "power_of_choice": lambda: cj.select.power_of_choice(2, 5),
    "importance": lambda: cj.select.importance(2),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_rounds_follow_the_trace_and_start_over(name):
    selector = cj.select.available(SELECTORS[name](), TRACE)
    state = selector.init(6)
    for r in range(9):
        selection, state = selector.select(state, jax.random.key(r), oracles.everybody(6))
        ids, allowed = oracles.present(selection), np.flatnonzero(TRACE[r % 4]).tolist()
        assert set(ids) <= set(allowed) and len(ids) == min(2, len(allowed))
    assert state.round == 9


@pytest.mark.parametrize("name", SELECTORS)
def test_with_everybody_available_it_is_the_selector_itself(name):
    inner = SELECTORS[name]()
    key = jax.random.key(4)
    plain, _ = inner.select(inner.init(6), key, oracles.everybody(6))
    for masks in (np.ones((1, 6), bool), lambda r, key: oracles.everybody(6)):
        selector = cj.select.available(inner, masks)
        selection, _ = selector.select(selector.init(6), key, oracles.everybody(6))
        np.testing.assert_array_equal(selection.client_id, plain.client_id)


def test_those_available_are_ranked_by_their_score():
    selector = cj.select.available(SELECTORS["ranked"](), TRACE[:1])
    selection, _ = selector.select(selector.init(6), jax.random.key(0), oracles.everybody(6))
    assert selection.client_id.tolist() == [1, 2]


def test_a_drawn_mask_has_the_round_and_a_key_of_its_own():
    """Coins of the clients, and in odd rounds nobody."""

    def masks(r, key):
        return jax.random.bernoulli(key, 0.5, (3,)) & (r % 2 == 0)

    selector = cj.select.available(cj.select.uniform(3), masks)
    selection, state = oracles.draw(selector, 3, 8_000)
    chosen = [tuple(sorted(oracles.present(cj.Selection(*one)))) for one in zip(*selection, strict=True)]
    sets = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert oracles.chi_square(chosen, dict.fromkeys(sets, 1 / 8)) > 1e-3
    second, _ = oracles.draw(selector, 3, 20, state=jax.tree.map(lambda x: jnp.asarray(x[0]), state))
    assert not second.weights.any()


def test_two_traces_must_both_say_yes():
    first, second = np.array([[1, 1, 0, 1, 0, 0]], bool), np.array([[0, 1, 1, 1, 0, 0]], bool)
    selector = cj.select.available(cj.select.available(cj.select.uniform(6), first), second)
    selection, _ = selector.select(selector.init(6), jax.random.key(0), oracles.everybody(6))
    assert oracles.present(selection) == [1, 3]


def test_observations_reach_the_selector():
    selector = cj.select.available(cj.select.power_of_choice(2, 2, loss_fn=lambda info: info), TRACE)
    selection, state = selector.select(selector.init(6), jax.random.key(0), oracles.everybody(6))
    state = selector.observe(state, selection, jnp.array([0.5, 0.7]))
    assert [float(state.inner.loss[i]) for i in oracles.present(selection)] == pytest.approx([0.5, 0.7])
    assert state.round == 1


def test_the_trace_may_be_traced():
    def select(trace):
        selector = cj.select.available(cj.select.uniform(2), trace)
        return selector.select(selector.init(6), jax.random.key(0), oracles.everybody(6))[0]

    swept = jax.jit(jax.vmap(select))(jnp.asarray(TRACE)[:, None, :])
    assert swept.weights.sum(1).tolist() == [2.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (np.ones(6, bool), ValueError, r"masks must have shape \[P, N\] with P >= 1, got \(6,\)"),
        (np.ones((0, 6), bool), ValueError, r"with P >= 1, got \(0, 6\)"),
        (np.ones((2, 5), bool), ValueError, r"masks must have shape \[N\] = \[6\], got \(5,\)"),
        (np.ones((2, 6), np.float32), TypeError, "masks must be bool, got float32"),
    ],
)
def test_what_is_refused(masks, error, message):
    with pytest.raises(error, match=message):
        selector = cj.select.available(cj.select.uniform(2), masks)
        selector.select(selector.init(6), jax.random.key(0), oracles.everybody(6))
