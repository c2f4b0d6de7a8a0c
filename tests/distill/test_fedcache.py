import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import distill
from tests.distill import distill_oracles as oracles

OPTIONS = {
    "alpha": oracles.ALPHA,
    "temperature": oracles.TAU,
    "batch_size": oracles.BATCH,
    "num_epochs": oracles.EPOCHS,
}
COHORTS = ((0, 1, 2, 3), (3, 1), (2, 3, 0))
"""Who takes part in each round, and in which order."""


@functools.cache
def relations():
    data = oracles.make_data()
    return oracles.brute_force(data["x"], data["y"], oracles.NUM_RELATED)


def empty_cache(dtype=None):
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    index, mask = relations()
    return distill.init_cache(distill.Relations(jnp.asarray(index), jnp.asarray(mask)), 3, dtype=dtype)


def stacked_states(group, ids=range(4)):
    params = jnp.stack([jnp.asarray(oracles.make_params(i)) for i in ids])
    return jax.vmap(lambda p: distill.init_client(group, p))(params)


def run(algorithm, cohorts=COHORTS, *, group=None, dataset=None, jit=True, **options):
    """Rounds over named clients; the states of all clients at the end, the server's, and the infos."""
    dataset = oracles.make_dataset() if dataset is None else dataset
    states = stacked_states(oracles.make_group() if group is None else group)
    server, infos = algorithm.init(None), []
    step = jax.jit(algorithm.step) if jit else algorithm.step
    for number, ids in enumerate(cohorts):
        cohort = oracles.cohort_of(dataset, states, ids, **options)
        server, after, info = step(server, cohort, jax.random.key(number))
        ids = jnp.asarray(ids)
        states = jax.tree.map(lambda s, a, ids=ids: s.at[ids].set(a), states, after)
        infos.append(info)
    return states, server, infos


