"""The asynchronous simulation against a plain queue in Python."""

import dataclasses
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import core
from cedarjax.core import LocalUpdate, Upload, simulate, simulation

COUNTS = [3, 1, 4, 2, 5, 2, 1]
N = len(COUNTS)
PARAMS = {"w": jnp.float32(0.0), "v": jnp.zeros(2)}
MEANS = np.random.default_rng(4).normal(size=N).astype(np.float32)
TABLE = np.random.default_rng(5).uniform(0.5, 6.0, size=(N, 64)).astype(np.float32)
WHOLE = np.random.default_rng(6).integers(0, 4, size=(N, 64)).astype(np.float32)
KEY = jax.random.key(11)


def visit(shared, visits, data, key):
    """Half a step towards the client's value; tells where it started."""
    value = data.examples[0]
    delta = jax.tree.map(lambda p: 0.5 * (p - value), shared)
    return Upload(delta), visits + 1, {"start": shared["w"], "draw": jax.random.uniform(key)}


LOCAL = LocalUpdate(lambda params: jnp.zeros((), jnp.int32), visit)


def make_dataset():
    return cj.data.federated_dataset(np.repeat(MEANS, COUNTS), client_id=np.repeat(np.arange(N), COUNTS))


def by_table(table):
    return lambda key, client_id, count: jnp.asarray(table)[client_id, count]


def fedbuff():
    return cj.server.fedbuff(3, optax.sgd(1.0))


def fleet_of(server=None, durations=None, local=LOCAL, dataset=None, **options):
    server = fedbuff() if server is None else server
    durations = by_table(TABLE) if durations is None else durations
    return simulation(server, local, make_dataset() if dataset is None else dataset, durations=durations, **options)


def run(fleet, num_events, key=KEY, **options):
    @jax.jit
    def go(key):
        return simulate(fleet, fleet.init(PARAMS, key), key, num_events=num_events, **options)

    return go(key)


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


class Oracle:
    """An event queue, and FedBuff(3) on the scalar model in float64."""

    def __init__(self, table, starts=None, max_staleness=None):
        self.table, self.max_staleness = table, max_staleness
        starts = np.zeros(N, np.float32) if starts is None else starts
        self.heap = [(s if s > 0 else table[i, 0], i) for i, s in enumerate(starts)]
        heapq.heapify(self.heap)
        self.waiting = starts > 0
        self.jobs, self.version_of, self.version = np.zeros(N, int), np.zeros(N, int), 0
        self.models, self.buffer, self.rows = [0.0], [], []

    def step(self):
        time, i = heapq.heappop(self.heap)
        row = {"time": time, "client_id": i, "staleness": 0, "accepted": False, "stale": False, "start": 0.0}
        if not self.waiting[i]:
            late = self.version - self.version_of[i]
            row["staleness"] = late
            row["stale"] = self.max_staleness is not None and late > self.max_staleness
            if not row["stale"]:
                row["accepted"], row["start"] = True, self.models[self.version_of[i]]
                delta = 0.5 * (row["start"] - float(MEANS[i]))
                self.buffer.append((COUNTS[i], delta / np.sqrt(1 + late)))
                if len(self.buffer) == 3:
                    weights, deltas = np.array(self.buffer).T
                    self.models.append(self.models[-1] - weights @ deltas / weights.sum())
                    self.buffer, self.version = [], self.version + 1
            self.jobs[i] += 1
        self.waiting[i] = False
        self.version_of[i] = self.version
        row["version"], row["w"] = self.version, self.models[-1]
        self.rows.append(row)
        heapq.heappush(self.heap, (np.float32(time + self.table[i, self.jobs[i]]), i))

    def run(self, num_events):
        for _ in range(num_events):
            self.step()
        return {name: np.array([row[name] for row in self.rows]) for name in self.rows[0]}


