import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.personal import ditto, fedbabu, fedbn, fedper, fedrep, lg_fedavg, split
from tests.personal import personal_oracles as oracles

RATE, EPOCHS = 0.3, 2
NAMES = {"body", "norm", "head"}


def kernel(factory, *args, **options):
    return factory(oracles.loss_fn, optax.sgd(RATE), *args, batch_size=oracles.BATCH, num_epochs=EPOCHS, **options)


def everything(params, client):
    return oracles.descend(params, client, RATE, oracles.num_steps(client, EPOCHS))


def body_only(params, client):
    return oracles.descend(params, client, RATE, oracles.num_steps(client, EPOCHS), names=("body", "norm"))


def head_then_body(params, client):
    params = oracles.descend(params, client, 0.1, oracles.num_steps(client, 3), names=("head",))
    return body_only(params, client)


ALGORITHMS = {
    "fedper": (lambda: kernel(fedper), everything, {"head"}),
    "fedper_by_predicate": (lambda: kernel(fedper, lambda name: name != "body"), everything, {"head", "norm"}),
    "lg_fedavg": (lambda: kernel(lg_fedavg, ["body", "norm"]), everything, {"body", "norm"}),
    "fedbn": (lambda: kernel(fedbn), everything, {"norm"}),
    "fedbabu": (lambda: kernel(fedbabu), body_only, {"head"}),
    "fedrep": (
        lambda: kernel(fedrep, personal_tx=optax.sgd(0.1), personal_epochs=3),
        head_then_body,
        {"head"},
    ),
}


def only(params, names):
    return {name: leaf for name, leaf in params.items() if name in names}


def reference(train, personal, **options):
    """The whole model is trained from both parts, the shared part is averaged, the rest is kept."""

    def work(shared, own, client):
        after = train({**shared, **own}, client)
        return only(after, NAMES - personal), only(after, personal)

    params = oracles.make_params()
    owns = [only(params, personal)] * len(oracles.COUNTS)
    return oracles.federate(work, only(params, NAMES - personal), owns, **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rounds_are_those_of_the_reference(name, x64):
    """Four rounds with three of five clients each: the server's tree, every client's part and model."""
    make, train, personal = ALGORITHMS[name]
    local = make()
    shared, states, _ = oracles.run(local, oracles.make_params())
    want, owns = reference(train, personal)
    oracles.assert_close(shared, want)
    for i, own in enumerate(owns):
        state = oracles.state_of(states, i)
        oracles.assert_close(state.personal, own)
        oracles.assert_close(local.model(shared, state), {**want, **own})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_personal_part_never_leaves_the_client(name):
    make, _, personal = ALGORITHMS[name]
    local, params = make(), oracles.as_arrays(oracles.make_params())
    shared, state = local.share(params), local.init(params)
    data = jax.tree.map(lambda x: x[0], cj.core.take_clients(oracles.make_dataset(), jnp.array([0])).data)
    upload, _, _ = jax.jit(local.update)(shared, state, data, jax.random.key(0))
    server = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0, momentum=0.9))).init(params)
    for tree in (shared, upload.delta, server.params, server.opt_state[1][0].trace):
        assert {name for name, leaf in tree.items() if leaf is None} == personal
    itemsize = 4
    size = sum(params[name].size for name in NAMES - personal)
    assert cj.layers.payload_bytes(upload.mask, shared) == itemsize * size


def test_absent_clients_keep_their_part(x64):
    local = kernel(fedper)
    params = oracles.make_params()
    _, states, _ = oracles.run(local, params, cohorts=((0, 1),))
    for i in range(2, 5):
        np.testing.assert_array_equal(states.personal["head"][i], params["head"])
    assert all(bool((states.personal["head"][i] != params["head"]).all()) for i in range(2))


def test_a_head_that_is_never_trained_is_everybodys(x64):
    params = oracles.make_params()
    _, states, _ = oracles.run(kernel(fedbabu), params)
    np.testing.assert_array_equal(states.personal["head"], np.broadcast_to(params["head"], (5, 4)))


