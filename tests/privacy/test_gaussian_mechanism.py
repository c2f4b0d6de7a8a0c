import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

import cedarjax as cj
from cedarjax import testing
from cedarjax.core import Mixture
from cedarjax.privacy import clipped_sum, gaussian_mechanism
from tests.privacy import privacy_oracles as oracles

KEY = jax.random.key(0)
SUM = jax.jit(clipped_sum)


def updates_of(num_clients, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 3), "b": {"c": (4,), "d": ()}}
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(size=(num_clients, *s)), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def run(rule, updates, weights=None, key=KEY, state=None, params=None, **extra):
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates) if params is None else params
    weights = jnp.ones(len(jax.tree.leaves(updates)[0])) if weights is None else weights
    state = rule.init(params) if state is None else state
    return rule.update(updates, state, params, weights=weights, key=key, **extra)


def test_against_numpy_without_noise():
    updates = updates_of(7, scale=2.0)
    weights = jnp.array([1.0, 20.0, 0.0, 0.5, 3.0, 0.0, 1.0])
    out, state = run(gaussian_mechanism(0.0, 7.0, 4.0), updates, weights)
    clipped = oracles.clipped_rows(updates, weights, 7.0)
    np.testing.assert_allclose(oracles.vector(out), clipped.sum(axis=0) / 4.0, rtol=1e-5, atol=1e-6)
    info, norms = state.info, np.linalg.norm(oracles.rows(updates), axis=1)
    present = np.asarray(weights) > 0
    np.testing.assert_allclose(info.clipped.norms, np.where(present, norms, 0), rtol=1e-6)
    np.testing.assert_array_equal(info.clipped.clipped, present & (norms > 7.0))
    np.testing.assert_allclose(info.fraction_clipped, (norms > 7.0)[present].mean(), rtol=1e-6)
    np.testing.assert_allclose(info.mean_norm, norms[present].mean(), rtol=1e-6)
    assert info.max_norm == 7.0 and info.noise_std == 0 and info.ok and state.num_releases == 1
    assert 0 < (norms > 7.0)[present].mean() < 1


def test_layers_that_were_left_out_count_as_zeros():
    updates = updates_of(3, scale=5.0)
    weights = {"a": jnp.array([1.0, 0.0, 2.0]), "b": {"c": jnp.array([1.0, 0.5, 0.0]), "d": jnp.zeros(3)}}
    updates["b"]["d"] = jnp.full(3, jnp.nan)  # garbage that nobody sent
    out, state = run(gaussian_mechanism(0.0, 1.0, 10.0), updates, weights)
    want = oracles.clipped_rows(updates, weights, 1.0).sum(axis=0) / 10.0
    np.testing.assert_allclose(oracles.vector(out), want, rtol=1e-5, atol=1e-7)
    assert state.info.clipped.counted.all() and not state.info.clipped.nonfinite.any()
    assert oracles.vector(run(gaussian_mechanism(1.0, 1.0, 10.0), updates, weights)[0])[-1] != 0  # noise is everywhere


odd = st.one_of(
    st.floats(-1e3, 1e3, allow_nan=False, allow_subnormal=False),
    st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e19, -3e38, 3e38, 1e-30]),
)


@given(
    st.lists(st.lists(odd, min_size=4, max_size=4), min_size=4, max_size=4),
    st.floats(1e-3, 1e3),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.data(),
)
def test_one_client_moves_the_sum_by_no_more_than_the_norm(numbers, limit, layers, data):
    """The inequality that everything rests on: whoever is added or removed, and whatever that client or others send."""
    x = np.asarray(numbers, np.float32)
    updates = {"a": jnp.asarray(x[:, :3]), "b": jnp.asarray(x[:, 3])}
    count = len(x)
    masked = data.draw(st.booleans())
    mask = np.resize(np.asarray(layers, np.float32), (2, count)) if masked else np.ones((2, count), np.float32)

    def total(present):
        weights = {"a": jnp.asarray(mask[0] * present), "b": jnp.asarray(mask[1] * present)}
        return oracles.vector(SUM(updates, weights if masked else jnp.asarray(present), jnp.float32(limit))[0])

    everybody = np.ones(count, np.float32)
    base = total(everybody)
    assert np.isfinite(base).all()
    client = data.draw(st.integers(0, count - 1))
    moved = np.linalg.norm(total(np.where(np.arange(count) == client, 0, everybody)) - base)
    assert moved <= limit * (1 + 1e-5 * count)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e18, 1e25, 1e30])
def test_no_length_is_too_large_or_too_small_to_be_clipped(size):
    rows = jnp.asarray(size * np.array([[3.0, 4.0], [0.03, 0.0]]), jnp.float32)
    total, clipped = clipped_sum(rows, jnp.ones(2), np.float32(size))
    np.testing.assert_allclose(total / np.float32(size), [0.63, 0.8], rtol=1e-5)
    assert clipped.clipped.tolist() == [True, False]