def check(history, metrics, want):
    for name in ("time", "client_id", "staleness", "accepted", "stale", "version"):
        np.testing.assert_array_equal(getattr(history, name), want[name], err_msg=name)
    np.testing.assert_allclose(history.local["start"], want["start"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics, want["w"], rtol=1e-5, atol=1e-6)


def newest(params, key):
    return params["w"]


STARTS = np.array([0, 3, 0, 5.5, 0, 9, 0], np.float32)


@pytest.mark.parametrize(
    ("table", "starts", "max_staleness"),
    [(TABLE, None, None), (WHOLE, None, None), (TABLE, STARTS, None), (TABLE, None, 1), (WHOLE, STARTS, 2)],
)
def test_schedule_and_models_are_those_of_a_queue(table, starts, max_staleness):
    fleet = fleet_of(
        durations=by_table(table),
        start_times=None if starts is None else jnp.asarray(starts),
        max_staleness=max_staleness,
    )
    state, history, metrics = run(fleet, 60, eval_fn=newest)
    want = Oracle(table, starts, max_staleness).run(60)
    check(history, metrics, want)
    assert want["staleness"].max() >= 2
    if max_staleness is None:
        # A client starts from the very numbers that it downloaded.
        models = {0: np.float32(0.0)} | dict(zip(np.asarray(history.version), np.asarray(metrics), strict=True))
        arrived = np.asarray(history.accepted)
        downloaded = np.asarray(history.version - history.staleness)
        # The version after the event is one higher where the event made a model.
        made = np.diff(np.concatenate([[0], history.version]))
        starts_from = [models[v] for v in (downloaded - made)[arrived]]
        np.testing.assert_array_equal(np.asarray(history.local["start"])[arrived], np.float32(starts_from))
    else:
        assert state.downloaded["w"].shape == (max_staleness + 1,) and want["stale"].any()
    accepted = np.bincount(want["client_id"][want["accepted"]], minlength=N)
    np.testing.assert_array_equal(state.clients, accepted)


def test_few_active_clients():
    """Step by step: who starts is idle, and the queue is that of a heap over slots."""
    fleet = fleet_of(num_active=3)
    state = fleet.init(PARAMS, KEY)
    step = jax.jit(lambda state: fleet.step(state, KEY))
    jobs = np.zeros(N, int)
    slots = [int(i) for i in state.client_id]
    heap = [(TABLE[i, 0], a) for a, i in enumerate(slots)]
    heapq.heapify(heap)
    seen = set(slots)
    for _ in range(40):
        time, a = heapq.heappop(heap)
        assert len(set(slots)) == 3
        assert sorted([*slots, *np.asarray(state.idle.client_id)]) == list(range(N))
        state, event = step(state)
        assert (event.time, event.client_id) == (time, slots[a])
        jobs[slots[a]] += 1
        slots = [int(i) for i in state.client_id]
        seen |= set(slots)
        heapq.heappush(heap, (np.float32(time + TABLE[slots[a], jobs[slots[a]]]), a))
    np.testing.assert_array_equal(state.num_jobs, jobs)
    assert seen == set(range(N))


def test_a_ring_holds_what_slots_would():
    """As many versions as the oldest upload needs, fewer than slots, over three times that many models."""
    _, by_slot, metrics = run(fleet_of(num_active=6), 50, eval_fn=newest)
    late = int(by_slot.staleness.max())
    assert 1 <= late <= 4
    state, in_ring, same = run(fleet_of(num_active=6, max_staleness=late), 50, eval_fn=newest)
    assert state.downloaded["w"].shape == (late + 1,)
    assert_same_bits((by_slot, metrics), (in_ring, same))


def test_two_segments_are_one_run():
    durations = core.lognormal_durations(jnp.arange(1.0, N + 1), 1.0)
    fleet = fleet_of(durations=durations, num_active=4, loss_rate=0.3, max_staleness=2, server=cj.server.fedasync(0.5))
    start = fleet.init(PARAMS, KEY)
    half = jax.jit(lambda state: simulate(fleet, state, KEY, num_events=15)[:2])
    middle, first = half(start)
    end, second = half(middle)
    whole, history = jax.jit(lambda state: simulate(fleet, state, KEY, num_events=30)[:2])(start)
    assert_same_bits(end, whole)
    assert_same_bits(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), history)
    assert history.lost.any() and history.stale.any() and whole.event == 30


