"""FetchSGD against its algorithm in numpy, with the sketch written as a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import testing
from cedarjax.compress.codec import Codec, lift
from cedarjax.compress.count_sketch import count_sketch, sketch
from cedarjax.compress.fetchsgd import fetchsgd, fetchsgd_of_mean, keep_largest
from cedarjax.compress.send import send_compressed

SHAPES = {"a": (4, 3), "b": (8,)}
LENGTH = 20
IDENTITY = lift(Codec(lambda v, key: v, lambda p, d: p, lambda p, d: 32 * d), "model")


def draw(rng, *lead):
    return {name: jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32) for name, shape in SHAPES.items()}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def sketches(compressor, updates):
    return jax.vmap(lambda delta: compressor.compress(delta, (), jax.random.key(0))[0])(updates)


def sketch_matrix(num_rows, num_cols):
    table = jax.vmap(lambda row: sketch(row, num_rows=num_rows, num_cols=num_cols))(jnp.eye(LENGTH))
    return np.moveaxis(np.asarray(table, np.float64), 0, -1)


class Server:
    """The paper's Algorithm 1, with momentum factor masking."""

    def __init__(self, matrix, num_kept, momentum, error):
        self.matrix, self.num_kept, self.momentum, self.rule = matrix, num_kept, momentum, error
        self.u = self.e = np.zeros(matrix.shape[:2])

    def step(self, mean, rate):
        self.u = self.momentum * self.u + self.matrix @ mean
        self.e = self.e + rate * self.u
        estimates = np.median(np.einsum("rcd,rc->rd", self.matrix, self.e), axis=0)
        step = np.zeros_like(estimates)
        largest = np.argsort(-np.abs(estimates), kind="stable")[: self.num_kept]
        step[largest] = estimates[largest]
        applied = self.matrix @ step
        self.e = self.e - applied if self.rule == "subtract" else np.where(applied == 0, self.e, 0)
        self.u = np.where(applied == 0, self.u, 0)
        return step


def top_k_momentum(num_kept, momentum):
    """Momentum SGD with the largest numbers of an exact error, where what is applied loses its momentum."""
    u = e = np.zeros(LENGTH)

    def step(mean):
        nonlocal u, e
        u = momentum * u + mean
        e = e + u
        largest = np.argsort(-np.abs(e))[:num_kept]
        out = np.zeros(LENGTH)
        out[largest] = e[largest]
        e, u = e - out, np.where(out == 0, u, 0)
        return out

    return step


def halving(count):
    return 0.5 / (1 + count.astype(jnp.float32))


@pytest.mark.parametrize("error", ["subtract", "zero"])
@pytest.mark.parametrize("weights", [None, np.array([1.0, 4.0, 0.5])])
def test_against_the_algorithm(weights, error):
    compressor, rng = count_sketch(3, 11), np.random.default_rng(0)
    rule = fetchsgd(compressor, num_kept=4, momentum=0.7, learning_rate=halving, error=error)
    params = draw(rng)
    state, server, update = rule.init(params), Server(sketch_matrix(3, 11), 4, 0.7, error), jax.jit(rule.update)
    shares = np.ones(3) / 3 if weights is None else weights / weights.sum()
    for t in range(6):
        rows = draw(rng, 3)
        mean = shares @ np.stack([flat(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(3)])
        want = server.step(mean, 0.5 / (1 + t))
        out, state = update(
            sketches(compressor, rows), state, weights=None if weights is None else jnp.asarray(weights, jnp.float32)
        )
        assert jax.tree.map(jnp.shape, out) == SHAPES and np.count_nonzero(flat(out)) == 4
        np.testing.assert_allclose(flat(out), want, atol=1e-5)
        np.testing.assert_allclose(state.momentum.payload, server.u, atol=1e-5)
        np.testing.assert_allclose(state.error.payload, server.e, atol=1e-5)
    assert state.round == 6 and state.num_nonfinite == 0


@pytest.mark.parametrize("error", ["subtract", "zero"])
@pytest.mark.parametrize("compressor", [count_sketch(3, 2**14), IDENTITY])
def test_without_collisions_it_is_momentum_and_the_largest_of_the_error(compressor, error):
    if compressor is not IDENTITY:
        cells = np.abs(sketch_matrix(3, 2**14)).sum(axis=2)
        assert cells.max() == 1  # nobody meets anybody
    rng = np.random.default_rng(0)
    rule, step = fetchsgd(compressor, num_kept=3, momentum=0.9, error=error), top_k_momentum(3, 0.9)
    state, update = rule.init(draw(rng)), jax.jit(rule.update)
    for _ in range(8):
        rows = draw(rng, 2)
        mean = flat(jax.tree.map(lambda x: x.mean(axis=0), rows))
        out, state = update(sketches(compressor, rows), state)
        np.testing.assert_allclose(flat(out), step(mean), atol=1e-5)


def test_keeping_all_without_momentum_is_the_mean():
    rng = np.random.default_rng(0)
    rule, rows = fetchsgd(IDENTITY, num_kept=LENGTH + 5, momentum=0.0), draw(rng, 3)
    out, state = rule.update(sketches(IDENTITY, rows), rule.init(draw(rng)))
    np.testing.assert_allclose(flat(out), flat(jax.tree.map(lambda x: x.mean(axis=0), rows)), atol=1e-6)
    assert not state.error.payload.any()


def test_zeroing_stays_stable_where_subtracting_diverges():
    rng = np.random.default_rng(0)
    target, compressor = jnp.asarray(rng.normal(size=400), jnp.float32), count_sketch(5, 40)
    lengths = {}
    for error in ("zero", "subtract"):
        rule = fetchsgd(compressor, num_kept=20, momentum=0.0, learning_rate=0.1, error=error)

        def step(carry, _, rule=rule):
            params, state = carry
            out, state = rule.update(sketches(compressor, (params - target)[None]), state)
            return (params - out, state), None

        run = jax.jit(lambda start, step=step: jax.lax.scan(step, start, None, length=60)[0][0])
        lengths[error] = np.linalg.norm(run((jnp.zeros(400), rule.init(target))) - target) / np.linalg.norm(target)
    assert lengths["zero"] < 1 < 100 < lengths["subtract"]


def test_a_fraction_is_a_number():
    rng = np.random.default_rng(0)
    rows, params = sketches(IDENTITY, draw(rng, 3)), draw(rng)
    one, other = fetchsgd(IDENTITY, fraction=0.26), fetchsgd(IDENTITY, num_kept=5)
    out, _ = one.update(rows, one.init(params))
    np.testing.assert_array_equal(flat(out), flat(other.update(rows, other.init(params))[0]))
    assert np.count_nonzero(flat(out)) == 5


def test_keep_largest():
    tree = {"a": jnp.array([[1.0, -7.0], [3.0, 0.0]]), "b": jnp.array([3.0, 5.0], jnp.bfloat16), "c": jnp.zeros(())}
    for num_kept, kept in ((1, [0, -7, 0, 0, 0, 0, 0]), (3, [0, -7, 3, 0, 0, 5, 0]), (99, [1, -7, 3, 0, 3, 5, 0])):
        out = keep_largest(tree, num_kept)
        np.testing.assert_array_equal(flat(out), kept)
        assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, tree)