def test_the_noise_has_its_variance_and_is_independent_over_rounds_and_numbers():
    """By a chi-square interval over 4096 keys, for every number of the update."""
    updates = updates_of(3)
    rule = gaussian_mechanism(1.5, 2.0, 10.0)
    bare = oracles.vector(run(gaussian_mechanism(0.0, 2.0, 10.0), updates)[0])
    told = jax.vmap(lambda key: run(rule, updates, key=key)[0])(jax.random.split(KEY, 4096))
    noise = (oracles.rows(told) - bare) / (1.5 * 2.0 / 10.0)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 4096)
    squares = (noise**2).sum(axis=0)
    assert ((squares > low) & (squares < high)).all()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T) - np.eye(noise.shape[1])).max() < 5 / np.sqrt(4096)
    np.testing.assert_allclose(run(rule, updates)[1].info.noise_std, 0.3, rtol=1e-6)


def test_the_noise_is_not_that_of_an_attack_in_the_chain():
    """Both draw from the one key of the round."""
    updates = {"a": jnp.zeros((1, 20_000))}
    byzantine = jnp.array([True])
    attack = cj.attacks.gaussian(1.0)
    rows, _ = attack.update(updates, attack.init(None), weights=jnp.ones(1), key=KEY, byzantine=byzantine)
    noise, _ = run(gaussian_mechanism(1.0, 1.0, 1.0), updates)
    correlation = np.corrcoef(oracles.vector(rows), oracles.vector(noise))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(20_000)


def test_leaves_have_noise_of_their_own():
    out, _ = run(gaussian_mechanism(1.0, 1.0, 1.0), {"a": jnp.zeros((2, 5)), "b": jnp.zeros((2, 5))})
    assert not (out["a"] == out["b"]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_and_noise_are_not_rounded_before_they_are_added(dtype):
    """Rounded first, 1,025.25 and its neighbour would be further apart than a client can move the sum."""
    count = 4_101
    updates = {"a": jnp.full((count, 1), 0.25, dtype)}
    out, _ = run(gaussian_mechanism(0.0, 1.0, 1.0), updates)
    assert out["a"].dtype == dtype
    total, _ = clipped_sum(updates, jnp.ones(count), 1.0)
    assert total["a"].dtype == jnp.float32 and total["a"][0] == 1_025.25


def test_float64(x64):
    updates = {"a": jnp.asarray([[3e100, 4e100]])}
    out, _ = run(gaussian_mechanism(0.0, 1.0, 1.0), updates)
    assert out["a"].dtype == jnp.float64
    np.testing.assert_allclose(out["a"], [0.6, 0.8], rtol=1e-12)


def test_it_stops_when_the_rounds_that_were_accounted_for_are_over():
    rule, updates = gaussian_mechanism(1.0, 1.0, 1.0, num_rounds=2), updates_of(3)
    state, told = None, []
    for i in range(4):
        out, state = run(rule, updates, key=jax.random.key(i), state=state)
        told.append((bool(oracles.vector(out).any()), bool(state.info.ok), int(state.num_releases)))
    assert told == [(True, True, 1), (True, True, 2), (False, False, 2), (False, False, 2)]


def test_hyper_parameters_may_be_traced():
    updates = updates_of(3)

    def one(noise, norm, cohort):
        return run(gaussian_mechanism(noise, norm, cohort), updates)[0]

    got = jax.jit(one)(jnp.float32(0.5), jnp.float32(1.0), jnp.float32(2.0))
    want = run(gaussian_mechanism(0.5, 1.0, 2.0), updates)[0]
    np.testing.assert_allclose(oracles.vector(got), oracles.vector(want), rtol=1e-5, atol=1e-6)


def test_low_rank_rows():
    rng = np.random.default_rng(1)
    left, right = (jnp.asarray(rng.normal(size=(4, 2, n)), jnp.float32) for n in (3, 5))
    factors = {"w": cj.core.LowRank.of((left, right))}
    arrays = {"w": jnp.einsum("crm,crn->cmn", left, right)}
    weights, params = jnp.array([1.0, 2.0, 0.0, 1.0]), {"w": jnp.zeros((3, 5))}
    for limit in (1.0, 1e-16):  # the second by scaled squares
        got, state = run(gaussian_mechanism(0.3, limit, 2.0), factors, weights, params=params)
        want, told = run(gaussian_mechanism(0.3, limit, 2.0), arrays, weights, params=params)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-4, atol=1e-6 * limit)
        np.testing.assert_allclose(state.info.clipped.norms, told.info.clipped.norms, rtol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 1e25])
