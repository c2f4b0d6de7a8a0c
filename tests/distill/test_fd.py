import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import distill
from cedarjax.distill import FDKnowledge, leave_one_out
from cedarjax.distill.fd import class_sums
from tests.distill import distill_oracles as oracles

OPTIONS = {"num_classes": 3, "alpha": oracles.ALPHA, "temperature": oracles.TAU, "batch_size": 4, "num_epochs": 2}
COHORTS = ((0, 1, 2, 3), (1, 3, 0), (2, 0, 1))


def stacked_states(algorithm, ids=range(4)):
    params = jnp.stack([jnp.asarray(oracles.make_params(i)) for i in ids])
    return jax.vmap(algorithm.init_client)(params)


def run(algorithm, cohorts=COHORTS, **options):
    states, server, infos = stacked_states(algorithm), algorithm.init(None), []
    step = jax.jit(algorithm.step)
    for number, ids in enumerate(cohorts):
        cohort = oracles.cohort_of(oracles.make_dataset(), states, ids, **options)
        server, after, info = step(server, cohort, jax.random.key(number))
        ids = jnp.asarray(ids)
        states = jax.tree.map(lambda s, a, ids=ids: s.at[ids].set(a), states, after)
        infos.append(info)
    return states, server, infos


def reference(cohorts=COHORTS):
    """What each client uploaded of each class in the last round that saw the class."""
    data = oracles.make_data()
    clients = [oracles.Client(oracles.make_params(i)) for i in range(4)]
    last, losses = {}, []  # class -> {client: mean logits}
    for number, cohort in enumerate(cohorts):
        uploads = {}
        for client in cohort:
            mine, others = [], {y: [mean for j, mean in last[y].items() if j != client] for y in last}
            teachers = {y: np.mean(means, axis=0) for y, means in others.items() if means}

            for rows in oracles.visits(jax.random.key(number), client):
                at = oracles.OFFSETS[client] + rows
                labels = data["y"][at]
                loss, logits = clients[client].step(data["x"][at], labels, [teachers.get(y) for y in labels])
                losses.append(loss)
                mine += list(zip(labels, logits, strict=True))
            for label in {y for y, _ in mine}:
                uploads.setdefault(label, {})[client] = np.mean([z for y, z in mine if y == label], axis=0)
        last = last | uploads
    return clients, last, losses


def test_rounds_are_those_of_the_reference(x64):
    """Clients that come and go, classes that some rounds do not hold."""
    states, server, infos = run(distill.fd(oracles.make_group(), dtype=jnp.float64, **OPTIONS))
    clients, last, losses = reference()
    np.testing.assert_allclose(states.model.params, np.stack([c.params for c in clients]), rtol=1e-9)
    for label in range(3):
        uploads = list(last.get(label, {}).values())
        assert float(server.params.counts[label]) == len(uploads)
        want = np.sum(uploads, axis=0) if uploads else np.zeros(3)
        np.testing.assert_allclose(server.params.sums[label], want, rtol=1e-9, atol=1e-12)
    steps = np.concatenate([info.num_steps for info in infos])
    got = np.concatenate([info.loss for info in infos])
    means = [m.mean() for m in np.split(np.array(losses), np.cumsum(steps)[:-1])]
    np.testing.assert_allclose(got, means, rtol=1e-9)


def test_leaving_one_out_by_hand():
    """Class 0: clients with 1 and 5. Class 1: this client alone. Class 2: others alone, since its stamp is old."""
    knowledge = FDKnowledge(
        jnp.array([[6.0] * 3, [2.0] * 3, [8.0] * 3]), jnp.array([2.0, 1.0, 2.0]), jnp.array([4, 4, 4])
    )
    means, stamp = jnp.array([[1.0] * 3, [2.0] * 3, [9.0] * 3]), jnp.array([4, 4, 3])
    teacher, has = leave_one_out(knowledge, means, stamp)
    assert teacher[:, 0].tolist() == [5.0, 0.0, 4.0] and has.tolist() == [True, False, True]
    nobody = FDKnowledge(jnp.zeros((3, 3)), jnp.zeros(3), jnp.full(3, -1))
    assert not leave_one_out(nobody, means, jnp.full(3, -1))[1].any()


