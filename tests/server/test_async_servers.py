"""Every asynchronous rule against numpy in float64, over a schedule with staleness 0 to 5, and the laws of them all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import Arrival, Upload

STALENESS = [0, 1, 5, 2, 4, 3, 0, 5, 1, 2]
WEIGHTS = [3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 2.0, 2.0, 1.0, 3.0]
RICHNESS = np.array([0.5, 2.0, 0.0, 1.5])
PARAMS = {"a": np.array([1.0, -2.0, 0.5]), "b": np.array([[0.3, 0.7], [-1.0, 2.0]])}
PERIOD = 2.5


def schedule(masked):
    """Numpy arrivals: what each client started from, its delta, its mask."""
    rng = np.random.default_rng(7)
    arrivals = []
    for i, (staleness, weight) in enumerate(zip(STALENESS, WEIGHTS, strict=True)):
        shared = {name: rng.normal(size=p.shape) for name, p in PARAMS.items()}
        delta = {name: rng.normal(size=p.shape) for name, p in PARAMS.items()}
        mask = {"a": float(i % 3 != 0), "b": float(i not in (2, 3))} if masked else {"a": 1.0, "b": 1.0}
        arrivals.append(
            {"shared": shared, "delta": delta, "mask": mask, "staleness": staleness, "weight": weight}
            | {"client": i % 4, "time": 1.0 + i}
        )
    return arrivals


def to_arrival(one, masked, dtype=jnp.float32):
    def tree(x):
        return {name: jnp.asarray(value, dtype) for name, value in x.items()}

    mask = {name: jnp.float32(m) for name, m in one["mask"].items()} if masked else None
    return Arrival(
        upload=Upload(tree(one["delta"]), mask),
        shared=tree(one["shared"]),
        staleness=jnp.int32(one["staleness"]),
        weight=jnp.float32(one["weight"]),
        client_id=jnp.int32(one["client"]),
        time=jnp.float32(one["time"]),
        info={"loss": jnp.float32(0.0)},
    )


def start():
    return {name: p.copy() for name, p in PARAMS.items()}


def fedasync_oracle(alpha, s):
    def run(arrivals):
        w, path = start(), []
        for one in arrivals:
            for name in w:
                a = alpha * s(one["staleness"]) * one["mask"][name]
                w[name] = (1 - a) * w[name] + a * (one["shared"][name] - one["delta"][name])
            path.append(start() | {k: v.copy() for k, v in w.items()})
        return path, list(range(1, len(arrivals) + 1))

    return run


def fedbuff_oracle(size, rate, s):
    def run(arrivals):
        w, path, versions, buffer, version = start(), [], [], [], 0
        for one in arrivals:
            buffer.append(one)
            if len(buffer) == size:
                for name in w:
                    mass = sum(o["weight"] * o["mask"][name] for o in buffer)
                    late = [o["weight"] * o["mask"][name] * s(o["staleness"]) * o["delta"][name] for o in buffer]
                    w[name] = w[name] - rate * sum(late) / mass if mass else w[name]
                buffer, version = [], version + 1
            path.append({k: v.copy() for k, v in w.items()})
            versions.append(version)
        return path, versions

    return run


def buffered_oracle(weight, size=None, period=None, kept=None):
    """`kept(shares of the layer's weight)` is how much of the old layer stays."""

    def merge(w, buffer):
        for name in w:
            u = np.array([weight(o) * o["mask"][name] for o in buffer])
            if u.sum() == 0:
                continue
            mean = sum(c * (o["shared"][name] - o["delta"][name]) for c, o in zip(u, buffer, strict=True)) / u.sum()
            q = kept(u.sum(), sum(weight(o) for o in buffer)) if kept else 0.0
            w[name] = (1 - q) * mean + q * w[name]

    def run(arrivals):
        w, path, versions, buffer, version, tick = start(), [], [], [], 0, 0
        for one in arrivals:
            if period and one["time"] > (tick + 1) * period:
                while one["time"] > (tick + 1) * period:
                    tick += 1
                if buffer:
                    merge(w, buffer)
                    buffer, version = [], version + 1
            buffer.append(one)
            if size and len(buffer) == size:
                merge(w, buffer)
                buffer, version = [], version + 1
            path.append({k: v.copy() for k, v in w.items()})
            versions.append(version)
        return path, versions

    return run


def concave(r):
    return (1 - np.exp(-2 * np.e * r)) / (1 - np.exp(-2 * np.e))


def hinge(d):
    return 1.0 if d <= 2 else 1 / (0.5 * (d - 2) + 1)


def aifed_weight(o):
    return (np.e / 2) ** -o["staleness"] * o["weight"] * RICHNESS[o["client"]]


def accuracy(params):
    """Any function of the model: here it ignores it."""
    return jnp.float32(0.3)


CASES = {
    "fedasync_constant": (lambda: cj.server.fedasync(0.6, cj.server.constant()), fedasync_oracle(0.6, lambda d: 1.0)),
    "fedasync_polynomial": (lambda: cj.server.fedasync(0.6), fedasync_oracle(0.6, lambda d: (d + 1) ** -0.5)),
    "fedasync_hinge": (lambda: cj.server.fedasync(0.9, cj.server.hinge(0.5, 2.0)), fedasync_oracle(0.9, hinge)),
    "fedasync_exponential": (
        lambda: cj.server.fedasync(1.0, cj.server.exponential(0.7)),
        fedasync_oracle(1.0, lambda d: np.exp(-0.7 * d)),
    ),
    "fedbuff": (
        lambda: cj.server.fedbuff(3, optax.sgd(0.5)),
        fedbuff_oracle(3, 0.5, lambda d: 1 / np.sqrt(1 + d)),
    ),
    "fedbuff_hinge": (
        lambda: cj.server.fedbuff(4, optax.sgd(1.0), cj.server.hinge(0.5, 2.0)),
        fedbuff_oracle(4, 1.0, hinge),
    ),
    "fedfd": (lambda: cj.server.fedfd(buffer_size=3), buffered_oracle(lambda o: (o["staleness"] + 1) ** -0.5, 3)),
    "afm3d": (
        lambda: cj.server.afm3d(period=PERIOD),
        buffered_oracle(lambda o: np.exp(-float(o["staleness"])), period=PERIOD),
    ),
    "afm3d_buffer": (
        lambda: cj.server.afm3d(buffer_size=5),
        buffered_oracle(lambda o: np.exp(-float(o["staleness"])), size=5),
    ),
    "aifed": (
        lambda: cj.server.aifed(jnp.asarray(RICHNESS, jnp.float32), buffer_size=4),
        buffered_oracle(aifed_weight, size=4),
    ),
    "aifed_plain": (
        lambda: cj.server.aifed(base=3.0, period=PERIOD),
        buffered_oracle(lambda o: 3.0 ** -o["staleness"] * o["weight"], period=PERIOD),
    ),
    "slmfed": (
        lambda: cj.server.slmfed_async(accuracy, 0.5, curve="concave_exponential", buffer_size=3),
        buffered_oracle(lambda o: o["weight"], size=3, kept=lambda mass, all_: (1 - mass / all_) * concave(0.6)),
    ),
    "slmfed_federation": (
        lambda: cj.server.slmfed_async(accuracy, 0.5, curve="convex_quadratic", total_weight=24.0, period=PERIOD),
        buffered_oracle(lambda o: o["weight"], period=PERIOD, kept=lambda mass, all_: (1 - mass / 24.0) * 0.6**2),
    ),
}
NAMES = list(CASES)


def initial(server, dtype=jnp.float32):
    return server.init({name: jnp.asarray(p, dtype) for name, p in PARAMS.items()})


def receiver(server):
    return jax.jit(lambda state, arrival: server.receive(server.advance(state, arrival.time), arrival))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rule_equals_its_formula(name, masked):
    build, oracle = CASES[name]
    server, arrivals = build(), schedule(masked)
    path, versions = oracle(arrivals)
    state, receive = initial(server), receiver(server)
    for one, want, version in zip(arrivals, path, versions, strict=True):
        before = state.version
        state, receipt = receive(state, to_arrival(one, masked))
        for leaf in want:
            np.testing.assert_allclose(state.params[leaf], want[leaf], rtol=2e-5, atol=2e-6)
        assert state.version == version and receipt.accepted
        if not name.endswith(("afm3d", "plain", "federation")):  # theirs is merged before the next arrival
            assert receipt.merged == (version > before)
    assert versions[-1] >= 2


@pytest.mark.parametrize("name", NAMES)
def test_laws_of_a_rule(name):
    """Uploads that are not finite or weigh nothing are absent; jit is no jit; the state keeps its shapes and dtypes."""
    server, arrivals = CASES[name][0](), [to_arrival(one, True) for one in schedule(True)[:6]]
    receive = receiver(server)

    def spoil(arrival, value, leaf):
        return arrival._replace(upload=arrival.upload._replace(delta=arrival.upload.delta | {leaf: value}))

    state = clean = eager = initial(server)
    nothing = jnp.zeros((), jnp.float32)
    for i, arrival in enumerate(arrivals):
        clean, told = receive(clean, arrival)
        # A layer that was left out may hold anything.
        holes = {
            leaf: jnp.where(m == 0, jnp.nan, arrival.upload.delta[leaf]) for leaf, m in arrival.upload.mask.items()
        }
        state, receipt = receive(state, arrival._replace(upload=arrival.upload._replace(delta=holes)))
        jax.tree.map(np.testing.assert_array_equal, receipt, told)
        bad = arrival._replace(upload=Upload(arrival.upload.delta))
        for broken in (
            spoil(bad, jnp.full(3, jnp.nan), "a"),
            spoil(bad, jnp.full((2, 2), jnp.inf), "b"),
            arrival._replace(weight=nothing),
            arrival._replace(weight=nothing * jnp.nan),
        ):
            state, receipt = receive(state, broken)
            assert not receipt.accepted and not receipt.merged and receipt.coefficient == 0
        jax.tree.map(np.testing.assert_array_equal, state, clean)
        if i < 3:
            eager, _ = server.receive(server.advance(eager, arrival.time), arrival)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), eager, clean)
    same = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(receive, state, arrivals[0])[0])
    assert same == jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: state))


@pytest.mark.parametrize("name", ["fedasync_polynomial", "fedbuff", "aifed", "slmfed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_same_dtype_out_as_in(name, dtype):
    """And sums in float32 or wider: bfloat16 results are the rounded float64 ones."""
    build, oracle = CASES[name]
    arrivals = schedule(False)[:6]
    path, _ = oracle(arrivals)
    with jax.enable_x64(dtype == "float64"):
        server = build()
        state, receive = initial(server, dtype), receiver(server)
        for one in arrivals:
            state, _ = receive(state, to_arrival(one, False, dtype))
        assert state.params["a"].dtype == dtype
        tolerance = 1e-5 if dtype == "float64" else 4e-2
        np.testing.assert_allclose(np.asarray(state.params["a"], float), path[-1]["a"], rtol=tolerance, atol=tolerance)


def scalar_arrival(model, staleness, client=0, weight=1.0, time=0.0):
    """A client that started at 0 and came to `model`."""
    upload, start = Upload(jnp.float32(-model)), jnp.float32(0.0)
    return Arrival(upload, start, jnp.int32(staleness), jnp.float32(weight), jnp.int32(client), jnp.float32(time))


def test_fedasync_by_hand():
    """All clients come back with 6; a_t = 1/2, 1/4, 1/6, 1/8, 1/10, 1/12 for staleness 0 to 5."""
    server = cj.server.fedasync(0.5, cj.server.polynomial(1.0))
    state = server.init(jnp.float32(0.0))
    path = []
    for staleness in range(6):
        state, receipt = server.receive(state, scalar_arrival(6.0, staleness))
        path.append(float(state.params))
        np.testing.assert_allclose(receipt.coefficient, 0.5 / (staleness + 1), rtol=1e-6)
    np.testing.assert_allclose(path, [3, 3.75, 4.125, 4.359375, 4.5234375, 4.646484375], rtol=1e-6)
    assert state.version == 6


def test_fedbuff_by_hand():
    """K = 3, eta = 2: deltas -3, -6, -12 times 1, 1/2, 1/3 step by 2 * 10 / 3; then -4, -5, -6 times 1/4, 1/5, 1/6."""
    server = cj.server.fedbuff(3, optax.sgd(2.0), cj.server.polynomial(1.0))
    state = server.init(jnp.float32(0.0))
    path = []
    for staleness, model in enumerate([3.0, 6.0, 12.0, 4.0, 5.0, 6.0]):
        state, _ = server.receive(state, scalar_arrival(model, staleness))
        path.append(float(state.params))
    np.testing.assert_allclose(path, [0, 0, 20 / 3, 20 / 3, 20 / 3, 20 / 3 + 2], rtol=1e-6)
    assert state.version == 2 and state.memory.num_uploads == 0


def test_fedbuff_runs_any_optimiser():
    server = cj.server.fedbuff(2, optax.sgd(0.5, momentum=0.5))
    state = server.init(jnp.float32(0.0))
    for model in (2.0, 4.0, 2.0, 4.0):
        state, _ = server.receive(state, scalar_arrival(model, 0))
    np.testing.assert_allclose(state.params, 0.5 * 3 + 0.5 * (3 + 1.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (lambda: cj.server.fedfd(buffer_size=6), [1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5, 6**-0.5]),
        (lambda: cj.server.afm3d(buffer_size=6), [1, np.e**-1, np.e**-2, np.e**-3, np.e**-4, np.e**-5]),
        (lambda: cj.server.aifed(base=2.0, buffer_size=6), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
    ],
)
def test_buffered_weights_by_hand(build, weights):
    """Six models that are unit vectors: their mean is the normalised weights."""
    server = build()
    state, start = server.init(jnp.zeros(6)), jnp.zeros(6)
    for staleness in range(6):
        arrival = scalar_arrival(0.0, staleness)
        arrival = arrival._replace(upload=Upload(-jnp.eye(6)[staleness]), shared=start)
        state, receipt = server.receive(state, arrival)
        np.testing.assert_allclose(receipt.coefficient, weights[staleness], rtol=1e-6)
    np.testing.assert_allclose(state.params, np.array(weights) / np.sum(weights), rtol=1e-6)


def test_models_older_than_exponentials_reach_are_merged_by_their_ratio():
    """exp(-500) is 0 in float32; the softmax of (-500, -501) is not. A fresh model then outweighs both."""
    server = cj.server.afm3d(period=1.0)
    state = server.init(jnp.float32(0.0))
    for staleness, model in ((501, 1.0), (500, 2.0)):
        state, _ = server.receive(state, scalar_arrival(model, staleness))
    np.testing.assert_allclose(server.advance(state, jnp.float32(1.5)).params, (np.e * 2 + 1) / (np.e + 1), rtol=1e-6)
    state, _ = server.receive(state, scalar_arrival(9.0, 0))
    np.testing.assert_allclose(server.advance(state, jnp.float32(1.5)).params, 9.0, rtol=1e-6)


def test_fedfd_with_a_client_that_runs_ahead():
    """Published code takes the root of a negative number there."""
    server = cj.server.fedfd(buffer_size=2)
    state = server.init(jnp.float32(0.0))
    for staleness in (-4, 0):
        state, receipt = server.receive(state, scalar_arrival(3.0, staleness))
        assert receipt.coefficient == 1
    assert state.params == 3


@pytest.mark.parametrize("richness", [[0.0, 0.0], [np.nan, 0.0], [0.0, np.inf]])
def test_clients_without_richness_change_nothing(richness):
    server = cj.server.aifed(jnp.array(richness), buffer_size=2)
    state = server.init(jnp.float32(5.0))
    for client in (0, 1):
        state, _ = server.receive(state, scalar_arrival(1.0, 0, client))
    assert state.params == 5 and state.version == 1 and state.memory.buffer.num_models == 0


def test_a_tick_merges_what_came_by_then_and_makes_nothing_of_nothing():
    server = cj.server.afm3d(period=2.0)
    state = server.init(jnp.float32(0.0))
    state, _ = server.receive(server.advance(state, jnp.float32(1.0)), scalar_arrival(2.0, 0, time=1.0))
    state, _ = server.receive(server.advance(state, jnp.float32(2.0)), scalar_arrival(4.0, 0, time=2.0))
    assert state.version == 0
    state = server.advance(state, jnp.float32(9.0))  # over three ticks: one merge
    assert state.version == 1 and state.memory.tick == 4
    np.testing.assert_allclose(state.params, 3.0, rtol=1e-6)
    assert server.advance(state, jnp.float32(20.0)).version == 1


def test_rates_can_be_swept():
    def run(alpha, base):
        server = cj.server.fedasync(alpha, cj.server.polynomial(0.5))
        first, _ = server.receive(server.init(jnp.float32(0.0)), scalar_arrival(8.0, 3))
        server = cj.server.aifed(base=base, buffer_size=1)
        second, _ = server.receive(server.init(jnp.float32(0.0)), scalar_arrival(8.0, 3))
        return first.params, second.params

    got = jax.vmap(run)(jnp.array([0.5, 1.0]), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(got, [[2.0, 4.0], [8.0, 8.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cj.server.fedasync(0.0), "alpha must satisfy 0 < alpha <= 1, got 0.0"),
        (lambda: cj.server.fedasync(2), "alpha must satisfy 0 < alpha <= 1, got 2"),
        (lambda: cj.server.fedbuff(0, optax.sgd(1.0)), "buffer_size must be at least 1, got 0"),
        (lambda: cj.server.fedfd(), "exactly one of buffer_size and period must be given, got None and None"),
        (lambda: cj.server.afm3d(buffer_size=1, period=1.0), "exactly one of buffer_size and period .* got 1 and 1.0"),
        (lambda: cj.server.fedfd(buffer_size=0), "buffer_size must be at least 1, got 0"),
        (lambda: cj.server.afm3d(period=0.0), "period must be above 0, got 0.0"),
        (lambda: cj.server.aifed(base=0.5, buffer_size=1), "base must be at least 1, got 0.5"),
        (lambda: cj.server.aifed(jnp.ones((2, 2)), buffer_size=1), r"richness must be \[N\], got the shape \(2, 2\)"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
