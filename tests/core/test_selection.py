import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import LocalUpdate, Selection, Selector, Upload, init_run, run_rounds, take_selection
from cedarjax.core.dataset import ABSENT_ID

COUNTS = [3, 1, 4, 2, 5, 2]
N = len(COUNTS)
PARAMS = {"w": jnp.float32(0.0)}


def visit(shared, visits, data, key):
    """Half a step to the client's mean, with noise; counts the client's visits and tells its loss."""
    mask = jnp.arange(data.examples.shape[0], dtype=jnp.int32) < data.num_examples
    mean = jnp.where(mask, data.examples, 0).sum() / data.num_examples.astype(jnp.float32)
    noise = 0.01 * jax.random.normal(key, ())
    delta = jax.tree.map(lambda p: 0.5 * (p - mean) + noise, shared)
    return Upload(delta), visits + 1, {"loss": (shared["w"] - mean) ** 2}


LOCAL = LocalUpdate(lambda params: jnp.zeros((), jnp.int32), visit)


def read_loss(info):
    return info.local["loss"]


def make_dataset():
    values = np.random.default_rng(0).normal(size=sum(COUNTS)).astype(np.float32)
    return cj.data.federated_dataset(values, client_id=np.repeat(np.arange(N), COUNTS))


def make_algorithm(rate=0.5):
    return cj.federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(rate, momentum=0.9)))


def make_selector():
    trace = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    sizes = jnp.array(COUNTS, jnp.float32)
    return cj.select.available(cj.select.power_of_choice(2, 4, sizes, loss_fn=read_loss), trace)


def in_turn(weights):
    """A selector with a place for each weight: clients `r, r + 1, ...` in round `r`, with bad ids where nobody is."""

    def select(state, key, available):
        places = jnp.arange(len(weights), dtype=jnp.int32)
        w = jnp.asarray(weights, jnp.float32)
        ids = jnp.where(w > 0, (state["round"] + places) % available.shape[0], places % 2)
        return Selection(ids, w), {**state, "round": state["round"] + 1}

    def observe(state, selection, info):
        return {**state, "told": state["told"] + info.local["loss"].sum()}

    return Selector(lambda n: {"round": jnp.zeros((), jnp.int32), "told": jnp.zeros(())}, select, observe)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


def run(selector, num_rounds, *, key=None, state=None, **options):
    dataset, algorithm = make_dataset(), make_algorithm()
    state = init_run(algorithm, dataset, PARAMS, selector=selector) if state is None else state
    key = jax.random.key(3) if key is None else key
    return run_rounds(algorithm, dataset, state, key, num_rounds=num_rounds, selector=selector, **options)


def test_empty_places_are_absent_rows():
    selection = Selection(jnp.array([4, 0, 1, 99], jnp.int32), jnp.array([2.0, 0.0, 0.5, 1.0]))
    cohort = take_selection(make_dataset(), selection, byzantine=jnp.ones(N, bool))
    assert cohort.client_id.tolist() == [4, ABSENT_ID, 1, ABSENT_ID]
    assert cohort.weights.tolist() == [10.0, 0.0, 0.5, 0.0]
    assert cohort.data.num_examples.tolist() == [5, 0, 1, 0]
    assert cohort.byzantine.tolist() == [True, False, True, False]
    uniform = take_selection(make_dataset(), selection, weighting="uniform")
    assert uniform.weights.tolist() == [2.0, 0.0, 0.5, 0.0]


def test_a_weight_that_is_no_number_is_an_empty_place():
    selection = Selection(jnp.array([4, 2], jnp.int32), jnp.array([jnp.nan, -1.0]))
    cohort = take_selection(make_dataset(), selection)
    assert cohort.client_id.tolist() == [ABSENT_ID, ABSENT_ID] and cohort.weights.tolist() == [0.0, 0.0]