def test_jit_is_no_jit_and_the_state_keeps_its_types():
    fleet = fleet_of(num_active=4, loss_rate=0.3)
    state = fleet.init(PARAMS, KEY)
    want, history, _ = run(fleet, 4)
    with jax.disable_jit():
        events = []
        for _ in range(4):
            state, event = fleet.step(state, KEY)
            events.append(event)
    got = jax.tree.map(lambda *x: jnp.stack(x), *events)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), (got, state), (history, want))


def test_one_run_vmaps_over_seeds_and_rates():
    def train(key, alpha):
        durations = core.exponential_durations(jnp.arange(1.0, N + 1))
        fleet = fleet_of(cj.server.fedasync(alpha), durations, num_active=3, max_staleness=3, loss_rate=0.2)
        state, history, _ = simulate(fleet, fleet.init(PARAMS, key), key, num_events=12)
        return state.server.params["w"], history.time, history.accepted

    keys, alphas = jax.random.split(jax.random.key(0), 2), jnp.array([0.2, 0.9])
    swept = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))(keys, alphas)
    alone = jax.jit(train)
    for i, key in enumerate(keys):
        for j, alpha in enumerate(alphas):
            for a, b in zip(swept, alone(key, alpha), strict=True):
                np.testing.assert_allclose(a[i, j], b, rtol=1e-5, atol=1e-6)
    assert len(set(np.ravel(swept[0]).tolist())) == 4


def test_lost_uploads_leave_no_trace_but_take_their_time():
    """Durations are drawn apart from losses: the clock does not change."""
    durations = core.exponential_durations(jnp.arange(1.0, N + 1))
    _, all_, _ = run(fleet_of(durations=durations), 60)
    rates = jnp.array([1.0, 0, 0.5, 0.5, 0.5, 0.5, 0.5])
    state, some, _ = run(fleet_of(durations=durations, loss_rate=rates), 60)
    np.testing.assert_array_equal(some.time, all_.time)
    np.testing.assert_array_equal(some.client_id, all_.client_id)
    lost, who = np.asarray(some.lost), np.asarray(some.client_id)
    assert lost[who == 0].all() and not lost[who == 1].any() and 5 <= lost[who > 1].sum() <= (who > 1).sum() - 5
    np.testing.assert_array_equal(some.accepted, ~lost)
    np.testing.assert_array_equal(state.clients, np.bincount(who[~lost], minlength=N))
    np.testing.assert_array_equal(state.num_jobs, np.bincount(who, minlength=N))
    assert (np.asarray(some.local["draw"])[lost] == 0).all() and state.server.memory.num_uploads == (~lost).sum() % 3

    state, none, _ = run(fleet_of(durations=durations, loss_rate=1.0), 20)
    assert none.lost.all() and not none.accepted.any() and state.server.version == 0 and state.server.params["w"] == 0


def test_a_client_whose_uploads_are_not_finite_is_absent_and_counted():
    dataset = make_dataset()
    owner = np.repeat(np.arange(N), COUNTS)
    bad = dataclasses.replace(dataset, examples=jnp.where(jnp.asarray(owner == 2), jnp.nan, dataset.examples))
    durations = core.exponential_durations(jnp.arange(1.0, N + 1))
    sick, history, _ = run(fleet_of(durations=durations, dataset=bad), 40)
    rates = jnp.zeros(N).at[2].set(1.0)
    lost, same, _ = run(fleet_of(durations=durations, loss_rate=rates), 40)
    assert_same_bits(sick, lost)
    assert_same_bits(history.version, same.version)
    np.testing.assert_array_equal(history.nonfinite, history.client_id == 2)
    np.testing.assert_array_equal(history.nonfinite, same.lost)
    assert history.nonfinite.sum() >= 3 and not history.lost.any()
    assert np.isfinite(sick.server.params["w"])