def test_on_a_mesh(mesh, scale):
    """The sum is told to be sharded, also where lengths are found by scaled squares."""
    updates, weights = updates_of(8, scale=scale), jnp.array([1.0, 0.0, 1.0, 1.0, 2.0, 1.0, 0.0, 1.0])
    rule = gaussian_mechanism(0.5, 3.0, 4.0)
    want, _ = run(rule, updates, weights)
    clients = NamedSharding(mesh, PartitionSpec("clients"))
    sharded = jax.device_put((updates, weights), clients)
    got, state = jax.jit(lambda u, w: run(rule, u, w, mesh=mesh))(*sharded)
    np.testing.assert_allclose(oracles.vector(got), oracles.vector(want), rtol=1e-4, atol=1e-5)
    assert state.info.clipped.counted.sum() == 6


def test_a_mixture_is_refused_under_every_pre_aggregator():
    updates = updates_of(4)
    for wrap in (cj.robust.nnm, cj.robust.bucketing):
        rule = wrap(1, gaussian_mechanism(1.0, 1.0, 4.0))
        with pytest.raises(ValueError, match="got mixtures of them.*several clients"):
            jax.eval_shape(lambda u, rule=rule: run(rule, u), updates)
        # Where layers are masked a pre-aggregator writes its rows out, and says so.
        masked = jax.tree.map(lambda x: jnp.ones(4), updates)
        with pytest.raises(ValueError, match="got mixtures of them"):
            jax.eval_shape(lambda u, w, rule=rule: run(rule, u, w), updates, masked)
    with pytest.raises(ValueError, match="got mixtures of them"):
        run(gaussian_mechanism(1.0, 1.0, 4.0), Mixture.of(jnp.eye(4), updates))
    with pytest.raises(ValueError, match="got mixtures of them"):
        run(gaussian_mechanism(1.0, 1.0, 4.0), updates, mixed=True)


def test_a_rule_before_it_is_refused():
    updates = updates_of(4)
    for rule in (cj.robust.mean(), cj.robust.krum(0), cj.robust.median()):
        with pytest.raises(ValueError, match="updates must have a client axis.*robust.mean"):
            jax.eval_shape(lambda u, rule=rule: run(optax.chain(rule, gaussian_mechanism(1.0, 1.0, 4.0)), u), updates)


def test_what_else_is_missing_or_wrong():
    updates, rule = updates_of(4), gaussian_mechanism(1.0, 1.0, 4.0)
    params = jax.tree.map(lambda x: x[0], updates)
    with pytest.raises(ValueError, match="key must be given, the noise is drawn from it"):
        rule.update(updates, rule.init(params), params, weights=jnp.ones(4))
    with pytest.raises(ValueError, match="weights must be given, they tell who is present"):
        rule.update(updates, rule.init(params), params, key=KEY)
    with pytest.raises(ValueError, match=r"weights must be \[C\] with C = 4"):
        run(rule, updates, jnp.ones(3))
    with pytest.raises(ValueError, match="updates must be .* at 'a', got"):
        run(rule, updates, params={**params, "a": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match="the 6 places of the plan's selector, got 4 rows"):
        run(gaussian_mechanism(1.0, 1.0, 4.0, cohort_size=6), updates)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"noise_multiplier": -0.1}, "noise_multiplier must be at least 0 and finite, got -0.1"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be at least 0"),
        ({"max_norm": 0.0}, "max_norm must be above 0 and finite, got 0.0"),
        ({"max_norm": float("inf")}, "max_norm must be above 0 and finite, got inf"),
        ({"expected_cohort": 0}, "expected_cohort must be above 0 and finite, got 0"),
        ({"num_rounds": -1}, "num_rounds must be at least 0, got -1"),
        ({"cohort_size": 0}, "cohort_size must be at least 1, got 0"),
    ],
)
def test_errors_at_construction(changed, message):
    given_ = {"noise_multiplier": 1.0, "max_norm": 1.0, "expected_cohort": 1.0}
    with pytest.raises(ValueError, match=message):
        gaussian_mechanism(**{**given_, **changed})


@functools.cache
def case(noise, mesh):
    updates = updates_of(6, seed=1)
    params = jax.tree.map(lambda x: x[0] * 0, updates)
    weights = jnp.asarray(np.random.default_rng(2).uniform(1.0, 9.0, 6), jnp.float32)
    rule = gaussian_mechanism(noise, 2.0, 5.0)
    return testing.AggregatorCase(rule, updates, params, weights, mesh, (jnp.bfloat16, jnp.float64))


WITHOUT_NOISE = ("survives_few_clients", "reads_weights_by_layer")  # they ask for zeros where nobody is


@pytest.mark.parametrize("law", testing.AGGREGATOR_LAWS)
def test_laws(law, mesh):
    testing.AGGREGATOR_LAWS[law](case(0.0 if law in WITHOUT_NOISE else 0.7, mesh))
