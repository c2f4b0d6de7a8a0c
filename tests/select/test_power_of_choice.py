import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cedarjax as cj
from tests.select import select_oracles as oracles

WEIGHTS = jnp.array([3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 0.0])


def told(info):
    return info["loss"]


@pytest.mark.parametrize("num_candidates", [2, 4, 7])
def test_several_rounds_against_a_plain_loop(num_candidates):
    """Candidates as `weighted` draws them; what is done with them is written with a dictionary and a sort."""
    selector = cj.select.power_of_choice(2, num_candidates, WEIGHTS, loss_fn=told)
    state, known, rng = selector.init(7), {}, np.random.default_rng(0)
    draw_candidates = cj.select.weighted(num_candidates, WEIGHTS).select
    for r in range(8):
        key = jax.random.key(r)
        candidates = oracles.present(draw_candidates((), key, oracles.everybody(7))[0])
        want = sorted(candidates, key=lambda i: -known.get(i, np.inf))[:2]  # stable: among equals the first drawn
        selection, state = selector.select(state, key, oracles.everybody(7))
        assert oracles.present(selection) == want and selection.weights.tolist() == [1.0, 1.0]
        losses = rng.uniform(0.1, 3, 2).astype(np.float32)
        state = selector.observe(state, selection, {"loss": jnp.asarray(losses)})
        known.update(zip(want, losses.tolist(), strict=True))
        np.testing.assert_array_equal(state.loss, np.array([known.get(i, np.inf) for i in range(7)], np.float32))
    assert len(known) >= 3


def test_how_often_the_highest_loss_is_drawn():
    """Two of four candidates: the exact distribution, by enumeration of the candidates."""
    weights, loss = [1.0, 2.0, 3.0, 4.0], np.array([0.4, 0.9, 0.1, 0.2])
    selector = cj.select.power_of_choice(1, 2, jnp.array(weights), loss_fn=told)
    everyone = cj.Selection(jnp.arange(4, dtype=jnp.int32), jnp.ones(4))
    state = selector.observe(selector.init(4), everyone, {"loss": jnp.asarray(loss, jnp.float32)})
    exact = {}
    for pair, p in oracles.sequential(weights, 2).items():
        winner = (max(pair, key=lambda i: loss[i]),)
        exact[winner] = exact.get(winner, 0) + p
    selection, _ = oracles.draw(selector, 4, 20_000, state=state)
    assert oracles.chi_square(oracles.rows(selection.client_id), exact) > 1e-3


def test_as_many_candidates_as_places_is_weighted_sampling():
    key = jax.random.key(0)
    ours, _ = (s := cj.select.power_of_choice(3, 3, WEIGHTS)).select(s.init(7), key, oracles.everybody(7))
    plain, _ = cj.select.weighted(3, WEIGHTS).select((), key, oracles.everybody(7))
    assert sorted(ours.client_id.tolist()) == sorted(plain.client_id.tolist())


def test_too_few_candidates_leave_places_empty():
    selector = cj.select.power_of_choice(3, 5, WEIGHTS)
    available = jnp.array([False, True, False, False, True, False, True])  # the last one has no weight
    selection, _ = selector.select(selector.init(7), jax.random.key(0), available)
    assert sorted(oracles.present(selection)) == [1, 4]


def test_only_finite_losses_of_those_present_are_heard():
    selector = cj.select.power_of_choice(4, 4, loss_fn=told)
    everyone = cj.Selection(jnp.arange(4, dtype=jnp.int32), jnp.ones(4))
    state = selector.observe(selector.init(4), everyone, {"loss": jnp.array([1.0, 2.0, 3.0, 4.0])})
    heard = cj.Selection(jnp.array([2, 0, 1, -1], jnp.int32), jnp.array([1.0, 0.0, 1.0, 1.0]))
    state = selector.observe(state, heard, {"loss": jnp.array([9.0, 8.0, jnp.nan, 7.0])})
    assert state.loss.tolist() == [1.0, 2.0, 9.0, 4.0]


def test_a_loss_of_the_wrong_shape():
    selector = cj.select.power_of_choice(2, 3, loss_fn=told)
    with pytest.raises(ValueError, match=r"one number a place, shape \(2,\), got \(\)"):
        selector.observe(selector.init(4), cj.Selection(jnp.arange(2), jnp.ones(2)), {"loss": jnp.float32(1.0)})
