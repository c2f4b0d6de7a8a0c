"""Colluding attackers against plain NumPy in float64: who is honest, what is sent, what happens at the edges."""

import functools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cedarjax.attacks import alie, alie_strength, ipm, mimic, min_max, min_sum, model_replacement, nonfinite, zero
from cedarjax.core import LowRank, dense
from cedarjax.testing import check_attack

FLAGS = np.array([False, True, False, False, True, False, False, False])
WEIGHTS = np.array([1.0, 2.0, 0.0, 3.0, 1.0, 1.0, 0.5, 1.0], np.float32)  # row 2 is absent
HONEST = np.array([0, 3, 6, 7])  # row 5 is not finite
SHAPES = {"a": (8, 3, 4), "b": [(8,), (8, 5)]}

COLLUDING = {
    "alie": alie(1.5),
    "alie_default": alie(),
    "alie_below": alie(-1.0),
    "ipm": ipm(0.7),
    "mimic": mimic(3),
    "mimic_by_direction": mimic(),
    **{f"min_max_{d}": min_max(d) for d in ("unit", "sign", "std")},
    **{f"min_sum_{d}": min_sum(d) for d in ("unit", "sign", "std")},
}

SOME = ("alie_default", "mimic_by_direction", "min_max_std")


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_updates(seed=0, dtype=np.float32, offset=1.0, poison=True):
    rng = np.random.default_rng(seed)

    def leaf(shape):
        x = offset + rng.normal(size=shape)
        if poison:
            x[2], x[5].flat[-1] = np.nan, np.inf
        return x.astype(dtype) if x.ndim > 1 or not poison else np.where(np.arange(8) == 5, 0.5, x).astype(dtype)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def matrix(updates):
    """`[C, D]` in float64."""
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(updates)], axis=1)


def params_of(updates):
    return jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), updates)


def run(transform, updates, flags=FLAGS, weights=WEIGHTS, mesh=None):
    """One round from the initial state, compiled once for every attack and shape."""
    return compiled(transform, mesh)(updates, flags, weights)


@functools.cache
def compiled(transform, mesh):
    def update(updates, flags, weights):
        state = transform.init(params_of(updates))
        return transform.update(updates, state, byzantine=flags, weights=weights, mesh=mesh)[0]

    return jax.jit(update)


def sent(transform, updates, flags=FLAGS, weights=WEIGHTS):
    """What the attackers send, `[D]`; all the same, and all other rows bit for bit as they were."""
    poisoned = run(transform, updates, flags, weights)
    for got, x in zip(jax.tree.leaves(poisoned), jax.tree.leaves(updates), strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        assert np.asarray(got)[~flags].tobytes() == x[~flags].tobytes()
    rows = matrix(poisoned)[flags]
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[0], rows.shape))
    return rows[0]


def quantile(n, f):
    s = n // 2 + 1 - f
    share = (n - f - s) / (n - f)
    return NormalDist().inv_cdf(share) if share > 0.5 else 0.0