def test_a_robust_rule_sees_the_shared_part_alone(x64):
    """Krum with three clients and no attacker takes one of the two uploads that lie nearest to each other."""
    cohort, names = (0, 2, 3), ("body", "norm")
    krum = cj.robust.krum(0)
    shared, states, _ = oracles.run(kernel(fedper), oracles.make_params(), server_rule=krum, cohorts=(cohort,))
    clients = oracles.make_clients()
    after = [everything(oracles.make_params(), clients[i]) for i in cohort]
    rows = np.stack([np.concatenate([np.ravel(a[name]) for name in names]) for a in after])
    distances = np.square(rows[:, None] - rows[None]).sum(axis=2)
    pair = min(((0, 1), (0, 2), (1, 2)), key=lambda ij: distances[ij])
    assert any(all(np.allclose(shared[name], after[i][name], rtol=1e-8) for name in names) for i in pair)
    for i, a in zip(cohort, after, strict=True):
        np.testing.assert_allclose(states.personal["head"][i], a["head"], rtol=1e-10)


def features_of_the_body(params, x):
    hidden = jnp.tanh(x @ params["body"])
    return {"body": hidden, "norm": hidden * params["norm"][None]}


@pytest.mark.parametrize("inside", [True, False])
def test_layers_of_the_shared_part_may_be_left_out(inside, x64):
    """By a filter around the split or within: the second round leaves out the layer that moved less."""
    stimuli = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)))
    options = {"num_skipped": 1, "score": "update_norm"}
    plain = cj.local.sgd(oracles.loss_fn, optax.sgd(RATE), batch_size=oracles.BATCH, num_epochs=EPOCHS)
    if inside:
        local = split(cj.layers.upload_filter(plain, features_of_the_body, stimuli, **options), "head")
    else:
        local = cj.layers.upload_filter(split(plain, "head"), features_of_the_body, stimuli, **options)
    shared, _, infos = oracles.run(local, oracles.make_params(), cohorts=((0, 3), (0, 3)))

    params, clients = oracles.make_params(), oracles.make_clients()
    after = {i: everything(params, clients[i]) for i in (0, 3)}
    first = {k: oracles.average([after[0], after[3]], [6, 6])[k] for k in ("body", "norm")}
    moved = {}
    for i in (0, 3):
        own = everything({**first, "head": after[i]["head"]}, clients[i])
        delta = {k: own[k] - first[k] for k in first}
        norms = {k: np.linalg.norm(delta[k]) for k in first}
        keep = max(norms, key=norms.get)
        moved[i] = (keep, delta[keep])
    want = dict(first)
    for layer in first:
        steps = [delta for keep, delta in moved.values() if keep == layer]
        if steps:
            want[layer] = first[layer] + np.mean(steps, axis=0)
    oracles.assert_close(shared, want)
    np.testing.assert_array_equal(np.asarray(infos[0].mask), np.ones((2, 2)))


def test_a_gradient_moves_the_personal_part_at_a_rate_of_its_own(x64):
    """An update that uploads a gradient: the server has its rate, the client has its own, with momentum kept."""

    def of_gradient(shared, client_state, data, key):
        rows = jnp.arange(data.examples["y"].shape[0], dtype=jnp.int32) < data.num_examples
        grads = jax.grad(lambda p: cj.core.mean_loss(oracles.loss_fn, p, data.examples, rows, key))(shared)
        return cj.Upload(grads), client_state, ()

    local = split(cj.LocalUpdate(lambda params: (), of_gradient), "head", personal_tx=optax.sgd(0.2, momentum=0.5))
    shared, states, _ = oracles.run(local, oracles.make_params(), server_rate=0.1)

    def work(shared, state, client):
        own, velocity = state
        grads = oracles.gradient({**shared, **own}, client)
        velocity = 0.5 * velocity + grads["head"]
        after = {k: shared[k] - grads[k] for k in shared}
        return after, ({"head": own["head"] - 0.2 * velocity}, velocity)

    params = oracles.make_params()
    start = [({"head": params["head"]}, np.zeros(4))] * 5
    want, owns = oracles.federate(work, only(params, {"body", "norm"}), start, server_rate=0.1)
    oracles.assert_close(shared, want)
    for i, (own, _) in enumerate(owns):
        oracles.assert_close(oracles.state_of(states, i).personal, own)