def test_draws_of_a_client_do_not_depend_on_the_others():
    """Its durations and its training draw from its id and its own jobs, whoever else is active."""
    durations = core.exponential_durations(1.0)
    _, many, _ = run(fleet_of(durations=durations), 40)
    _, few, _ = run(fleet_of(durations=durations, num_active=2), 40)

    def draws(history, i):
        return np.asarray(history.local["draw"])[np.asarray(history.client_id) == i]

    for i in range(N):
        a, b = draws(many, i), draws(few, i)
        shared = min(len(a), len(b))
        np.testing.assert_array_equal(a[:shared], b[:shared])
    assert len(set(np.asarray(many.local["draw"]).tolist())) == 40


def cohort_of(ids):
    return core.take_clients(make_dataset(), jnp.asarray(ids, jnp.int32))._replace(state=jnp.zeros(len(ids), jnp.int32))


def test_fedasync_of_one_at_a_time_is_federated_averaging_client_by_client():
    """alpha = 1 and one active client: each trains on what the one before left, as in rounds of one client."""
    fleet = fleet_of(cj.server.fedasync(1.0), jnp.ones(N), num_active=1)
    _, history, metrics = run(fleet, 10, eval_fn=newest)
    algorithm = cj.federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
    state, step = algorithm.init(PARAMS), jax.jit(algorithm.step)
    for client, got in zip(history.client_id, metrics, strict=True):
        state, _, _ = step(state, cohort_of([client]), KEY)
        np.testing.assert_allclose(got, state.params["w"], rtol=1e-6)
    assert history.time.tolist() == list(range(1, 11)) and not history.staleness.any()


def test_fedbuff_without_staleness_is_federated_averaging():
    """One active client and a buffer of 4: cohorts of 4 that all start from the same model."""
    fleet = fleet_of(cj.server.fedbuff(4, optax.sgd(0.7)), jnp.ones(N), num_active=1)
    _, history, metrics = run(fleet, 12, eval_fn=newest, eval_every=4)
    algorithm = cj.federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(0.7)))
    state, step = algorithm.init(PARAMS), jax.jit(algorithm.step)
    for ids, got in zip(history.client_id.reshape(3, 4), metrics, strict=True):
        state, _, _ = step(state, cohort_of(ids), KEY)
        np.testing.assert_allclose(got, state.params["w"], rtol=1e-6)
    assert not history.staleness.any()


def test_the_first_merge_of_a_whole_fleet_is_one_round():
    """K = C = N and equal durations."""
    fleet = fleet_of(cj.server.fedbuff(N, optax.sgd(1.0)), jnp.full(N, 2.0))
    state, history, _ = run(fleet, N)
    algorithm = cj.federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
    want, _, _ = algorithm.step(algorithm.init(PARAMS), cohort_of(range(N)), KEY)
    np.testing.assert_allclose(state.server.params["w"], want.params["w"], rtol=1e-6)
    assert history.client_id.tolist() == list(range(N)) and set(history.time.tolist()) == {2.0}
    assert state.server.version == 1


def test_ticks_of_the_servers_clock():
    """AFM3D in simulated time, against a Python loop: clients that start after a tick have its model."""
    seconds = np.array([1.0, 1.3, 1.7, 2.2, 6.1, 0.6, 5.0], np.float32)
    fleet = fleet_of(cj.server.afm3d(period=2.0), jnp.asarray(seconds))
    _, history, metrics = run(fleet, 60, eval_fn=newest)
    heap = [(s, i) for i, s in enumerate(seconds)]
    heapq.heapify(heap)
    models, buffer, tick, version_of = [0.0], [], 0, np.zeros(N, int)
    for e in range(60):
        time, i = heapq.heappop(heap)
        while time > 2.0 * (tick + 1):
            tick += 1
            if buffer:
                u = np.exp([-float(late) for late, _ in buffer])
                models.append(float(u @ [m for _, m in buffer] / u.sum()))
                buffer = []
        late = len(models) - 1 - version_of[i]
        buffer.append((late, 0.5 * (models[version_of[i]] + float(MEANS[i]))))
        version_of[i] = len(models) - 1
        heapq.heappush(heap, (np.float32(time + seconds[i]), i))
        assert (history.client_id[e], history.staleness[e], history.version[e]) == (i, late, len(models) - 1)
        np.testing.assert_allclose(metrics[e], models[-1], rtol=1e-5, atol=1e-6)
    assert len(models) >= 5 and history.staleness.max() >= 2