def largest(allowed, high=1e6):
    """Largest strength that is allowed, by bisection."""
    low = 0.0
    assert allowed(low) and not allowed(high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def furthest(x, direction, kind):
    mean = x.mean(axis=0)
    p = {"unit": -mean / np.linalg.norm(mean), "sign": -np.sign(mean), "std": -x.std(axis=0, ddof=1)}[direction]
    between = ((x[:, None] - x[None]) ** 2).sum(axis=2)

    def distances(gamma):
        return ((mean + gamma * p - x) ** 2).sum(axis=1)

    if kind == "max":
        return mean + largest(lambda g: distances(g).max() <= between.max() * (1 + 1e-15)) * p
    return mean + largest(lambda g: distances(g).sum() <= between.sum(axis=1).min() * (1 + 1e-15)) * p


def reference(name, x):
    """What the attack `name` sends where the rows of `x` are honest and two attackers are present."""
    mean, std = x.mean(axis=0), x.std(axis=0, ddof=1)
    if name.startswith("min_"):
        _, kind, direction = name.split("_")
        return furthest(x, direction, kind)
    if name == "mimic_by_direction":
        offsets = x - mean
        z = offsets[(offsets**2).sum(axis=1).argmax()]
        z = offsets.T @ (offsets @ z)
        return x[(x @ z).argmax()]
    return {
        "alie": mean + 1.5 * std,
        "alie_default": mean + quantile(len(x) + 2, 2) * std,
        "alie_below": mean - std,
        "ipm": -0.7 * mean,
        "mimic": x[1],
    }[name]


@pytest.mark.parametrize("name", COLLUDING)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_what_is_sent(name, offset):
    updates = make_updates(offset=offset)
    x = matrix(updates)[HONEST]
    wanted = reference(name, x)
    # the mean and a step that may all but cancel it: as exact as the larger of sum and mean
    scale = np.maximum(np.abs(wanted).max(), np.abs(x.mean(axis=0)).max())
    tolerance = 1e-6 * scale * (1 if offset == 0 else 10)
    np.testing.assert_allclose(sent(COLLUDING[name], updates), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", COLLUDING)
def test_what_is_sent_where_an_honest_client_lies_far_out(name):
    updates = make_updates()
    for x in jax.tree.leaves(updates):
        x[6] *= 300
    x = matrix(updates)[HONEST]
    # what is sent is the mean and a step that may all but cancel it
    tolerance = 2e-6 * np.abs(x.mean(axis=0)).max()
    np.testing.assert_allclose(sent(COLLUDING[name], updates), reference(name, x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", COLLUDING)
def test_what_is_sent_in_float64(name, x64):
    updates = make_updates(dtype=np.float64)
    wanted = reference(name, matrix(updates)[HONEST])
    np.testing.assert_allclose(sent(COLLUDING[name], updates), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SOME)
def test_what_is_sent_in_bfloat16(name):
    updates = make_updates(dtype=jnp.bfloat16)
    wanted = reference(name, matrix(updates)[HONEST])
    # one rounding at the end, half a unit of the last of eight bits
    np.testing.assert_allclose(sent(COLLUDING[name], updates), wanted, rtol=2**-8, atol=1e-6)


def test_laws():
    updates = jax.tree.map(jnp.asarray, make_updates(poison=False))
    for attack in (mimic(), zero(), model_replacement(8.0)):
        check_attack(attack, updates, jnp.asarray(FLAGS), dtypes=(jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize("name", COLLUDING)
def test_nobody_flagged_and_everybody(name):
    updates = make_updates(poison=False)
    nobody = run(COLLUDING[name], updates, np.zeros(8, bool))
    jax.tree.map(np.testing.assert_array_equal, nobody, updates)
    everybody = run(COLLUDING[name], updates, np.ones(8, bool))
    np.testing.assert_array_equal(matrix(everybody), 0)


@pytest.mark.parametrize("name", COLLUDING)
def test_one_honest_client(name):
    updates = make_updates(poison=False)
    flags = np.arange(8) != 3
    x = matrix(updates)[3]
    # no spread, no distance: what is left is the client itself
    wanted = -0.7 * x if name == "ipm" else x
    np.testing.assert_allclose(sent(COLLUDING[name], updates, flags), wanted, rtol=1e-6)
    alone = jax.tree.map(lambda x: x[:1], updates)
    np.testing.assert_array_equal(matrix(run(mimic(0), alone, np.array([True]), None)), 0)
    for flag in (False, True):
        got = run(COLLUDING[name] if name != "mimic" else mimic(0), alone, np.array([flag]), None)
        np.testing.assert_array_equal(matrix(got), 0 if flag else matrix(alone))


@pytest.mark.parametrize("name", COLLUDING)
def test_identical_honest_clients(name):
    updates = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), make_updates(poison=False))
    x = matrix(updates)[0]
    np.testing.assert_allclose(sent(COLLUDING[name], updates), -0.7 * x if name == "ipm" else x, rtol=1e-4)


@pytest.mark.parametrize("name", COLLUDING)
def test_absent_attackers_and_weights(name):
    updates = make_updates()
    plain = sent(COLLUDING[name], updates)
    np.testing.assert_array_equal(sent(COLLUDING[name], updates, weights=WEIGHTS * np.float32(3)), plain)
    absent = np.where(np.arange(8) == 4, 0, WEIGHTS).astype(np.float32)
    if name == "alie_default":  # which counts the attackers
        plain = matrix(updates)[HONEST].mean(axis=0) + quantile(5, 1) * matrix(updates)[HONEST].std(axis=0, ddof=1)
    np.testing.assert_allclose(sent(COLLUDING[name], updates, weights=absent), plain, rtol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_a_layer_left_out_counts_as_the_mean_of_the_others(name):
    updates = make_updates(poison=False)
    filled = jax.tree.map(np.copy, updates)
    filled["a"][3] = np.delete(updates["a"], [1, 3, 4], axis=0).mean(axis=0)
    updates["a"][3] = np.nan
    weights = {"a": np.where(np.arange(8) == 3, 0, 1), "b": [np.ones(8), np.ones(8)]}
    weights = jax.tree.map(lambda w: np.asarray(w, np.float32), weights)
    got = sent(COLLUDING[name], updates, weights=weights)
    np.testing.assert_allclose(got, sent(COLLUDING[name], filled, weights=None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_on_a_mesh(name, mesh):
    updates = make_updates()
    plain = sent(COLLUDING[name], updates)
    got = run(COLLUDING[name], *jax.device_put((updates, FLAGS, WEIGHTS), NamedSharding(mesh, P("clients"))), mesh)
    np.testing.assert_allclose(matrix(got)[1], plain, rtol=1e-5, atol=1e-5)


@given(
    hnp.arrays(np.float32, (5, 3), elements=st.floats(-1e6, 1e6, width=32)),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=5, max_size=5),
)
def test_never_nan_from_finite_updates(x, flags, weights):
    flags, weights = np.array(flags), np.array(weights, np.float32)
    for transform in COLLUDING.values():
        got = run(transform, {"a": x}, flags, weights)["a"]
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got[~flags], x[~flags])


@pytest.mark.parametrize("name", COLLUDING)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_no_nan_where_squares_leave_the_range_of_float32(name, scale):
    updates = jax.tree.map(lambda x: x * np.float32(scale), make_updates(poison=False))
    assert not np.isnan(matrix(run(COLLUDING[name], updates))).any()


@pytest.mark.parametrize(("n", "f"), [(50, 24), (10, 2), (11, 5), (20, 9), (7, 3), (4, 1), (2, 1), (1, 0), (5, 0)])
def test_alie_strength(n, f):
    got = alie_strength(jnp.int32(n), jnp.int32(f), jnp.float32)
    np.testing.assert_allclose(got, quantile(n, f), rtol=2e-6, atol=1e-7)
    assert got.dtype == jnp.float32


def test_alie_strength_of_a_majority_is_finite():
    for n in range(1, 12):
        for f in range(n // 2 + 1, n + 1):
            assert 0 <= alie_strength(jnp.int32(n), jnp.int32(f), jnp.float32) < 2


@pytest.mark.parametrize("client", [1, 2, 5])  # flagged, absent, not finite
def test_mimic_falls_back_to_the_first_honest_client(client):
    updates = make_updates()
    np.testing.assert_array_equal(sent(mimic(client), updates), matrix(updates)[0])


def test_mimic_learns_the_direction_over_rounds():
    rng = np.random.default_rng(1)
    rounds = [rng.normal(size=(6, 9)) * np.linspace(1, 2, 9) for _ in range(4)]
    flags = np.arange(6) == 5
    mean, z = 0.0, None
    transform = mimic()
    step = jax.jit(transform.update)
    state = transform.init({"a": jnp.zeros((3, 3))})
    for t, x in enumerate(rounds):
        honest = x[:5]
        mean = (t * mean + honest.mean(axis=0)) / (t + 1)
        offsets = honest - mean
        if z is None:
            z = offsets[(offsets**2).sum(axis=1).argmax()]
        v = offsets.T @ (offsets @ z)
        z = (t * z if t else 0) + v / np.linalg.norm(v)
        z /= np.linalg.norm(z)
        updates = {"a": x.reshape(6, 3, 3).astype(np.float32)}
        poisoned, state = step(updates, state, byzantine=jnp.asarray(flags))
        np.testing.assert_allclose(np.ravel(state.direction["a"]), z, atol=1e-5)
        np.testing.assert_allclose(np.ravel(state.mean["a"]), mean, atol=1e-6)
        np.testing.assert_array_equal(poisoned["a"][5], updates["a"][(honest @ z).argmax()])
    assert state.num_rounds == 4


def test_mimic_keeps_its_state_while_nobody_is_honest_and_starts_when_clients_differ():
    transform = mimic()
    step = jax.jit(transform.update)
    state = transform.init({"a": jnp.zeros(2)})
    updates = {"a": jnp.ones((3, 2))}
    _, same = step(updates, state, byzantine=jnp.ones(3, bool))
    jax.tree.map(np.testing.assert_array_equal, same, state)
    flags = jnp.array([False, False, True])
    _, state = step(updates, state, byzantine=flags)
    np.testing.assert_array_equal(state.direction["a"], 0)
    assert state.num_rounds == 1
    _, state = step({"a": jnp.array([[1.0, 1.0], [1.0, 5.0], [0.0, 0.0]])}, state, byzantine=flags)
    np.testing.assert_allclose(np.abs(state.direction["a"]), [0, 1], atol=1e-6)


def test_crashes_and_replacement():
    updates = make_updates(poison=False)
    np.testing.assert_array_equal(sent(zero(), updates), 0)
    for value in (np.nan, np.inf, -np.inf):
        np.testing.assert_array_equal(sent(nonfinite(value), updates), value)
    got = matrix(run(model_replacement(8.0), updates))
    np.testing.assert_allclose(got[FLAGS], 8 * matrix(updates)[FLAGS], rtol=1e-6)
    np.testing.assert_array_equal(got[~FLAGS], matrix(updates)[~FLAGS])


def test_model_replacement_puts_the_attackers_model_in_place():
    updates = {"a": jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, -2.0]])}
    poisoned = run(model_replacement(4.0), updates, np.arange(4) == 3, None)
    np.testing.assert_allclose(poisoned["a"].mean(axis=0), [1.0, -2.0])


def test_low_rank_updates_are_made_dense():
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 2, 3), (5, 2, 4)))
    updates = {"kernel": LowRank.of((left, right))}
    flags = jnp.arange(5) == 2
    for transform in (zero(), alie(1.0), mimic()):
        state = transform.init({"kernel": jnp.zeros((3, 4))})
        step = jax.jit(transform.update)
        got, _ = step(updates, state, byzantine=flags)
        wanted, _ = step(dense(updates), state, byzantine=flags)
        np.testing.assert_array_equal(got["kernel"], wanted["kernel"])