def assert_close(got, want, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
@pytest.mark.parametrize("x64_on", [True, False])
def test_rounds_are_those_of_a_loop_over_samples(order, x64_on):
    """Ragged clients, short last batches, two epochs, momentum, weight decay, clients that come and go."""
    with jax.enable_x64(x64_on):
        algorithm = distill.fedcache(oracles.make_group(), empty_cache(), order=order, **OPTIONS)
        states, server, infos = run(algorithm)
        keys = [jax.random.key(i) for i in range(len(COHORTS))]
        clients, logits, written, told = oracles.fedcache_rounds(keys, COHORTS, relations(), order=order)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if x64_on else {"rtol": 1e-5, "atol": 5e-6}
    assert_close(server.params.logits, logits, **tolerance)
    assert_equal(server.params.written, written)
    assert_close(states.params, np.stack([c.params for c in clients]), **tolerance)
    assert_close(np.concatenate([info.loss for info in infos]), [t[0] for t in told], **tolerance)
    assert np.concatenate([info.num_taught for info in infos]).tolist() == [t[1] for t in told]
    assert server.round == len(COHORTS)


def test_the_two_orders_differ():
    rounds = {order: run(distill.fedcache(oracles.make_group(), empty_cache(), order=order, **OPTIONS)) for order in (
        "sequential", "synchronous")}  # fmt: skip
    first = {order: infos[0].num_taught.tolist() for order, (_, _, infos) in rounds.items()}
    assert first["synchronous"] == [0, 0, 0, 0] and min(first["sequential"][1:]) > 0
    gaps = rounds["sequential"][1].params.logits - rounds["synchronous"][1].params.logits
    assert jnp.abs(gaps).max() > 1e-3


def counting_group():
    """Logits `x + t` after `t` steps: integers, which every order of summing gives exactly."""

    def update(grads, state, params=None):
        return jax.tree.map(jnp.ones_like, grads), state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return distill.Group(lambda params, x, key: x + params[None], tx)


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
def test_three_rounds_of_integers_are_exact(order):
    rng = np.random.default_rng(5)
    x = rng.integers(-50, 50, (15, 3)).astype(np.float32)
    dataset = oracles.make_dataset({"x": x, "y": rng.integers(0, 3, 15)})
    algorithm = distill.fedcache(counting_group(), empty_cache(jnp.float32), order=order, **OPTIONS)
    states = distill.ClientModel(jnp.zeros((4, 3)), optax.EmptyState())
    server, step = algorithm.init(None), jax.jit(algorithm.step)
    logits, written, steps = np.zeros((15, 3), np.float32), np.zeros(15, bool), np.zeros(4, int)
    index, mask = relations()
    for number in range(3):
        before, taught = written.copy(), []
        cohort = oracles.cohort_of(dataset, states, range(4))
        server, states, info = step(server, cohort, jax.random.key(number))
        for client in range(4):
            taught.append(0)
            for rows in oracles.visits(jax.random.key(number), client):
                at = oracles.OFFSETS[client] + rows
                seen = written if order == "sequential" else before
                taught[-1] += int((mask[at] & seen[index[at]]).any(axis=1).sum())
                logits[at], written[at] = x[at] + steps[client], True
                steps[client] += 1
        assert_equal(server.params.logits, logits)
        assert_equal(server.params.written, written)
        assert info.num_taught.tolist() == taught and states.params[:, 0].tolist() == steps.tolist()
        zbar, has = distill.fetch(server.params, jnp.arange(15))
        for i in range(15):
            related = index[i][mask[i]]
            want = logits[related].sum(axis=0) / np.float32(max(len(related), 1))
            assert_equal(zbar[i], want)
            assert bool(has[i]) == (len(related) > 0)


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
def test_every_sample_is_visited_once_an_epoch(order):
    """The published code loses the tail of an epoch; client 2 has one sample and a batch is of four."""
    algorithm = distill.fedcache(oracles.make_group(), empty_cache(), order=order, **OPTIONS | {"num_epochs": 1})
    _, server, (info,) = run(algorithm, (range(4),))
    assert server.params.written.all()
    assert info.num_rows.tolist() == [5, 3, 1, 6] and info.num_steps.tolist() == [2, 1, 1, 2]


def test_the_first_client_learns_from_its_labels_alone():
    """The published code gives it a uniform teacher."""
    options = OPTIONS | {"batch_size": 6, "num_epochs": 1}
    taught = distill.fedcache(oracles.make_group(), empty_cache(), **options)
    alone = distill.fedcache(oracles.make_group(), empty_cache(), **options | {"alpha": 0.0})
    (a, _, (info,)), (b, _, _) = (run(algorithm, ((3,),)) for algorithm in (taught, alone))
    assert_equal(a.params, b.params)
    assert info.num_taught.tolist() == [0]


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
def test_absent_clients_change_nothing_whatever_they_hold(order):
    algorithm = distill.fedcache(oracles.make_group(), empty_cache(), order=order, **OPTIONS)
    dataset = oracles.make_dataset()
    _, server, _ = run(algorithm, ((1, 2),))
    states = stacked_states(oracles.make_group())
    bad = jax.tree.map(lambda x: x.at[:5].set(jnp.nan) if x.dtype == jnp.float32 else x, dataset.examples)
    spoilt = cj.FederatedDataset(bad, dataset.offsets, dataset.num_support, dataset.max_examples)
    cohort = oracles.cohort_of(spoilt, states, (0, 3, 1))
    cohort = cohort._replace(weights=cohort.weights.at[0].set(0.0), state=jax.tree.map(
        lambda x: x.at[0].set(jnp.nan), cohort.state))  # fmt: skip
    step = jax.jit(algorithm.step)
    after, models, info = step(server, cohort, jax.random.key(7))
    want, few, few_info = step(server, oracles.cohort_of(dataset, states, (3, 1)), jax.random.key(7))
    assert_close(after.params, want.params)
    assert_close(jax.tree.map(lambda x: x[1:], models), few)
    assert_equal(jax.tree.map(lambda x: x[0], models), jax.tree.map(lambda x: x[0], cohort.state))
    assert_close(jax.tree.map(lambda x: x[1:], info), few_info)
    assert [float(x[0]) for x in info] == [0.0, 0.0, 0.0, 0.0]
    gone = oracles.cohort_of(dataset, states, (3,))._replace(client_id=jnp.array([cj.core.dataset.ABSENT_ID]))
    assert_equal(step(server, gone._replace(weights=jnp.zeros(1)), jax.random.key(1))[0].params, server.params)


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
def test_a_client_that_diverges_spoils_nobody(order):
    algorithm = distill.fedcache(oracles.make_group(), empty_cache(), order=order, **OPTIONS)
    states = stacked_states(oracles.make_group())
    states = states._replace(params=states.params.at[0].set(jnp.nan))
    cohort = oracles.cohort_of(oracles.make_dataset(), states, range(4))
    server, models, _ = jax.jit(algorithm.step)(algorithm.init(None), cohort, jax.random.key(0))
    assert jnp.isfinite(models.params[1:]).all() and jnp.isfinite(server.params.logits).all()
    assert not server.params.written[:5].any() and server.params.written[5:].all()


def test_layouts_of_the_client_axis(mesh):
    make = functools.partial(distill.fedcache, oracles.make_group(), empty_cache(), order="synchronous", **OPTIONS)
    rounds = (0, 1, 2, 3), (3, 1, 0, 2)
    want = run(make(), rounds)
    for map_fn in (cj.cohort_map(1), cj.cohort_map(3), cj.cohort_map(1, mesh=mesh)):
        assert_close(run(make(map_fn=map_fn), rounds), want)


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
def test_jit_and_no_jit(order):
    algorithm = distill.fedcache(oracles.make_group(), empty_cache(), order=order, **OPTIONS)
    want = run(algorithm, ((0, 1), (1, 2)))
    assert_close(run(algorithm, ((0, 1), (1, 2)), jit=False), want)


def test_the_order_of_a_synchronous_cohort_does_not_matter():
    algorithm = distill.fedcache(oracles.make_group(), empty_cache(), order="synchronous", **OPTIONS)
    a, b = (run(algorithm, (ids, ids)) for ids in ((0, 1, 2, 3), (2, 3, 1, 0)))
    assert_close(a[:2], b[:2])


def three_groups():
    """A linear model, a network with a hidden layer, and a linear model of two of the inputs; three optimisers."""
    return {
        "linear": distill.Group(lambda p, x, key: x @ p, oracles.make_tx()),
        "narrow": distill.Group(lambda p, x, key: x[:, :2] @ p, optax.sgd(0.1)),
        "network": distill.Group(lambda p, x, key: jnp.tanh(x @ p["one"]) @ p["two"], optax.sgd(0.2, momentum=0.5)),
    }


def three_states(groups):
    params = {
        "linear": jnp.asarray(oracles.make_params(0), jnp.float32)[None],
        "narrow": jnp.asarray(oracles.make_params(1, 2), jnp.float32)[None],
        "network": {
            "one": jnp.stack([jnp.asarray(oracles.make_params(i), jnp.float32) for i in (2, 3)]),
            "two": jnp.stack([jnp.asarray(oracles.make_params(i), jnp.float32) for i in (4, 5)]),
        },
    }
    return {n: jax.vmap(functools.partial(distill.init_client, groups[n]))(p) for n, p in params.items()}


IDS = {"linear": [0], "narrow": [2], "network": [1, 3]}


def three_cohorts(states):
    dataset = oracles.make_dataset()
    return {n: cj.core.take_clients(dataset, jnp.asarray(ids))._replace(state=states[n]) for n, ids in IDS.items()}


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
def test_three_architectures_share_a_cache(order):
    """As if each group ran on its own, on the cache that the others leave it."""
    groups = three_groups()
    together = distill.fedcache(groups, empty_cache(), order=order, **OPTIONS)
    single = {n: distill.fedcache(g, empty_cache(), order=order, **OPTIONS) for n, g in groups.items()}
    server, states, step = together.init(None), three_states(groups), jax.jit(together.step)
    alone, own = empty_cache(), three_states(groups)
    for number in range(2):
        key, before = jax.random.key(number), alone
        server, states, infos = step(server, three_cohorts(states), key)
        for name in sorted(groups):
            seen = single[name].init(None)._replace(params=alone if order == "sequential" else before)
            after, own[name], info = jax.jit(single[name].step)(seen, three_cohorts(own)[name], key)
            mine = np.isin(np.searchsorted(oracles.OFFSETS, np.arange(15), side="right") - 1, IDS[name])
            alone = alone._replace(
                logits=jnp.where(mine[:, None], after.params.logits, alone.logits),
                written=jnp.where(mine, after.params.written, alone.written),
            )
            assert_close(infos[name], info)
        assert_close(server.params, alone)
        assert_close(states, own)
    assert server.params.written.all()
    models = together.model(server.params, states)
    assert models["network"]["one"].shape == (2, 3, 3) and models["narrow"].shape == (1, 2, 3)


def test_a_state_of_each_group():
    groups = tuple(three_groups().values())
    params = jnp.zeros((3, 3)), jnp.zeros((2, 3)), {"one": jnp.zeros((3, 3)), "two": jnp.zeros((3, 3))}
    states = distill.fedcache(groups, empty_cache(), **OPTIONS).init_client(params)
    assert [type(s) for s in states] == [distill.ClientModel] * 3
    assert_equal(states[2].params, params[2])


def test_a_whole_run_is_one_scan():
    dataset = oracles.make_dataset()
    algorithm = distill.fedcache(oracles.make_group(), empty_cache(), **OPTIONS)
    state = cj.init_run(algorithm, dataset, jnp.zeros((3, 3)))
    go = jax.jit(lambda s, n: cj.run_rounds(algorithm, dataset, s, jax.random.key(0), num_rounds=n, num_clients=2),
                 static_argnums=1)  # fmt: skip
    whole, history, _ = go(state, 4)
    half, _, _ = go(go(state, 2)[0], 2)
    assert_equal(whole, half)
    assert history.info.num_rows.shape == (4, 2)


def test_one_trace_serves_many_rounds():
    traces = []

    def apply_fn(params, x, key):
        traces.append(1)
        return x @ params

    group = distill.Group(apply_fn, optax.sgd(0.1))
    algorithm = distill.fedcache(group, empty_cache(), **OPTIONS)
    step, server = jax.jit(algorithm.step), algorithm.init(None)
    states = jax.vmap(lambda p: distill.init_client(group, p))(jnp.zeros((2, 3, 3)))
    counts = []
    for number in range(3):
        cohort = oracles.cohort_of(oracles.make_dataset(), states, (0, 1))
        server, states, _ = step(server, cohort, jax.random.key(number))
        counts.append(len(traces))
    assert counts[0] == counts[2]


def test_strengths_can_be_swept():
    cohort = oracles.cohort_of(oracles.make_dataset(), stacked_states(oracles.make_group()), range(4))

    def models(alpha, temperature):
        options = OPTIONS | {"alpha": alpha, "temperature": temperature}
        algorithm = distill.fedcache(oracles.make_group(), empty_cache(), **options)
        return algorithm.step(algorithm.init(None), cohort, jax.random.key(0))[1].params

    swept = jax.jit(jax.vmap(models))(jnp.array([0.0, 2.0]), jnp.array([1.0, 3.0]))
    assert_close(swept[1], models(2.0, 3.0))
    assert jnp.abs(swept[0] - swept[1]).max() > 1e-3


@pytest.mark.parametrize("order", ["sequential", "synchronous"])
def test_malicious_clients_write_poison_and_robust_fetches_bear_it(order):
    """Client 1 is malicious; who has fewer than half of its related samples there keeps a sane teacher."""

    def round_with(poison_fn):
        algorithm = distill.fedcache(oracles.make_group(), empty_cache(), order=order, poison_fn=poison_fn, **OPTIONS)
        flags = jnp.array([False, True, False, False])
        return run(algorithm, ((0, 1, 2, 3),), byzantine=flags)[1].params

    honest, permuted, peaked = map(round_with, (None, distill.permuted_logits, distill.peaked_logits(1e4)))
    assert_close(permuted.logits[5:8], distill.permuted_logits(honest.logits[5:8]))
    assert_close(jnp.sort(peaked.logits[5:8], axis=1), np.tile([0.0, 0.0, 1e4], (3, 1)))
    assert jnp.abs(peaked.logits).max(axis=1)[np.r_[:5, 8:15]].max() < 50
    if order == "synchronous":
        assert_equal(peaked.logits[8:], honest.logits[8:])

    index, mask = relations()
    bad = mask & (index >= 5) & (index < 8)
    asked = np.flatnonzero((bad.sum(axis=1) > 0) & (2 * bad.sum(axis=1) < mask.sum(axis=1)))
    assert len(asked)
    means, _ = distill.fetch(peaked, jnp.asarray(asked))
    medians, _ = distill.fetch(peaked, jnp.asarray(asked), reduce_fn=distill.median_logits)
    for i, mean, median in zip(asked, means, medians, strict=True):
        sane = np.asarray(peaked.logits)[index[i][mask[i] & ~bad[i]]]
        assert mean.max() > 1000
        assert (median >= sane.min(axis=0) - 1e-5).all() and (median <= sane.max(axis=0) + 1e-5).all()


def test_training_uses_the_robust_fetch():
    """With the median a peak of 100 and one of 10,000 among few are the same; with the mean they are not."""

    def models(height, reduce_fn):
        options = OPTIONS | {"reduce_fn": reduce_fn, "num_epochs": 1, "temperature": 1e4}
        cache = distill.init_cache(distill.Relations(jnp.array([[5, 9, 10]] * 15), jnp.ones((15, 3), bool)), 3)
        algorithm = distill.fedcache(
            oracles.make_group(), cache, poison_fn=distill.peaked_logits(height), order="synchronous", **options
        )
        flags = jnp.array([False, True, False, False])
        return run(algorithm, ((1, 3), (0, 3)), byzantine=flags)[0].params[0]

    assert_close(*(models(height, distill.median_logits) for height in (100.0, 1e4)))
    means = [models(height, distill.mean_logits) for height in (100.0, 1e4)]
    assert jnp.abs(means[0] - means[1]).max() > 0.1


def test_stragglers_count_what_they_did():
    options = OPTIONS | {"num_steps_fn": lambda data, key: jnp.int32(2)}
    _, _, (info,) = run(distill.fedcache(oracles.make_group(), empty_cache(), **options), (range(4),))
    assert info.num_steps.tolist() == [2, 2, 1, 2] and info.num_rows.tolist() == [8, 6, 2, 8]


def test_noise_of_the_model_comes_from_the_client():
    """Dropout draws by the client's id and step, so that the order of a cohort does not matter."""
    noisy = distill.Group(lambda p, x, key: x @ p + jax.random.normal(key, (1, 3)), oracles.make_tx())
    algorithm = distill.fedcache(noisy, empty_cache(), order="synchronous", **OPTIONS)
    a, b = (run(algorithm, (ids,), group=noisy)[0].params for ids in ((0, 3), (3, 0)))
    assert_close(a, b)


def make_step(examples=None, apply_fn=None, **options):
    group = distill.Group(apply_fn or (lambda p, x, key: x @ p), optax.sgd(0.1))
    algorithm = distill.fedcache(group, empty_cache(), **OPTIONS | options)
    cohort = oracles.cohort_of(oracles.make_dataset(), stacked_states(group), range(4))
    if examples is not None:
        cohort = cohort._replace(data=cohort.data._replace(examples=examples(cohort.data.examples)))
    return jax.eval_shape(algorithm.step, algorithm.init(None), cohort, jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make_step(order="random"), ValueError, r"order must be one of .* got 'random'"),
        (lambda: make_step(map_fn=cj.cohort_map()), ValueError, "map_fn must be None in the sequential order"),
        (lambda: make_step(alpha=-1.0), ValueError, "alpha must be at least 0, got -1.0"),
        (lambda: make_step(temperature=0), ValueError, "temperature must be above 0, got 0"),
        (lambda: make_step(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: make_step(num_epochs=0), ValueError, "num_epochs must be at least 1, got 0"),
        (
            lambda: make_step(lambda e: {"x": e["x"], "y": e["y"]}),
            ValueError,
            r"must be a dict with \['index'\] \(distill.with_index adds it\), got \['x', 'y'\]",
        ),
        (lambda: make_step(lambda e: (e["x"],)), ValueError, r"must be a dict with .* got tuple"),
        (
            lambda: make_step(apply_fn=lambda p, x, key: (x @ p)[:, :2]),
            ValueError,
            r"apply_fn must return \[B, K\] = \(4, 3\), got the shape \(4, 2\)",
        ),
        (lambda: make_step(poison_fn=distill.permuted_logits), ValueError, "cohort.byzantine must be given"),
        (lambda: distill.fedcache((), empty_cache()), ValueError, "groups must hold at least one Group, got none"),
        (lambda: distill.fedcache([3], empty_cache()), TypeError, "groups must be a Group or a nest of them, got int"),
    ],
)
def test_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()