def test_sums_of_classes_by_hand():
    logits = jnp.array([[1.0, 2.0], [3.0, jnp.nan], [5.0, 6.0], [7.0, 8.0], [9.0, 1.0]])
    sums, counts = class_sums(logits, jnp.array([0, 0, 1, 7, 0]), 2, jnp.array([True, True, True, True, False]))
    assert sums.tolist() == [[1.0, 2.0], [5.0, 6.0]] and counts.tolist() == [1.0, 1.0]


def test_a_client_alone_learns_from_its_labels():
    """Its own means are taken out of what it gets back."""
    rounds = ((3,), (3,))
    taught = run(distill.fd(oracles.make_group(), **OPTIONS), rounds)[0]
    alone = run(distill.fd(oracles.make_group(), **OPTIONS | {"alpha": 0.0}), rounds)[0]
    np.testing.assert_allclose(taught.model.params, alone.model.params, rtol=1e-6)


def test_absent_clients_change_nothing_whatever_they_hold():
    algorithm = distill.fd(oracles.make_group(), **OPTIONS)
    states, server, _ = run(algorithm, ((0, 1, 2, 3),))
    spoilt = jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x.dtype == jnp.float32 else x, states)
    cohort = oracles.cohort_of(oracles.make_dataset(), spoilt, (0, 3, 1))
    cohort = cohort._replace(weights=cohort.weights.at[0].set(0.0))
    few = oracles.cohort_of(oracles.make_dataset(), states, (3, 1))
    step = jax.jit(algorithm.step)
    got, want = step(server, cohort, jax.random.key(5)), step(server, few, jax.random.key(5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[0], want[0])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[0], got[1]), jax.tree.map(
        lambda x: x[0], spoilt))  # fmt: skip


def test_groups_and_layouts():
    """One group or two, in one vmap or in a loop."""
    whole = run(distill.fd(oracles.make_group(), **OPTIONS), ((0, 1, 2, 3),) * 2)
    algorithm = distill.fd((oracles.make_group(), oracles.make_group()), map_fn=cj.cohort_map(1), **OPTIONS)
    one = distill.fd(oracles.make_group(), **OPTIONS)
    states = tuple(stacked_states(one, ids) for ids in ((0, 1), (2, 3)))
    server, step = algorithm.init(None), jax.jit(algorithm.step)
    for number in range(2):
        take = functools.partial(cj.core.take_clients, oracles.make_dataset())
        cohorts = tuple(
            take(jnp.asarray(ids))._replace(state=s) for ids, s in zip(((0, 1), (2, 3)), states, strict=True)
        )
        server, states, _ = step(server, cohorts, jax.random.key(number))
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (joined, server), whole[:2])
    assert [m.shape for m in algorithm.model(server.params, states)] == [(2, 3, 3)] * 2


def test_poisoned_means():
    flags = jnp.array([False, False, False, True])
    algorithm = distill.fd(oracles.make_group(), poison_fn=distill.permuted_logits, **OPTIONS)
    bad, honest = (run(a, ((0, 1, 2, 3),), byzantine=flags)[0] for a in (
        algorithm, distill.fd(oracles.make_group(), **OPTIONS)))  # fmt: skip
    np.testing.assert_allclose(bad.means[:3], honest.means[:3])
    held = np.asarray(honest.stamp[3] >= 0)
    np.testing.assert_allclose(bad.means[3][held], distill.permuted_logits(honest.means[3])[held])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        ({"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_classes": 4}, r"apply_fn must return \[B, K\] = \(4, 4\), got the shape \(4, 3\)"),
        ({"poison_fn": distill.permuted_logits}, "cohort.byzantine must be given"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        algorithm = distill.fd(distill.Group(lambda p, x, key: x @ p, optax.sgd(0.1)), **OPTIONS | options)
        run(algorithm, ((0, 1),))