def test_stateless_ones_in_a_chain():
    tx = optax.chain(ipm(1.0), alie(0.0), zero())
    updates = make_updates()
    got, _ = tx.update(updates, tx.init(None), byzantine=jnp.asarray(FLAGS), weights=jnp.asarray(WEIGHTS))
    np.testing.assert_array_equal(matrix(got)[FLAGS], 0)


@pytest.mark.parametrize(
    ("factory", "value", "message"),
    [
        (alie, np.nan, "z must be finite, or None for the default, got nan"),
        (alie, np.inf, "z must be finite, or None for the default, got inf"),
        (ipm, -0.5, "tau must be at least 0 and finite, got -0.5"),
        (ipm, np.nan, "tau must be at least 0 and finite, got nan"),
        (mimic, -1, "client must be at least 0, or None for the direction's choice, got -1"),
        (min_max, "mean", r"direction must be one of \('unit', 'sign', 'std'\), got 'mean'"),
        (min_sum, "mean", r"direction must be one of \('unit', 'sign', 'std'\), got 'mean'"),
        (model_replacement, -1.0, "scale must be at least 0, got -1.0"),
        (nonfinite, 3.0, "value must be nan, inf or -inf, got 3.0"),
    ],
)
def test_factories_refuse(factory, value, message):
    with pytest.raises(ValueError, match=message):
        factory(value)


def test_update_refuses():
    updates = make_updates()
    for transform in COLLUDING.values():
        state = transform.init(params_of(updates))
        with pytest.raises(ValueError, match=r"byzantine must be given, \[C\] bool with C = 8"):
            transform.update(updates, state)
    with pytest.raises(ValueError, match="client must be smaller than C = 8.*got 8"):
        run(mimic(8), updates)
    with pytest.raises(ValueError, match=r"weights must be \[C\] with C = 8.*\(7,\)"):
        run(ipm(1.0), updates, weights=WEIGHTS[:7])
    with pytest.raises(ValueError, match=r"weights must be one \[C\] vector or a tree of \[C\] vectors"):
        run(ipm(1.0), updates, weights={"a": WEIGHTS})