def test_weights_reach_the_server():
    def rule(state, arrival):
        return state, arrival.weight + 100 * arrival.client_id.astype(jnp.float32)

    server = core.async_server(rule)
    own = np.linspace(0.5, 3.5, N).astype(np.float32)
    for weighting, want in (("examples", COUNTS), ("uniform", [1] * N), (jnp.asarray(own), own)):
        _, history, _ = run(fleet_of(server, weighting=weighting), 9)
        who = np.asarray(history.client_id)
        np.testing.assert_allclose(history.coefficient, np.asarray(want)[who] + 100 * who, rtol=1e-6)


def test_a_hundred_thousand_clients():
    """The queue of a large fleet, of which some finish at once."""
    total = 100_000
    seconds = np.random.default_rng(0).integers(1000, 4000, size=total).astype(np.float32) / 1000
    seconds[total // 2 :] += 0.5
    dataset = cj.data.federated_dataset(np.linspace(-1, 1, total, dtype=np.float32), client_id=np.arange(total))
    local = LocalUpdate(lambda params: (), lambda shared, state, data, key: (*visit(shared, 0, data, key)[:1], (), ()))
    fleet = fleet_of(cj.server.fedasync(0.5), jnp.asarray(seconds), local, dataset, max_staleness=1000)
    _, history, _ = run(fleet, 1500)
    heap = [(s, i) for i, s in enumerate(seconds)]
    heapq.heapify(heap)
    for e, (got_time, got_id) in enumerate(zip(history.time.tolist(), history.client_id.tolist(), strict=True)):
        time, i = heapq.heappop(heap)
        assert (got_time, got_id) == (time, i), e
        heapq.heappush(heap, (np.float32(time + seconds[i]), i))
    assert history.staleness.tolist() == [*range(1002), *[1001] * 498]
    assert history.accepted.sum() == 1001 and history.stale.sum() == 499


def test_a_client_that_never_finishes_and_the_end_of_all_events():
    """Durations that are negative or NaN are never over; when nothing is left, events are empty."""

    def once(key, client_id, count):
        return jnp.where(count > 0, jnp.where(client_id % 2 == 0, -1.0, jnp.nan), client_id.astype(jnp.float32))

    state, history, _ = run(fleet_of(durations=once), N + 3)
    assert history.client_id[:N].tolist() == list(range(N)) and history.time[:N].tolist() == list(range(N))
    assert (np.asarray(history.client_id[N:]) >= N).all() and history.time[N:].tolist() == [N - 1] * 3
    flags = (history.accepted, history.lost, history.stale, history.nonfinite)
    assert np.stack(flags)[:, N:].sum() == 0 and history.accepted[:N].all()
    assert state.clients.tolist() == [1] * N and state.server.version == 2


def test_clients_that_come_later_wait_outside():
    """With fewer slots than clients, nobody works before it has come."""
    starts = jnp.array([0.0, 0.0, 0.0, 10.0, 10.0, 20.0, 1e9])
    _, history, _ = run(fleet_of(durations=jnp.ones(N), num_active=2, start_times=starts), 80)
    time, who = np.asarray(history.time), np.asarray(history.client_id)
    assert (time >= np.asarray(starts)[who] + 1).all()
    assert set(who) == {0, 1, 2, 3, 4, 5} and history.accepted.all()


def test_time_in_float64(x64):
    """A million seconds after the start, float32 would lose steps of a hundredth."""
    durations = by_table(np.full((N, 64), 0.01) + 1e6 * (np.arange(64) == 0))
    _, history, _ = run(fleet_of(durations=durations), 3 * N)
    assert history.time.dtype == jnp.float64
    np.testing.assert_allclose(history.time - 1e6, np.repeat([0.01, 0.02, 0.03], N), rtol=1e-6)
    assert history.local["start"].dtype == jnp.float32


def test_local_updates_by_their_factors_and_wider_broadcasts():
    """A low-rank upload arrives as arrays; what `share` makes is what is downloaded."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
    dataset = cj.data.federated_dataset({"x": x, "y": y}, client_id=[0, 0, 1, 1])

    def loss_fn(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    params = {"w": jnp.zeros((3, 2))}
    results = []
    for representation in ("dense", "lowrank"):
        local = cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=2, representation=representation)
        local = local._replace(share=lambda p: jax.tree.map(lambda w: w + 1.0, p))
        fleet = simulation(cj.server.fedasync(0.5), local, dataset, durations=jnp.array([1.0, 1.5]))
        results.append(simulate(fleet, fleet.init(params, KEY), KEY, num_events=5)[0].server)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert results[0].version == 5 and (results[0].params["w"] != 1).all()


def test_histogram_of_staleness():
    _, history, _ = run(fleet_of(durations=by_table(TABLE), loss_rate=0.2), 60)
    late = np.asarray(history.staleness)[np.asarray(history.accepted)]
    got = core.staleness_histogram(history, 2)
    np.testing.assert_array_equal(got, np.bincount(np.minimum(late, 2), minlength=3))
    assert got.sum() == history.accepted.sum() < 60 and got[1] > 0


def test_no_events():
    fleet = fleet_of()
    start = fleet.init(PARAMS, KEY)
    state, history, metrics = simulate(fleet, start, KEY, num_events=0, eval_fn=newest)
    assert_same_bits(state, start)
    assert history.time.shape == (0,) and metrics.shape == (0,)


def test_donated_states_share_no_buffer():
    fleet = fleet_of(num_active=2, max_staleness=0)
    step = jax.jit(lambda state: simulate(fleet, state, KEY, num_events=2)[0], donate_argnums=0)
    assert step(step(fleet.init(PARAMS, KEY))).event == 4
    assert PARAMS["w"] == 0  # the caller's arrays are still there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_active": 0}, r"num_active must satisfy 1 <= num_active <= 7 \(all clients\), got 0"),
        ({"num_active": 8}, "num_active must satisfy"),
        ({"max_staleness": -1}, "max_staleness must be at least 0, got -1"),
        ({"loss_rate": 1.5}, "loss_rate must satisfy 0 <= loss_rate <= 1, got 1.5"),
        ({"loss_rate": jnp.ones(3)}, r"loss_rate must be a scalar or \[N\] = \[7\], got the shape \(3,\)"),
        ({"weighting": "size"}, "weighting must be .*, got 'size'"),
        ({"weighting": jnp.ones(2)}, r"weighting must be a scalar or \[N\] = \[7\]"),
        ({"durations": jnp.ones(3)}, r"durations must be a scalar or \[N\] = \[7\], got the shape \(3,\)"),
        ({"start_times": jnp.ones(3)}, "start_times must be a scalar or"),
        ({"durations": lambda key, client_id, count: jnp.ones(2)}, r"durations must return a scalar, got .* \(2,\)"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        fleet_of(**options).init(PARAMS, KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_events": -1}, "num_events must be at least 0, got -1"),
        ({"num_events": 3, "eval_every": 0}, "eval_every must be at least 1 and divide num_events, got 0 and 3"),
        ({"num_events": 3, "eval_every": 2, "eval_fn": newest}, "got 2 and 3"),
    ],
)
def test_options_of_a_run(options, message):
    fleet = fleet_of()
    with pytest.raises(ValueError, match=message):
        simulate(fleet, fleet.init(PARAMS, KEY), KEY, **options)
    with pytest.raises(ValueError, match="max_staleness must be at least 0, got -1"):
        core.staleness_histogram(None, -1)
