import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cedarjax as cj
from cedarjax import distill
from tests.distill import distill_oracles as oracles

PUBLIC = np.random.default_rng(9).normal(size=(7, 3))
T = 0.2
OPTIONS = {"num_classes": 3, "temperature": T, "batch_size": 4, "num_epochs": 2, "public_epochs": 3}
COHORTS = ((0, 1, 2, 3), (1, 3), (2, 0, 1))


def run(algorithm, cohorts=COHORTS, *, states=None, **options):
    if states is None:
        params = jnp.stack([jnp.asarray(oracles.make_params(i)) for i in range(4)])
        states = jax.vmap(algorithm.init_client)(params)
    server, infos, step = algorithm.init(None), [], jax.jit(algorithm.step)
    for number, ids in enumerate(cohorts):
        cohort = oracles.cohort_of(oracles.make_dataset(), states, ids, **options)
        server, after, info = step(server, cohort, jax.random.key(number))
        ids = jnp.asarray(ids)
        states = jax.tree.map(lambda s, a, ids=ids: s.at[ids].set(a), states, after)
        infos.append(info)
    return states, server, infos


def make(public=PUBLIC, **options):
    return distill.dsfl(oracles.make_group(), jnp.asarray(public), **OPTIONS | options)


def reference(cohorts=COHORTS):
    data = oracles.make_data()
    clients = [oracles.Client(oracles.make_params(i)) for i in range(4)]
    labels, losses = None, []
    for number, cohort in enumerate(cohorts):
        round_key = jax.random.split(jax.random.key(number))[1]
        uploads = []
        for client in cohort:
            own_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(round_key, client), 0))[0]
            for rows in oracles.batches(own_key, oracles.COUNTS[client], max(oracles.COUNTS)):
                at = oracles.OFFSETS[client] + rows
                clients[client].step(data["x"][at], data["y"][at], [None] * len(at))
            uploads.append(oracles.softmax(PUBLIC @ clients[client].params))
        labels = oracles.softmax(np.mean(uploads, axis=0) / T)
        for client in cohort:
            key, steps = jax.random.fold_in(jax.random.fold_in(round_key, client), 1), []
            for rows in oracles.batches(key, len(PUBLIC), len(PUBLIC), epochs=3):
                steps.append(clients[client].step(PUBLIC[rows], labels[rows], [None] * len(rows))[0])
            losses.append(np.mean(steps))
    return clients, labels, losses


def test_rounds_are_those_of_the_reference(x64):
    states, server, infos = run(make(dtype=jnp.float64))
    clients, labels, losses = reference()
    np.testing.assert_allclose(states.params, np.stack([c.params for c in clients]), rtol=1e-8)
    np.testing.assert_allclose(server.params.labels, labels, rtol=1e-8)
    np.testing.assert_allclose(np.concatenate([i.public.loss for i in infos]), losses, rtol=1e-8)
    assert server.params.written.all() and all(info.used.all() for info in infos)
    assert infos[0].public.num_rows.tolist() == [21] * 4 and infos[0].private.num_rows.tolist() == [10, 6, 2, 12]


def test_sharpening_lowers_the_entropy():
    p = jnp.array([0.5, 0.3, 0.2])
    entropy = [float(-(q * jnp.log(q)).sum()) for q in (p, distill.sharpen(p, 0.1), distill.sharpen(p, 0.05))]
    assert entropy[0] > entropy[1] > entropy[2] and distill.sharpen(p, 0.1).argmax() == 0


def test_some_public_samples_a_round():
    states, server, (info,) = run(make(num_public=3), ((0, 1, 2, 3),))
    assert server.params.written.sum() == 3 and info.public.num_rows.tolist() == [9] * 4
    assert not server.params.labels[~server.params.written].any()
    _, later, _ = run(make(num_public=3), ((0, 1),) * 6)
    assert later.params.written.sum() > 3