def test_clients_that_are_absent_or_failed_count_for_nothing():
    compressor, rng = count_sketch(3, 50), np.random.default_rng(0)
    rule, rows = fetchsgd(compressor, num_kept=5), draw(rng, 4)
    want, _ = rule.update(sketches(compressor, jax.tree.map(lambda x: x[:2], rows)), rule.init(draw(rng)))
    broken = rows | {"b": rows["b"].at[2, 3].set(jnp.nan).at[3].set(jnp.inf)}
    out, state = jax.jit(rule.update)(
        sketches(compressor, broken), rule.init(draw(rng)), weights=jnp.array([2.0, 2.0, 0.0, 1.0])
    )
    np.testing.assert_allclose(flat(out), flat(want), atol=1e-6)
    assert state.num_nonfinite == 1


def sketched_first(compressor, **options):
    """FetchSGD behind clients that sketch, with the face of an aggregator of dense updates."""
    rule = fetchsgd(compressor, **options)

    def update(updates, state, params=None, **extra):
        return rule.update(sketches(compressor, updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(rule.init, update)


LAWS = [law for law in testing.AGGREGATOR_LAWS if law != "reads_weights_by_layer"]  # a sketch has no layers


def law_case(mesh):
    rng = np.random.default_rng(1)
    rule = sketched_first(count_sketch(3, 2**10), num_kept=6)
    weights = jnp.asarray(rng.uniform(1.0, 9.0, 6), jnp.float32)
    return testing.AggregatorCase(rule, draw(rng, 6), draw(rng), weights, mesh, (jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize("law", LAWS)
def test_laws(law, mesh):
    testing.AGGREGATOR_LAWS[law](law_case(mesh))


def test_scales_along(mesh):
    testing.EQUIVARIANCES["scale"](law_case(mesh))


# Rounds


def problem(num_clients=4):
    """Clients that are pulled to sparse vectors of their own."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(num_clients, 1, 40)) * (rng.uniform(size=40) < 0.2)
    local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.sum((w - x[0]) ** 2), optax.sgd(0.5), batch_size=1)
    ones = jnp.ones(num_clients, jnp.int32)
    data = cj.ClientData(jnp.asarray(targets, jnp.float32), num_examples=ones, num_support=ones)
    weights = jnp.arange(1.0, num_clients + 1)
    return local, data, weights, np.average(targets[:, 0], axis=0, weights=np.arange(1, num_clients + 1))


def cohort_of(algorithm, data, weights):
    count = weights.shape[0]
    one = algorithm.init_client(jnp.zeros(40))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), one)
    return cj.Cohort(data, weights=weights, client_id=jnp.arange(count), state=state)


@pytest.mark.parametrize("error", ["subtract", "zero"])
def test_rounds_converge_and_streamed_rounds_agree(error):
    local, data, weights, target = problem()
    compressor = count_sketch(5, 30)
    options = {"num_kept": 4, "momentum": 0.5, "learning_rate": 0.5, "error": error}
    sending = send_compressed(local, compressor)
    algorithms = [
        cj.federated_round(sending, optax.chain(fetchsgd(compressor, **options), optax.sgd(1.0))),
        cj.federated_round(
            sending, optax.chain(fetchsgd(compressor, **options), optax.sgd(1.0)), cj.core.cohort_map(chunk_size=3)
        ),
        cj.streamed_round(local, optax.chain(fetchsgd_of_mean(compressor, **options), optax.sgd(1.0))),
    ]
    cohorts = [cohort_of(algorithm, data, weights) for algorithm in algorithms]
    states = [algorithm.init(jnp.zeros(40)) for algorithm in algorithms]
    steps = [jax.jit(algorithm.step) for algorithm in algorithms]
    for i in range(60):
        told = [step(*args, jax.random.key(i)) for step, *args in zip(steps, states, cohorts, strict=True)]
        states = [state for state, _, _ in told]
        if i == 4:
            for state in states[1:]:
                np.testing.assert_allclose(state.params, states[0].params, atol=1e-5)
    np.testing.assert_array_equal(told[0][2].local.uploaded_bits, [32 * 150] * 4)
    for state in states:
        assert np.linalg.norm(state.params - target) < 0.05 * np.linalg.norm(target)


def test_on_a_mesh(mesh):
    local, data, weights, _ = problem(8)
    compressor = count_sketch(3, 30)
    sending = send_compressed(local, compressor)
    server = optax.chain(fetchsgd(compressor, num_kept=4), optax.sgd(1.0))
    plain = cj.federated_round(sending, server)
    sharded = cj.federated_round(sending, server, cj.core.cohort_map(mesh=mesh))
    cohort = cohort_of(plain, data, weights)
    states = []
    for algorithm in (plain, sharded):
        state = algorithm.init(jnp.zeros(40))
        for i in range(3):
            state, _, _ = jax.jit(algorithm.step)(state, cohort, jax.random.key(i))
        states.append(state.params)
    np.testing.assert_allclose(states[1], states[0], atol=1e-5)


def test_sending_leaves_the_local_update_as_it_is():
    local, data, _, _ = problem()
    sending = send_compressed(local, IDENTITY)
    one, key = jax.tree.map(lambda x: x[0], data), jax.random.key(3)
    params = jnp.ones(40)
    want, _, info = local.update(params, local.init(params), one, key)
    upload, state, told = sending.update(params, sending.init(params), one, key)
    np.testing.assert_array_equal(IDENTITY.decompress(upload.delta), want.delta)
    assert upload.mask is None and told.local == info and state.client_state == ()
    assert told.uploaded_bits == 1280 and told.uploaded_bytes == 160 and told.full_bytes == 160
    np.testing.assert_array_equal(sending.model(params, state), params)


def test_sending_refuses_layers_that_are_left_out():
    def update(shared, client_state, data, key):
        return cj.Upload(shared, {"w": jnp.float32(1)}), client_state, ()

    sending = send_compressed(cj.LocalUpdate(lambda params: (), update), count_sketch(3, 4))
    params = {"w": jnp.ones(9)}
    with pytest.raises(ValueError, match="local_update must upload all layers"):
        sending.update(params, sending.init(params), None, jax.random.key(0))


def test_refuses():
    compressor, rng = count_sketch(3, 11), np.random.default_rng(0)
    for make in (fetchsgd, fetchsgd_of_mean):
        with pytest.raises(ValueError, match="num_kept must be at least 1, got 0"):
            make(compressor, num_kept=0)
        with pytest.raises(ValueError, match=r"fraction must lie within \(0, 1\], got 2"):
            make(compressor, fraction=2)
        for both in ({}, {"num_kept": 1, "fraction": 0.1}):
            with pytest.raises(ValueError, match="num_kept or fraction must be given, and not both"):
                make(compressor, **both)
        with pytest.raises(ValueError, match=r"momentum must lie within \[0, 1\), got 1"):
            make(compressor, num_kept=1, momentum=1)
        with pytest.raises(ValueError, match="error must be one of"):
            make(compressor, num_kept=1, error="keep")
    rule = fetchsgd(compressor, num_kept=1)
    with pytest.raises(ValueError, match="as send_compressed uploads it"):
        rule.update(draw(rng, 3), rule.init(draw(rng)))
    other = sketches(count_sketch(3, 11), {"a": jnp.zeros((3, 5))})
    with pytest.raises(ValueError, match="as send_compressed uploads it"):
        rule.update(other, rule.init(draw(rng)))
