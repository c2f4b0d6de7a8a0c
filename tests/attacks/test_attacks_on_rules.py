"""Attacks that know the rule: the strength is the best one, and what Fang's attack draws lies where it should."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj
from cedarjax.attacks import fang, optimised_alie, optimised_ipm
from cedarjax.attacks.collusion import know
from cedarjax.attacks.search import Answer, Objective, Plan, strongest
from cedarjax.testing import check_attack

FLAGS = np.array([False, True, False, False, True, False, False, False])
WEIGHTS = np.array([1.0, 2.0, 0.0, 3.0, 1.0, 1.0, 0.5, 1.0], np.float32)  # row 2 is absent
HONEST = np.array([0, 3, 6, 7])  # row 5 is not finite
PRESENT = np.array([0, 1, 3, 4, 6, 7])
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_updates(seed=0, dtype=np.float32, offset=0.5):
    x = offset + np.random.default_rng(seed).normal(size=(8, 9))
    x[2], x[5, -1] = np.nan, np.inf
    x = x.astype(dtype)
    return {"a": x[:, :6].reshape(8, 2, 3), "b": x[:, 6:]}


def matrix(updates):
    """`[C, D]` in float64."""
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(updates)], axis=1)


class RuleState(NamedTuple):
    previous: dict
    rounds: jax.Array
    info: jax.Array | None = None


def near_previous(radius):
    """A rule with a state and an info: the mean of the rows within a distance of the last aggregate, or that one."""

    def init(params):
        return RuleState(params, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, weights=None, **extra_args):
        offsets = jax.tree.map(lambda x, p: x - p[None], updates, state.previous)
        squares = sum(jnp.square(x).reshape(x.shape[0], -1).sum(axis=1) for x in jax.tree.leaves(offsets))
        near = (weights > 0) & (squares < radius**2)
        mean = cj.weighted_mean(updates, near.astype(jnp.float32))
        aggregate = jax.tree.map(lambda m, p: jnp.where(near.any(), m, p), mean, state.previous)
        return aggregate, RuleState(aggregate, state.rounds + 1, near)

    return optax.GradientTransformationExtraArgs(init, update)


def near_previous_in_numpy(rows, radius):
    near = np.linalg.norm(rows, axis=1) < radius
    return rows[near].mean(axis=0) if near.any() else np.zeros(rows.shape[1])


def rule_in_numpy(name, x):
    """What the rule answers to the present rows `x`."""
    return x.mean(axis=0) if name == "mean" else near_previous_in_numpy(x, 5.0)


def weighted(x, rows):
    """`rows` of `x`, each as often as its weight says, in halves."""
    return np.repeat(x[rows], (2 * WEIGHTS[rows]).astype(int), axis=0)


RULES = {"mean": cj.robust.mean(), "near": near_previous(5.0)}


@functools.cache
def compiled(transform, mesh=None):
    def update(updates, state, flags, weights, key):
        return transform.update(updates, state, byzantine=flags, weights=weights, key=key, mesh=mesh)

    return jax.jit(update)


def start(transform, updates):
    return transform.init(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), updates))


def run(transform, updates, flags=FLAGS, weights=WEIGHTS, key=0):
    poisoned, state = compiled(transform)(updates, start(transform, updates), flags, weights, jax.random.key(key))
    for got, x in zip(jax.tree.leaves(poisoned), jax.tree.leaves(updates), strict=True):
        assert got.dtype == x.dtype and np.asarray(got)[~flags].tobytes() == x[~flags].tobytes()
    return poisoned, state


def vector(kind, honest, strength):
    mean = honest.mean(axis=0)
    return mean + strength * honest.std(axis=0, ddof=1) if kind == "alie" else -strength * mean


def harm(kind, rule, updates, strength):
    x = matrix(updates)
    honest = x[HONEST]
    x[FLAGS] = vector(kind, honest, strength)
    rows = weighted(x, PRESENT) if rule == "mean" else x[PRESENT]
    return np.linalg.norm(rule_in_numpy(rule, rows) - honest.mean(axis=0))


FACTORIES = {"alie": optimised_alie, "ipm": optimised_ipm}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("chunk_size", [1, None, 4])
def test_the_best_strength_of_the_grid(kind, rule, chunk_size):
    equal = (WEIGHTS > 0).astype(np.float32)
    for seed in range(3):
        updates = make_updates(seed)
        weights = WEIGHTS if rule == "mean" else equal
        attack = attack_of(kind, rule, chunk_size)
        poisoned, state = run(attack, updates, weights=weights)
        wanted = [harm(kind, rule, updates, s) for s in STRENGTHS]
        np.testing.assert_allclose(state.info.objective, max(wanted), rtol=1e-5)
        np.testing.assert_allclose(state.info.strength, STRENGTHS[int(np.argmax(wanted))])
        sent = vector(kind, matrix(updates)[HONEST], float(state.info.strength))
        np.testing.assert_allclose(matrix(poisoned)[FLAGS], np.stack([sent, sent]), rtol=1e-5, atol=1e-6)


@functools.cache
def attack_of(kind, rule, chunk_size=1, num_refinements=0, strengths=STRENGTHS):
    return FACTORIES[kind](RULES[rule], strengths=strengths, num_refinements=num_refinements, chunk_size=chunk_size)


@pytest.mark.parametrize("peak", [3.2, 2.7, 0.4, 0.0, 7.9, 9.0])
def test_refining_looks_on_both_sides_of_the_best(peak):
    """With a rule whose answer has one peak in what the attackers send."""
    updates, flags = {"a": jnp.zeros(3)}, jnp.array([False, False, True])
    known = know(updates, None, flags)
    strengths = jnp.array([0.0, 1.0, 2.0, 4.0, 8.0])
    nothing, one = {"a": jnp.zeros(())}, {"a": jnp.ones(())}
    plan = Plan(nothing, one, strengths, Objective(nothing, one))
    answer = Answer(lambda rows: ({"a": -jnp.abs(rows["a"][2] - peak)}, ()), tells=False)
    found = strongest(known, updates, plan, answer, 4, cj.cohort_map())
    np.testing.assert_allclose(found, min(peak, 8.0), atol=1 / 3**3 / 2)  # the spacing shrinks to a third each time


@pytest.mark.slow
@pytest.mark.parametrize("kind", FACTORIES)
def test_refining_finds_the_edge_of_the_cliff(kind):
    # beyond some strength the attackers are out of the rule's reach
    fine = np.linspace(0, 8, 20001)
    equal = (WEIGHTS > 0).astype(np.float32)
    for seed in range(3):
        updates = make_updates(seed)
        achieved = [
            float(run(attack_of(kind, "near", num_refinements=n), updates, weights=equal)[1].info.objective)
            for n in (0, 1, 3)
        ]
        best = max(harm(kind, "near", updates, s) for s in fine)
        assert achieved[0] <= achieved[1] + 1e-6 and achieved[1] <= achieved[2] + 1e-6
        assert achieved[2] <= best * (1 + 1e-3)
        np.testing.assert_allclose(achieved[2], best, rtol=0.02)


def test_default_grid_does_at_least_the_harm_of_any_strength_within():
    updates = make_updates()
    equal = (WEIGHTS > 0).astype(np.float32)
    for kind, factory in FACTORIES.items():
        achieved = float(run(factory(RULES["near"]), updates, weights=equal)[1].info.objective)
        assert achieved >= 0.97 * max(harm(kind, "near", updates, s) for s in np.linspace(0, 32, 5001))


def test_the_rules_state_goes_along_with_the_servers():
    attack, rule = attack_of("alie", "near"), RULES["near"]
    updates = make_updates()
    state, server = start(attack, updates), start(rule, updates)
    assert state.info is None
    weights = (WEIGHTS > 0).astype(np.float32)
    for seed in range(3):
        poisoned, state = compiled(attack)(make_updates(seed), state, FLAGS, weights, jax.random.key(0))
        aggregate, server = rule.update(poisoned, server, weights=weights)
        state, (info,) = cj.take_info(state)
        server, _ = cj.take_info(server)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.rule, server)
        honest = matrix(make_updates(seed))[HONEST].mean(axis=0)
        offset = np.concatenate([np.ravel(x) for x in jax.tree.leaves(aggregate)]) - honest
        np.testing.assert_allclose(info.objective, np.linalg.norm(offset), rtol=1e-5)
    assert state.rule.rounds == 3
    assert compiled(attack)._cache_size() == 1


@pytest.mark.parametrize("attack", [attack_of("ipm", "mean"), fang(RULES["mean"]), fang("krum")])
def test_nobody_flagged_and_everybody(attack):
    updates = make_updates()
    poisoned, _ = run(attack, updates, np.zeros(8, bool))
    jax.tree.map(np.testing.assert_array_equal, poisoned, updates)
    poisoned, state = run(attack, updates, np.ones(8, bool))
    np.testing.assert_array_equal(matrix(poisoned), 0)


@pytest.mark.slow
def test_laws():
    updates = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 3)), jnp.float32)}
    flags = jnp.array([False, True, False, False, True, False])
    check_attack(attack_of("alie", "mean", num_refinements=1), updates, flags, dtypes=(jnp.bfloat16, jnp.float64))
    for name in ("median", "krum", cj.robust.mean()):
        check_attack(fang(name), updates, flags, dtypes=(jnp.bfloat16, jnp.float64))


def test_on_a_mesh(mesh):
    attack = attack_of("alie", "mean")
    updates = make_updates()
    plain, _ = run(attack, updates)
    placed = jax.device_put((updates, FLAGS, WEIGHTS), NamedSharding(mesh, P("clients")))
    got, _ = compiled(attack, mesh)(placed[0], start(attack, updates), *placed[1:], jax.random.key(0))
    np.testing.assert_allclose(matrix(got), matrix(plain), rtol=1e-5)


def test_fang_against_trimmed_mean_draws_just_beyond_the_honest_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 400)) + np.repeat([-4.0, -1.0, 1.0, 4.0], 100)
    x[2], x[5, -1] = np.nan, np.inf
    updates = {"a": x.astype(np.float32)}
    attack = fang("trimmed_mean")
    poisoned, state = run(attack, updates)
    assert state == optax.EmptyState()
    honest = matrix(updates)[HONEST]
    least, greatest, up = honest.min(axis=0), honest.max(axis=0), honest.mean(axis=0) > 0
    low = np.where(up, np.where(least > 0, least / 2, 2 * least), greatest)
    high = np.where(up, least, np.where(greatest > 0, 2 * greatest, greatest / 2))
    rows = matrix(poisoned)[FLAGS]
    assert (rows >= low - 1e-5).all() and (rows <= high + 1e-5).all()
    places = (rows - low) / (high - low)
    # 400 uniform draws: four standard errors of their mean and of their variance
    np.testing.assert_allclose(places.mean(axis=1), 0.5, atol=4 * np.sqrt(1 / 12 / 400))
    np.testing.assert_allclose(places.var(axis=1), 1 / 12, atol=4 * np.sqrt(1 / 180 / 400))
    assert abs(np.corrcoef(places)[0, 1]) < 4 / np.sqrt(400)
    # every kind of interval is there
    assert all(case.any() for case in (up & (least > 0), up & (least < 0), ~up & (greatest > 0), ~up & (greatest < 0)))
    jax.tree.map(np.testing.assert_array_equal, run(attack, updates)[0], poisoned)
    assert (matrix(run(attack, updates, key=1)[0])[FLAGS] != rows).mean() > 0.99
    jax.tree.map(np.testing.assert_array_equal, run(fang("median"), updates)[0], poisoned)
    wider = matrix(run(fang("median", factor=4.0), updates)[0])[FLAGS]
    np.testing.assert_allclose(
        wider[:, up & (least < 0)] - least[up & (least < 0)],
        3 * (rows - least)[:, up & (least < 0)],
        rtol=1e-3,
        atol=1e-4,
    )


def krum_in_numpy(x, f):
    between = np.square(x[:, None] - x[None]).sum(axis=2)
    np.fill_diagonal(between, np.inf)
    return np.sort(between, axis=1)[:, : len(x) - f - 2].sum(axis=1).argmin()


@pytest.mark.parametrize("seed", range(5))
def test_fang_against_krum_is_the_greatest_strength_that_krum_selects(seed):
    rng = np.random.default_rng(seed)
    flags = np.arange(9) >= 7
    updates = {"a": (0.3 + rng.normal(size=(9, 12))).astype(np.float32)}
    poisoned, _ = run(fang("krum"), updates, flags, np.ones(9, np.float32))
    x = matrix(updates)
    honest, n, f = x[:7], 9, 2
    sign = np.sign(honest.mean(axis=0))
    between = np.square(honest[:, None] - honest[None]).sum(axis=2)
    nearest = np.sort(between, axis=1)[:, 1 : n - f - 1].sum(axis=1).min()
    bound = np.sqrt(nearest / ((n - 2 * f - 1) * 12)) + np.linalg.norm(honest, axis=1).max() / np.sqrt(12)
    for k in range(21):
        x[flags] = -bound / 2**k * sign
        if krum_in_numpy(x, f) >= 7:
            break
    np.testing.assert_allclose(matrix(poisoned)[flags], x[flags], rtol=1e-5)


def test_fang_against_any_rule_goes_farthest_against_the_signs():
    updates = make_updates()
    weights = (WEIGHTS > 0).astype(np.float32)
    poisoned, state = run(fang(RULES["near"], num_halvings=12), updates, weights=weights)
    x = matrix(updates)
    mean = x[HONEST].mean(axis=0)
    sign = np.sign(mean)
    rows = matrix(poisoned)[FLAGS]
    np.testing.assert_allclose(rows, np.stack([-float(state.info.strength) * sign] * 2), rtol=1e-6)

    def deviation(strength):
        x[FLAGS] = -strength * sign
        return sign @ (mean - near_previous_in_numpy(x[PRESENT], 5.0))

    chosen = float(state.info.strength)
    np.testing.assert_allclose(state.info.objective, deviation(chosen), rtol=1e-4)
    assert all(deviation(chosen * 2.0**k) <= deviation(chosen) * (1 + 1e-5) for k in range(-6, 0))
    # the mean has no cliff: the bound itself is sent
    unbounded, told = run(fang(RULES["mean"], num_halvings=3), updates)
    few, same = run(fang(RULES["mean"], num_halvings=0), updates)
    np.testing.assert_allclose(told.info.strength, same.info.strength, rtol=1e-6)


def leaves_the_client_axis():
    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda updates, state, params=None, **extra: (updates, state)
    )


def test_factories_refuse():
    rule = cj.robust.mean()
    for factory in FACTORIES.values():
        for strengths in ((), (1.0, 0.0), (0.0, 0.0), (0.0, np.inf), (np.nan,)):
            with pytest.raises(ValueError, match="strengths must be finite and ascending, at least one, got"):
                factory(rule, strengths=strengths)
        with pytest.raises(ValueError, match="num_refinements must be at least 0, got -1"):
            factory(rule, num_refinements=-1)
        with pytest.raises(ValueError, match="chunk_size"):
            factory(rule, chunk_size=0)
    with pytest.raises(ValueError, match="rule must be an Aggregator or one of .*got 'mean'"):
        fang("mean")
    for factor in (1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"factor must be above 1 and finite, got {factor}"):
            fang("median", factor=factor)
    with pytest.raises(ValueError, match="num_halvings must be at least 0, got -1"):
        fang("krum", num_halvings=-1)


def test_update_refuses():
    updates = make_updates()
    for attack in (optimised_alie(leaves_the_client_axis()), fang(leaves_the_client_axis())):
        with pytest.raises(ValueError, match="rule must be an aggregator, which removes the client axis"):
            attack.update(updates, start(attack, updates), byzantine=jnp.asarray(FLAGS))
    attack = fang("median")
    with pytest.raises(ValueError, match="key must be given"):
        attack.update(updates, attack.init(None), byzantine=jnp.asarray(FLAGS))
    with pytest.raises(ValueError, match="byzantine must be given"):
        attack.update(updates, attack.init(None), key=jax.random.key(0))