def test_weights_of_another_shape():
    with pytest.raises(ValueError, match=r"selection.weights must have the shape of selection.client_id, \(2,\)"):
        take_selection(make_dataset(), Selection(jnp.arange(2), jnp.ones(3)))


def test_a_run_is_its_rounds_one_after_another():
    """Against a Python loop over `select`, `step` and `observe`."""
    dataset, algorithm, selector = make_dataset(), make_algorithm(), make_selector()
    state, history, _ = run(selector, 6)
    server, visits, selecting = algorithm.init(PARAMS), np.zeros(N, np.int32), selector.init(N)
    for r in range(6):
        sample_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(3), r))
        selection, selecting = selector.select(selecting, sample_key, jnp.ones(N, bool))
        cohort = cj.core.take_clients(dataset, selection.client_id)
        cohort = cohort._replace(state=jnp.asarray(np.append(visits, 77))[np.minimum(cohort.client_id, N)])
        server, client_state, info = algorithm.step(server, cohort, step_key)
        selecting = selector.observe(selecting, selection, info)
        for i, w, new in zip(*map(np.asarray, (selection.client_id, selection.weights, client_state)), strict=True):
            if w > 0:
                visits[i] = new
        np.testing.assert_array_equal(history.client_id[r], cohort.client_id)
        np.testing.assert_array_equal(history.weights[r], cohort.weights)
    np.testing.assert_allclose(state.server.params["w"], server.params["w"], rtol=1e-5)
    np.testing.assert_array_equal(state.clients, visits)
    np.testing.assert_allclose(state.selection.inner.loss, selecting.inner.loss, rtol=1e-5)
    assert state.selection.round == 6


def test_places_multiply_weights_and_empty_ones_touch_no_state():
    """The empty place names client 0 or 1, whose state must stay."""
    state, history, _ = run(in_turn([2.0, 0.0, 0.5]), 2)
    assert history.client_id.tolist() == [[0, ABSENT_ID, 2], [1, ABSENT_ID, 3]]
    assert history.weights.tolist() == [[6.0, 0.0, 2.0], [2.0, 0.0, 1.0]]
    assert state.clients.tolist() == [1, 1, 1, 1, 0, 0]


def test_rounds_without_anybody_change_nothing_but_the_round():
    dataset = make_dataset()
    algorithm = cj.federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(0.5)))
    nobody = cj.select.available(cj.select.uniform(2), np.zeros((1, N), bool))
    start = init_run(algorithm, dataset, PARAMS, selector=nobody)
    state, history, _ = run_rounds(algorithm, dataset, start, jax.random.key(0), num_rounds=3, selector=nobody)
    assert_same_bits((state.server.params, state.clients), (start.server.params, start.clients))
    assert state.server.round == 3 and not history.weights.any()


@pytest.mark.parametrize("num_clients", [3, N])
def test_uniform_selection_is_what_num_clients_does(num_clients):
    dataset, algorithm, selector = make_dataset(), make_algorithm(), cj.select.uniform(num_clients)
    plain = run_rounds(
        algorithm,
        dataset,
        init_run(algorithm, dataset, PARAMS),
        jax.random.key(3),
        num_rounds=4,
        num_clients=num_clients,
    )
    assert_same_bits(run(selector, 4)[:2], plain[:2])


def test_a_run_without_a_selector_has_no_state_of_one():
    dataset, algorithm = make_dataset(), make_algorithm()
    start = init_run(algorithm, dataset, PARAMS)
    state, _, _ = run_rounds(algorithm, dataset, start, jax.random.key(0), num_rounds=1, num_clients=2)
    assert start.selection == state.selection == ()
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves((state.server, state.clients)))


def test_two_runs_of_k_are_one_of_two_k():
    selector = make_selector()
    middle, first, _ = run(selector, 3)
    end, second, _ = run(selector, 3, state=middle)
    whole, history, _ = run(selector, 6)
    assert_same_bits(end, whole)
    assert_same_bits(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), history)


