import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from tests.local import local_oracles as oracles

RATE = 0.2
SERVER = optax.chain(cj.robust.mean(), optax.sgd(1.0))


def build(**options):
    options = {"batch_size": 2, "num_epochs": 2, "participation": oracles.PARTICIPATION} | options
    return cj.local.scaffold(oracles.loss_fn, RATE, **options)


@pytest.mark.parametrize("stragglers", [False, True])
def test_rounds_follow_the_paper(stragglers):
    _, xs, ys = oracles.federation()
    _, x = oracles.start()
    c, controls = np.zeros(4), np.zeros((oracles.NUM_CLIENTS, 4))
    local = build(num_steps_fn=oracles.half if stragglers else None)
    for r, ids, _, shared, states, info in oracles.rounds(local, SERVER):
        moves, changes = [], []
        for place, i in enumerate(ids):
            count = oracles.COUNTS[i]
            steps = count // 2 if stragglers else None
            batches = oracles.rows_of(oracles.client_key(r, i), count, 2, 2, steps)
            y = x.copy()
            for rows in batches:
                y = y - RATE * (oracles.gradient(y, xs[i], ys[i], rows) - controls[i] + c)
            new = controls[i] - c + (x - y) / (len(batches) * RATE) if batches else controls[i]
            moves.append(y - x)
            changes.append(new - controls[i])
            controls[i] = new
            assert info.local.num_steps[place] == len(batches)
        x = x + np.mean(moves, axis=0)
        c = c + len(ids) / oracles.NUM_CLIENTS * np.mean(changes, axis=0)
        np.testing.assert_allclose(oracles.flat(shared.params), x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(oracles.flat(shared.control), c, rtol=1e-4, atol=1e-5)
        for i in range(oracles.NUM_CLIENTS):
            own = oracles.flat(jax.tree.map(lambda leaf, i=i: leaf[i], states.control))
            np.testing.assert_allclose(own, controls[i], rtol=1e-4, atol=1e-5)


def test_the_servers_control_is_the_mean_of_the_clients():
    for *_, shared, states, _ in oracles.rounds(build(), SERVER):
        jax.tree.map(
            lambda c, own: np.testing.assert_allclose(c, np.mean(own, axis=0), atol=1e-5),
            shared.control,
            states.control,
        )


def test_a_control_is_the_mean_of_the_gradients_taken():
    """Option II says so: with gradients that do not depend on the parameters it is their mean, whatever came before."""
    local = cj.local.scaffold(lambda w, x, key: w * jnp.mean(x), 0.5, batch_size=1, num_epochs=2)
    data = cj.ClientData(jnp.array([1.0, 2.0, 6.0]), jnp.int32(3), jnp.int32(0))
    shared = cj.local.ScaffoldShared(jnp.float32(1.0), jnp.float32(-7.0))
    _, state, _ = local.update(shared, cj.local.ScaffoldState(jnp.float32(5.0)), data, jax.random.key(0))
    np.testing.assert_allclose(state.control, 3.0, rtol=1e-5)


def test_it_reaches_the_optimum_where_averaging_does_not():
    options = {"batch_size": 1, "num_epochs": 10}
    plain = oracles.two_quadratics(lambda loss: cj.local.sgd(loss, optax.sgd(0.1), **options), SERVER)
    corrected = oracles.two_quadratics(lambda loss: cj.local.scaffold(loss, 0.1, **options), SERVER)
    assert abs(plain - 4.0) > 0.5
    np.testing.assert_allclose(corrected, 4.0, atol=1e-4)


def test_the_first_round_is_sgd():
    data = jax.tree.map(lambda x: x[0], oracles.federation()[0])
    params, key = oracles.start()[0], jax.random.key(1)
    plain = cj.local.sgd(oracles.loss_fn, optax.sgd(RATE), batch_size=2, num_epochs=2)
    want, _, _ = plain.update(params, (), data, key)
    local = build()
    got, _, _ = local.update(local.share(params), local.init(params), data, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got.delta.params, want.delta)


def test_another_optimiser_for_the_parameters_alone():
    labels = cj.local.ScaffoldShared("params", "control")
    momentum = optax.partition({"params": optax.sgd(0.5, momentum=0.9), "control": optax.sgd(1.0)}, labels)
    one, velocity = build(), np.zeros(4)
    before, x = np.zeros(4), oracles.start()[1]
    for r, _, _, shared, states, _ in oracles.rounds(one, optax.chain(cj.robust.mean(), momentum)):
        mean = np.mean([oracles.flat(jax.tree.map(lambda leaf, i=i: leaf[i], states.control)) for i in range(4)], 0)
        np.testing.assert_allclose(oracles.flat(shared.control), mean, atol=1e-5)
        if r == 0:  # with controls of 0 a round's pseudo-gradient is that of plain averaging
            plain = cj.local.sgd(oracles.loss_fn, optax.sgd(RATE), batch_size=2, num_epochs=2)
            after = oracles.flat(next(oracles.rounds(plain, SERVER))[3])
            velocity = 0.9 * velocity + (x - after)
            np.testing.assert_allclose(oracles.flat(shared.params), x - 0.5 * velocity, rtol=1e-5)
        assert not np.allclose(oracles.flat(shared.control), before)
        before = oracles.flat(shared.control)


def test_a_streamed_round_is_the_same_round():
    data, _, _ = oracles.federation()
    params, local = oracles.start()[0], build()
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *jnp.shape(x))), local.init(params))
    cohort = oracles.cohort_of(data, range(4), states)
    whole = cj.federated_round(local, SERVER)
    stream = cj.streamed_round(local, optax.sgd(1.0), chunk_size=2)
    want, want_states, _ = whole.step(whole.init(params), cohort, jax.random.key(0))
    got, got_states, _ = stream.step(stream.init(params), cohort, jax.random.key(0))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, (got.params, got_states), (want.params, want_states))


def test_rates_can_be_swept():
    data = jax.tree.map(lambda x: x[0], oracles.federation()[0])
    params, key = oracles.start()[0], jax.random.key(1)

    def upload(rate, participation):
        local = cj.local.scaffold(oracles.loss_fn, rate, batch_size=2, participation=participation)
        return local.update(local.share(params), local.init(params), data, key)[0].delta

    swept = jax.vmap(upload)(jnp.array([0.1, 0.3]), jnp.array([1.0, 0.5]))
    for i, pair in enumerate([(0.1, 1.0), (0.3, 0.5)]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-5), swept, upload(*pair))


@pytest.mark.slow
def test_laws():
    oracles.check_laws(build(num_steps_fn=oracles.half))


@pytest.mark.parametrize(
    ("rate", "options", "message"),
    [
        (0.0, {}, "learning_rate must be above 0, got 0.0"),
        (0.1, {"participation": 0.0}, "participation must satisfy 0 < participation <= 1, got 0.0"),
        (0.1, {"participation": 1.5}, "participation must satisfy 0 < participation <= 1, got 1.5"),
        (0.1, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(rate, options, message):
    with pytest.raises(ValueError, match=message):
        cj.local.scaffold(oracles.loss_fn, rate, **({"batch_size": 2} | options))