@pytest.mark.parametrize("absent", [True, False])
def test_a_client_without_finite_labels_is_left_out(absent):
    """Absent, with data of NaN, or present and diverged: the others go on as without it."""
    algorithm = make(PUBLIC.astype(np.float32))
    states = jax.vmap(algorithm.init_client)(jnp.stack([jnp.asarray(oracles.make_params(i)) for i in range(4)]))
    spoilt = states._replace(params=states.params.at[0].set(jnp.nan))
    cohort = oracles.cohort_of(oracles.make_dataset(), spoilt, range(4))
    if absent:
        cohort = cohort._replace(weights=cohort.weights.at[0].set(0.0))
        x = cohort.data.examples["x"].at[0].set(jnp.nan)
        cohort = cohort._replace(data=cohort.data._replace(examples={**cohort.data.examples, "x": x}))
    server, after, info = jax.jit(algorithm.step)(algorithm.init(None), cohort, jax.random.key(0))
    few = oracles.cohort_of(oracles.make_dataset(), states, (1, 2, 3))
    want_server, want, _ = jax.jit(algorithm.step)(algorithm.init(None), few, jax.random.key(0))
    np.testing.assert_allclose(server.params.labels, want_server.params.labels, rtol=1e-5)
    np.testing.assert_allclose(after.params[1:], want.params, rtol=1e-4, atol=1e-5)
    assert info.used.tolist() == [False, True, True, True]
    if absent:
        np.testing.assert_array_equal(after.opt_state[1][0].trace[0], 0)


def test_without_anybody_nothing_is_learned():
    algorithm = make()
    states = jax.vmap(algorithm.init_client)(jnp.ones((2, 3, 3)))
    cohort = oracles.cohort_of(oracles.make_dataset(), states, (0, 1))._replace(weights=jnp.zeros(2))
    server, after, info = jax.jit(algorithm.step)(algorithm.init(None), cohort, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after, states)
    assert not server.params.written.any() and info.public.num_steps.tolist() == [0, 0]


def test_groups_and_layouts():
    whole = run(make(), ((0, 1, 2, 3),))
    groups = {"a": oracles.make_group(), "b": oracles.make_group()}
    public = jnp.asarray(PUBLIC)
    algorithm = distill.dsfl(groups, public, map_fn=cj.cohort_map(1), **OPTIONS)
    ids = {"a": (0, 1), "b": (2, 3)}
    cohorts = {}
    for name, members in ids.items():
        params = jnp.stack([jnp.asarray(oracles.make_params(i)) for i in members])
        states = jax.vmap(lambda p, n=name: distill.init_client(groups[n], p))(params)
        cohorts[name] = cj.core.take_clients(oracles.make_dataset(), jnp.asarray(members))._replace(state=states)
    server, states, _ = jax.jit(algorithm.step)(algorithm.init(None), cohorts, jax.random.key(0))
    np.testing.assert_allclose(server.params.labels, whole[1].params.labels, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.concatenate([states["a"].params, states["b"].params]), whole[0].params, rtol=1e-4, atol=1e-5
    )


def test_poisoned_labels():
    flags = jnp.array([True] * 4)
    bad = run(make(poison_fn=distill.permuted_logits), ((2,),), byzantine=flags)[1].params.labels
    honest = run(make(), ((2,),))[1].params.labels
    np.testing.assert_array_equal(jnp.argsort(bad, axis=1), jnp.argsort(-honest, axis=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"num_public": 8}, r"1 <= num_public <= 7 \(all public samples\), got 8"),
        ({"num_public": 0}, "got 0"),
        ({"public_epochs": 0}, "public_epochs must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"public": np.zeros((0, 3))}, r"public must be \[P, ...\] with P at least 1, got the shape \(0, 3\)"),
        ({"poison_fn": distill.permuted_logits}, "cohort.byzantine must be given"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        run(make(**options), ((0,),))