def test_a_personal_head_under_maml(x64):
    """The head moves by its meta-gradient at the client's rate: one inner step, `(I - a H) g(p - a g(p))`."""
    inner = 0.1

    def quadratic(p, x, key):
        return 0.5 * jnp.mean((p["body"] + p["head"] - x) ** 2)

    maml = cj.meta.maml(quadratic, optax.sgd(inner), 1)
    local = split(maml, "head", personal_tx=optax.sgd(0.3))
    params = {"body": jnp.float64(1.0), "head": jnp.float64(2.0)}
    data = cj.ClientData(jnp.array([5.0, 7.0]), jnp.int32(2), jnp.int32(1))
    upload, state, _ = jax.jit(local.update)(local.share(params), local.init(params), data, jax.random.key(0))
    adapted = 3.0 - 2 * inner * (3.0 - 5.0)  # both parts take the step
    meta = (1 - 2 * inner) * (adapted - 7.0)
    np.testing.assert_allclose(upload.delta["body"], meta, rtol=1e-12)
    np.testing.assert_allclose(state.personal["head"], 2.0 - 0.3 * meta, rtol=1e-12)


def test_a_model_inside_is_the_one_that_is_deployed():
    """Ditto inside a split: the client deploys Ditto's model, and not the one that is shared."""
    plain = kernel(cj.local.sgd)
    both = split(ditto(plain, oracles.loss_fn, optax.sgd(RATE), 1.0, batch_size=oracles.BATCH), "head")
    params = oracles.as_arrays(oracles.make_params())
    data = jax.tree.map(lambda x: x[0], cj.core.take_clients(oracles.make_dataset(), jnp.array([0])).data)
    _, state, _ = jax.jit(both.update)(both.share(params), both.init(params), data, jax.random.key(0))
    model = both.model(both.share(params), state)
    np.testing.assert_array_equal(model["head"], state.local.personal["head"])
    assert (model["head"] != state.personal["head"]).any()


def new_algorithm(loss_fn, tx, head_tx, personal="head", *, batch_size):
    """Both parts at once, then the head once more: a split algorithm of one's own."""
    together = cj.local.sgd(loss_fn, tx, batch_size=batch_size)
    once_more = cj.local.sgd(loss_fn, cj.core.train_only(head_tx, personal), batch_size=batch_size)
    return split(cj.core.in_sequence(together, once_more), personal)


def test_a_new_algorithm_is_a_few_lines(x64):
    local = new_algorithm(oracles.loss_fn, optax.sgd(RATE), optax.sgd(0.1), batch_size=oracles.BATCH)

    def train(params, client):
        steps = oracles.num_steps(client, 1)
        return oracles.descend(oracles.descend(params, client, RATE, steps), client, 0.1, steps, names=("head",))

    shared, states, _ = oracles.run(local, oracles.make_params())
    want, owns = reference(train, {"head"})
    oracles.assert_close(shared, want)
    for i, own in enumerate(owns):
        oracles.assert_close(oracles.state_of(states, i).personal, own)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: kernel(fedper, "tail").init(p), "layer 'tail' owns no parameter"),
        (lambda p: kernel(fedper, "tail").share(p), "layer 'tail' owns no parameter"),
        (lambda p: kernel(fedper, lambda name: True).init(p), "which is all of"),
        (lambda p: kernel(fedbn, lambda name: "batch" in name).share(p), "which is none of"),
        (lambda p: fedper(oracles.loss_fn, optax.sgd(1.0), batch_size=0), "batch_size must be at least 1, got 0"),
        (
            lambda p: fedrep(oracles.loss_fn, optax.sgd(1.0), batch_size=1, personal_epochs=0),
            "num_epochs must be at least 1, got 0",
        ),
        (
            lambda p: split(kernel(cj.local.sgd)._replace(share=lambda p: {"params": p, "more": p}), "head").share(p),
            "local_update must share the model's parameters",
        ),
    ],
)
def test_options_that_do_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build(oracles.as_arrays(oracles.make_params()))