def test_evaluation_changes_nothing():
    selector = make_selector()
    plain, history, _ = run(selector, 4)
    state, same, metrics = run(selector, 4, eval_fn=lambda params, key: params["w"], eval_every=2)
    assert_same_bits((state, same), (plain, history))
    assert metrics.shape == (2,)


def test_jit_and_no_jit_and_vmap_over_seeds():
    selector, keys = make_selector(), jax.random.split(jax.random.key(0), 3)
    alone = [run(selector, 4, key=key)[:2] for key in keys]
    compiled = jax.jit(lambda key: run(selector, 4, key=key)[:2])
    together = jax.jit(jax.vmap(lambda key: run(selector, 4, key=key)[:2]))(keys)
    for i, want in enumerate(alone):
        for got in (compiled(keys[i]), jax.tree.map(lambda x, i=i: x[i], together)):
            np.testing.assert_array_equal(got[1].client_id, want[1].client_id)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
    assert len({tuple(row) for row in np.asarray(together[1].client_id).reshape(3, -1).tolist()}) > 1


def test_the_state_can_be_donated_twice():
    dataset, algorithm, selector = make_dataset(), make_algorithm(), make_selector()
    step = jax.jit(
        lambda state: run_rounds(algorithm, dataset, state, jax.random.key(3), num_rounds=3, selector=selector)[0],
        donate_argnums=0,
    )
    state = step(step(init_run(algorithm, dataset, PARAMS, selector=selector)))
    np.testing.assert_array_equal(state.clients, run(selector, 6)[0].clients)


def test_donating_a_state_leaves_the_arrays_of_the_selector_alone():
    prior = jnp.arange(4.0)
    selector = cj.select.uniform(2)._replace(init=lambda num_clients: (prior, prior))
    dataset, algorithm = make_dataset(), make_algorithm()
    step = jax.jit(
        lambda state: run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=1, selector=selector)[0],
        donate_argnums=0,
    )
    state = step(init_run(algorithm, dataset, PARAMS, selector=selector))
    assert prior.tolist() == state.selection[0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_losses_of_plain_training_are_read_by_default():
    """`power_of_choice` with nothing but counts, on a local update of the library and on a streamed round."""
    dataset = make_dataset()
    local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(0.1), batch_size=1)
    selector = cj.select.power_of_choice(3, N)
    for algorithm in (
        cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0))),
        cj.streamed_round(local, optax.sgd(1.0)),
    ):
        state, history, _ = run_rounds(
            algorithm,
            dataset,
            init_run(algorithm, dataset, jnp.float32(0.0), selector=selector),
            jax.random.key(0),
            num_rounds=2,
            selector=selector,
        )
        np.testing.assert_array_equal(np.sort(history.client_id.ravel()), np.arange(N))  # first those never heard of
        told = np.full(N, np.inf, np.float32)
        told[history.client_id.ravel()] = history.info.local.loss.ravel()
        np.testing.assert_array_equal(state.selection.loss, told)


def test_num_clients_beside_a_selector():
    with pytest.raises(ValueError, match="num_clients must be None beside a selector, .*, got 3"):
        run(cj.select.uniform(2), 1, num_clients=3)


def test_a_selector_whose_state_is_not_in_the_run():
    dataset, algorithm = make_dataset(), make_algorithm()
    with pytest.raises(ValueError, match=r"state.selection must be the state of the selector, from init_run"):
        run(cj.select.power_of_choice(2, 3), 1, state=init_run(algorithm, dataset, PARAMS))


def test_a_selector_of_another_federation():
    dataset, algorithm, selector = make_dataset(), make_algorithm(), cj.select.power_of_choice(2, 3)
    state = init_run(algorithm, dataset, PARAMS)._replace(selection=selector.init(N + 1))
    with pytest.raises(ValueError, match=r"with the same dataset: expected .*float32\[6\].* got .*float32\[7\]"):
        run(selector, 1, state=state)
