import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.personal import ditto, fedper
from tests.personal import personal_oracles as oracles

RATE, LAM = 0.2, 0.7


def shared_update(num_epochs=1):
    return cj.local.sgd(oracles.loss_fn, optax.sgd(0.3), batch_size=oracles.BATCH, num_epochs=num_epochs)


def with_ditto(local, lam=LAM, num_epochs=3, **options):
    options = {"batch_size": oracles.BATCH, "num_epochs": num_epochs} | options
    return ditto(local, oracles.loss_fn, optax.sgd(RATE), lam, **options)


def client_data(i):
    return jax.tree.map(lambda x: x[0], cj.core.take_clients(oracles.make_dataset(), jnp.array([i])).data)


def test_rounds_are_those_of_the_reference(x64):
    local = with_ditto(shared_update())
    shared, states, infos = oracles.run(local, oracles.make_params())

    def work(w, own, client):
        after = oracles.descend(w, client, 0.3, oracles.num_steps(client, 1))
        steps = oracles.num_steps(client, 3)
        pull = lambda v: oracles.tree(lambda a, b: LAM * (a - b), v, w)  # noqa: E731
        return after, oracles.descend(own, client, RATE, steps, extra=pull)

    params = oracles.make_params()
    want, owns = oracles.federate(work, params, [params] * 5)
    oracles.assert_close(shared, want)
    for i, own in enumerate(owns):
        state = oracles.state_of(states, i)
        oracles.assert_close(state.personal, own)
        oracles.assert_close(local.model(shared, state), own)
    assert infos[0].local.num_steps.tolist() == [1, 1, 1] and infos[0].personal.num_steps.tolist() == [3, 1, 3]
    client = oracles.make_clients()[2]  # whose single step was taken at the initial parameters
    np.testing.assert_allclose(infos[0].personal.loss[1], oracles.loss(params, client), rtol=1e-10)


def noisy_loss(params, batch, key):
    return oracles.loss_fn(params, batch, key) * (1 + jax.random.uniform(key, (), batch["y"].dtype))


@pytest.mark.parametrize("inner", ["sgd", "split"])
def test_the_shared_model_is_that_of_the_wrapped_update_alone(inner):
    """Bit for bit, also where the loss draws from its key: nothing personal flows into it."""
    wrapped = {
        "sgd": lambda: cj.local.sgd(noisy_loss, optax.sgd(0.3), batch_size=2, num_epochs=2),
        "split": lambda: fedper(noisy_loss, optax.sgd(0.3), batch_size=2),
    }[inner]()
    local, data = ditto(wrapped, noisy_loss, optax.sgd(0.1), LAM, batch_size=2), client_data(0)
    params = oracles.as_arrays(oracles.make_params())
    args = (local.share(params), local.init(params), data, jax.random.key(3))
    upload, state, info = local.update(*args)
    plain, plain_state, plain_info = wrapped.update(args[0], wrapped.init(params), *args[2:])
    jax.tree.map(np.testing.assert_array_equal, upload, plain)
    jax.tree.map(np.testing.assert_array_equal, (state.local, info.local), (plain_state, plain_info))


def test_around_a_split_the_pull_leads_to_the_clients_own_head(x64):
    """What the client would deploy without Ditto: the received body below the head that it keeps."""
    wrapped = fedper(oracles.loss_fn, optax.sgd(0.3), batch_size=oracles.BATCH)
    local = with_ditto(wrapped, num_epochs=1)
    params, client = oracles.make_params(), oracles.make_clients()[3]
    state = local.init(oracles.as_arrays(params))
    head, own = params["head"] + 1.0, oracles.tree(lambda p: p - 0.5, params)
    state = state._replace(
        personal=own, local=state.local._replace(personal={"body": None, "norm": None, "head": head})
    )
    _, state, _ = jax.jit(local.update)(
        local.share(oracles.as_arrays(params)), state, client_data(3), jax.random.key(0)
    )
    centre = {**params, "head": head}
    want = oracles.descend(own, client, RATE, 1, extra=lambda v: oracles.tree(lambda a, b: LAM * (a - b), v, centre))
    oracles.assert_close(state.personal, want)


def test_without_a_pull_a_client_trains_alone(x64):
    local = with_ditto(shared_update(), lam=0.0)
    params = oracles.make_params()
    _, states, _ = oracles.run(local, params)
    for i, client in enumerate(oracles.make_clients()):
        visits = sum(i in cohort for cohort in oracles.COHORTS)
        alone = oracles.descend(params, client, RATE, visits * oracles.num_steps(client, 3))
        oracles.assert_close(oracles.state_of(states, i).personal, alone)


def test_the_pull_can_be_swept():
    params, data = oracles.as_arrays(oracles.make_params()), client_data(0)

    def personal(lam):
        local = with_ditto(shared_update(), lam=lam)
        return jax.jit(local.update)(params, local.init(params), data, jax.random.key(0))[1].personal

    swept = jax.vmap(personal)(jnp.array([0.0, 2.0]))
    for i, lam in enumerate([0.0, 2.0]):
        jax.tree.map(lambda s, p, i=i: np.testing.assert_allclose(s[i], p, rtol=1e-5), swept, personal(lam))


def test_a_straggler_does_fewer_personal_steps():
    local = with_ditto(shared_update(), num_steps_fn=lambda data, key: jnp.int32(1))
    params = oracles.as_arrays(oracles.make_params())
    _, _, info = jax.jit(local.update)(params, local.init(params), client_data(0), jax.random.key(0))
    assert info.personal.num_steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, "lam must be at least 0, got -0.1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        with_ditto(shared_update(), **options)
