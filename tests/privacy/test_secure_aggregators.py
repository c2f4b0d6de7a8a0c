"""`secure_mean`, `secure_sum` and `group_wise` as aggregators: the laws, and the same in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import testing
from cedarjax.privacy import secure_aggregation as secure
from cedarjax.privacy.secure_aggregation import sums

NUM_CLIENTS = 6
CLIP, BITS = 8.0, 20


@pytest.fixture(autouse=True)
def fast_compilation(request):
    """Most of the time here is XLA's. What is compared with no jit is compiled as it would be for a user."""
    jax.config.update("jax_disable_most_optimizations", "jit" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tree(rng, count=NUM_CLIENTS, dtype=np.float32):
    shapes = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": ()}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=(count, *s)), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


AGGREGATORS = {
    "secure_mean": lambda: secure.secure_mean(CLIP, num_bits=BITS, max_weight=10, threshold=3),
    "secure_sum_on_a_ring": lambda: secure.secure_sum(CLIP, max_weight=10, threshold=2, num_neighbors=4),
    "group_wise": lambda: secure.group_wise(cj.robust.median(), 2, CLIP, num_bits=BITS, max_weight=10, threshold=2),
}
LEFT_OUT = {
    "secure_mean": set(),
    # The same code on another graph.
    "secure_sum_on_a_ring": {"agrees_without_jit", "removes_client_axis", "traces_once", "repeats_with_its_key"},
    # Who shares a group with whom follows the clients' places.
    "group_wise": {"ignores_order"},
}
LAWS = [(name, law) for name in AGGREGATORS for law in testing.AGGREGATOR_LAWS if law not in LEFT_OUT[name]]


@functools.cache
def case(name, mesh):
    updates = tree(np.random.default_rng(1))
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    weights = jnp.array([1.0, 9.0, 3.0, 4.0, 2.0, 7.0])
    return testing.AggregatorCase(AGGREGATORS[name](), updates, params, weights, mesh, (jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize(("name", "law"), LAWS)
def test_laws(name, law, mesh):
    testing.AGGREGATOR_LAWS[law](case(name, mesh))


@functools.partial(jax.jit, static_argnums=0)
def jitted(rule, updates, weights, key):
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    return rule.update(updates, rule.init(params), params, weights=weights, key=key)


def step(rule, updates, weights=None, seed=0):
    """Jitted, as a round is."""
    return jitted(rule, updates, weights, jax.random.key(seed))


def rounded(x, clip, bits):
    """What fixed point makes of numbers that are no tie, in double precision."""
    largest = 2 ** (bits - 1) - 1
    return np.round(np.clip(np.asarray(x, np.float64), -clip, clip) * largest / clip) * clip / largest


def test_the_mean_is_that_of_rounded_updates():
    updates = tree(np.random.default_rng(2))
    weights = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])  # which count the same where the largest weight is 1
    out, state = step(secure.secure_mean(1.5, num_bits=10), updates, weights)
    for got, x in zip(jax.tree.leaves(out), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(got, rounded(x, 1.5, 10).mean(axis=0), rtol=1e-6, atol=1e-6)
        assert np.abs(np.asarray(got) - np.clip(x, -1.5, 1.5).mean(axis=0)).max() > 1e-5, "and they are rounded"
    beyond = sum(np.abs(np.asarray(x)).reshape(6, -1).__gt__(1.5).sum(axis=1) for x in jax.tree.leaves(updates))
    assert state.info.num_clipped.tolist() == beyond.tolist() and beyond.any()
    assert state.info.ok and state.info.survived.all() and state.num_refused == 0


def test_weights_are_whole_numbers_within_the_sum():
    updates = tree(np.random.default_rng(3))
    weights = jnp.array([0.0, 0.2, 1.0, 2.6, 3.0, 50.0])
    whole = np.array([0.0, 1.0, 1.0, 3.0, 3.0, 5.0])
    total, _ = step(secure.secure_sum(4.0, max_weight=5), updates, weights)
    mean, _ = step(secure.secure_mean(4.0, max_weight=5), updates, weights)
    for x, s, m in zip(*map(jax.tree.leaves, (updates, total, mean)), strict=True):
        want = np.tensordot(whole, rounded(x, 4.0, 16), axes=1)
        np.testing.assert_allclose(s, want, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(m, want / whole.sum(), rtol=1e-6, atol=1e-6)


def test_a_layer_left_out_is_missing_from_its_own_sum_only():
    updates = tree(np.random.default_rng(4))
    weights = jax.tree.map(lambda x: jnp.ones(NUM_CLIENTS), updates)
    weights["a"]["bias"] = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    updates["a"]["bias"] = updates["a"]["bias"].at[1].set(jnp.nan)  # not sent, so not read
    out, state = step(secure.secure_mean(8.0, num_bits=20), updates, weights)
    bias, kernel = (np.asarray(updates["a"][name], np.float64) for name in ("bias", "kernel"))
    np.testing.assert_allclose(out["a"]["bias"], bias[[0, 2, 5]].mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(out["a"]["kernel"], kernel.mean(axis=0), atol=2e-5)
    assert state.info.survived.all() and not state.info.nonfinite.any()


def test_bad_numbers_drop_out_and_are_told():
    updates = tree(np.random.default_rng(5))
    updates["b"] = updates["b"].at[2].set(jnp.inf)
    updates["a"]["kernel"] = updates["a"]["kernel"].at[4, 1, 1].set(jnp.nan).at[0].set(jnp.nan)
    weights = jnp.ones(NUM_CLIENTS).at[0].set(0.0)
    out, state = step(secure.secure_mean(8.0, num_bits=20, threshold=3), updates, weights)
    assert state.info.nonfinite.tolist() == [False, False, True, False, True, False]
    assert state.info.survived.tolist() == [False, True, False, True, False, True]
    assert state.info.ok
    want = np.asarray(updates["a"]["kernel"], np.float64)[[1, 3, 5]].mean(axis=0)
    np.testing.assert_allclose(out["a"]["kernel"], want, atol=2e-5)


def test_too_few_survivors_are_no_step_and_flagged():
    updates = tree(np.random.default_rng(6))
    rule = secure.secure_mean(8.0)  # a majority of six is four
    for num_survivors, ok in ((4, True), (3, False)):
        weights = (jnp.arange(NUM_CLIENTS) < num_survivors).astype(jnp.float32)
        out, state = step(rule, updates, weights)
        assert bool(state.info.ok) is ok and int(state.num_refused) == (not ok)
        assert any(bool(x.any()) for x in jax.tree.leaves(out)) is ok


@pytest.mark.slow
def test_the_key_the_graph_and_the_threshold_change_no_bit():
    updates, weights = tree(np.random.default_rng(7)), jnp.ones(NUM_CLIENTS).at[3].set(0.0)
    want = step(secure.secure_mean(8.0), updates, weights)[0]
    for options, seed in (({"threshold": 2}, 1), ({"num_neighbors": 4, "threshold": 3}, 2)):
        got = step(secure.secure_mean(8.0, **options), updates, weights, seed)[0]
        for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_large_leaves_go_block_by_block(monkeypatch):
    monkeypatch.setattr(sums, "block_width", lambda count, factor: 512)
    rng = np.random.default_rng(8)
    updates = {
        "large": jnp.asarray(rng.normal(size=(4, 50, 101)), jnp.float32),
        "odd": jnp.asarray(rng.normal(size=(4, 600)), jnp.bfloat16),
        "small": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "empty": jnp.zeros((4, 0), jnp.float32),
    }
    out, _ = step(secure.secure_sum(8.0), updates)
    for name, x in updates.items():
        assert out[name].dtype == x.dtype and out[name].shape == x.shape[1:]
        want = np.asarray(x.astype(jnp.float32), np.float64).sum(axis=0)
        rtol = 2.0**-8 if name == "odd" else 0.0  # the result is rounded to its dtype
        np.testing.assert_allclose(out[name].astype(jnp.float32), want, rtol, secure.error_bound(8.0, 16, 4))


def test_stochastic_rounding_follows_the_key_and_is_right_in_the_mean():
    updates = {"a": jnp.full((3, 4000), 0.3, jnp.float32)}
    rule = secure.secure_mean(1.0, num_bits=2, stochastic=True)  # -1, 0 or 1
    once, again, other = (step(rule, updates, seed=seed)[0]["a"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    thirds = np.round(np.asarray(once) * 3).astype(int)
    # Three clients that draw apart: the sum is binomial.
    want = 4000 * np.array([0.7**3, 3 * 0.3 * 0.7**2, 3 * 0.3**2 * 0.7, 0.3**3])
    counts = np.bincount(thirds, minlength=4)
    assert (np.abs(counts - want) < 5 * np.sqrt(want)).all()


def test_the_clip_may_be_traced():
    updates = tree(np.random.default_rng(9))

    def run(clip):
        rule = secure.secure_mean(clip, num_bits=12)
        return rule.update(updates, rule.init(None), key=jax.random.key(0))[0]

    for clip, got in zip((0.5, 2.0), np.asarray(jax.jit(jax.vmap(run))(jnp.array([0.5, 2.0]))["b"]), strict=True):
        np.testing.assert_allclose(got, rounded(updates["b"], clip, 12).mean(), atol=1e-6)


def linear(params, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def test_a_federated_round_by_way_of_a_secure_sum():
    rng = np.random.default_rng(10)
    examples = {"x": jnp.asarray(rng.normal(size=(4, 8, 3)), jnp.float32), "y": jnp.asarray(rng.normal(size=(4, 8)))}
    examples = jax.tree.map(lambda x: x.astype(jnp.float32), examples)
    counts = jnp.array([8, 8, 8, 4], jnp.int32)
    cohort = cj.Cohort(
        cj.ClientData(examples, counts, counts), jnp.array([3.0, 1.0, 2.0, 0.0]), jnp.arange(4, dtype=jnp.int32)
    )
    local = cj.local.sgd(linear, optax.sgd(0.1), batch_size=4)
    states = []
    for rule in (cj.robust.mean(), secure.secure_mean(1.0, num_bits=24, max_weight=3, threshold=2)):
        algorithm = cj.federated_round(local, optax.chain(rule, optax.sgd(1.0)))
        state, _, info = jax.jit(algorithm.step)(algorithm.init(jnp.zeros(3)), cohort, jax.random.key(0))
        states.append(state.params)
    np.testing.assert_allclose(*states, atol=1e-6)
    assert info.server[0].survived.tolist() == [True, True, True, False]


@pytest.mark.parametrize("wrapped", ["secure_mean", "group_wise"])
def test_rows_of_a_pre_aggregator_are_refused(wrapped):
    rule = {"secure_mean": secure.secure_mean(1.0), "group_wise": secure.group_wise(cj.robust.median(), 2, 1.0)}[
        wrapped
    ]
    outside = cj.robust.nnm(1, rule)
    updates = tree(np.random.default_rng(11))
    with pytest.raises(TypeError, match="under a secure sum nobody sees a client's row"):
        jax.eval_shape(lambda u: outside.update(u, outside.init(None), key=jax.random.key(0)), updates)


def test_a_rule_behind_a_secure_sum_finds_no_clients():
    chain = optax.chain(secure.secure_mean(1.0), cj.robust.krum(1))
    updates = tree(np.random.default_rng(12))
    with pytest.raises(ValueError, match="updates must have a client axis on every leaf|updates must agree"):
        jax.eval_shape(lambda u: chain.update(u, chain.init(None), key=jax.random.key(0)), updates)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: secure.secure_mean(-1.0), "clip must be positive and finite, got -1.0"),
        (lambda: secure.secure_mean(1.0, num_bits=25), "num_bits must be from 2 to 24, got 25"),
        (lambda: secure.secure_sum(1.0, max_weight=0), "max_weight must be at least 1, got 0"),
        (lambda: secure.secure_sum(1.0, threshold=1), "threshold must be at least 2, .* got 1"),
        (lambda: secure.secure_mean(1.0, num_neighbors=0), "num_neighbors must be at least 1, got 0"),
        (lambda: secure.group_wise(cj.robust.mean(), 0, 1.0), "num_groups must be at least 1, got 0"),
    ],
)
def test_options_are_checked_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "count", "message"),
    [
        (secure.secure_mean(1.0, num_bits=24, max_weight=100), 3, r"num_bits must satisfy .* n = 300 clients times"),
        (secure.secure_mean(1.0, threshold=5), 4, "threshold must be from 2 to .* = 4, got 5"),
        (secure.secure_mean(1.0), 1, "num_clients must be at least 2 for a secure sum, got 1"),
        (secure.secure_mean(1.0, num_neighbors=3), 5, "num_neighbors must be even if num_clients is odd, got 3 and 5"),
        (secure.group_wise(cj.robust.median(), 3, 1.0), 5, r"2 \* num_groups <= num_clients, got 3 and 5"),
        (secure.group_wise(cj.robust.median(), 2, 1.0, threshold=4), 6, "threshold must be from 2 to .* = 3, got 4"),
    ],
)
def test_shapes_are_checked_when_traced(rule, count, message):
    updates = {"a": jnp.zeros((count, 2))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda u: rule.update(u, rule.init({"a": jnp.zeros(2)}), key=jax.random.key(0)), updates)


def test_wrong_arguments_are_refused():
    rule = secure.secure_mean(1.0)
    with pytest.raises(ValueError, match="key must be given to draw masks; got None"):
        rule.update({"a": jnp.zeros((3, 2))}, rule.init(None))
    with pytest.raises(TypeError, match="updates must hold floats, got int32 for 'a'"):
        rule.update({"a": jnp.zeros((3, 2), jnp.int32)}, rule.init(None), key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"rule must be an aggregator such as robust.median\(\), got float"):
        secure.group_wise(1.0, 2, 1.0)
    with pytest.raises(TypeError, match="num_groups must be an int, got 2.0"):
        secure.group_wise(cj.robust.median(), 2.0, 1.0)


@pytest.mark.parametrize(("rule", "count", "num_groups"), [("median", 9, 3), ("median", 10, 5), ("mean", 11, 4)])
def test_group_wise_is_the_rule_on_group_means(rule, count, num_groups):
    ours, theirs = {"median": (cj.robust.median, np.median), "mean": (cj.robust.mean, np.mean)}[rule]
    updates = tree(np.random.default_rng(count), count)
    out, state = step(secure.group_wise(ours(), num_groups, 8.0, num_bits=20, threshold=2), updates)
    groups = np.asarray(state.info.group)
    sizes = np.bincount(groups, minlength=num_groups)
    assert sizes.size == num_groups and sizes.max() - sizes.min() <= 1
    assert state.info.num_refused == 0 and state.info.ok and state.info.secure.ok
    for got, x in zip(*map(jax.tree.leaves, (out, updates)), strict=True):
        x = np.asarray(x, np.float64)
        rows = np.stack([x[groups == g].mean(axis=0) for g in range(num_groups)])
        # A mean counts a group as often as it has clients.
        rows = np.repeat(rows, sizes, axis=0) if rule == "mean" else rows
        np.testing.assert_allclose(got, theirs(rows, axis=0), atol=2e-5)


def test_the_rule_is_given_rows_weights_and_a_key():
    def spy(updates, state, params=None, *, weights, key, **extra_args):
        assert extra_args == {"value": 3}
        return jax.tree.map(lambda x: x[0], updates), (updates, weights, key)

    spying = optax.GradientTransformationExtraArgs(lambda params: (), spy)
    rule = secure.group_wise(spying, 3, 8.0, num_bits=20, max_weight=9, threshold=2)
    updates = tree(np.random.default_rng(0), 8)
    weights = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0])
    nobody, round_key = jnp.zeros(8, bool), jax.random.key(0)
    run = jax.jit(lambda u: rule.update(u, rule.init(None), weights=weights, key=round_key, byzantine=nobody, value=3))
    _, state = run(updates)
    rows_of, row_weights, key = state.rule
    assert key.dtype == round_key.dtype and (jax.random.key_data(key) != jax.random.key_data(round_key)).any()
    groups = np.asarray(state.info.group)
    np.testing.assert_allclose(row_weights, np.bincount(groups, np.asarray(weights), minlength=3))
    for rows, x in zip(*map(jax.tree.leaves, (rows_of, updates)), strict=True):
        for g in range(3):
            share = np.where(groups == g, np.asarray(weights, np.float64), 0)
            want = np.tensordot(share / share.sum(), np.asarray(x, np.float64), axes=1)
            np.testing.assert_allclose(rows[g], want, atol=2e-5)


def test_a_group_that_too_few_survive_is_absent():
    updates = tree(np.random.default_rng(1), 9)
    weights = jnp.ones(9).at[jnp.array([0, 1, 2, 3])].set(0.0)  # 5 of 9 in 3 groups: 2, 2 and 1
    rule = secure.group_wise(cj.robust.mean(), 3, 8.0, num_bits=20, threshold=2)
    out, state = step(rule, updates, weights)
    assert state.info.num_refused == 1 and not state.info.secure.ok and state.info.ok
    groups = np.asarray(state.info.group)
    present = [i for i in range(4, 9) if sum(groups[j] == groups[i] for j in range(4, 9)) == 2]
    assert len(present) == 4
    np.testing.assert_allclose(out["b"], np.asarray(updates["b"], np.float64)[present].mean(), atol=2e-5)
    out, state = step(rule, updates, jnp.zeros(9))
    assert not state.info.ok and state.info.num_refused == 3
    assert not any(bool(x.any()) for x in jax.tree.leaves(out))


def test_attackers_spoil_no_more_groups_than_they_are():
    rule = secure.group_wise(cj.robust.median(), 5, 8.0, num_bits=20)
    for seed in range(5):
        honest = np.random.default_rng(seed).normal(size=(20, 6)).astype(np.float32)
        updates = {"a": jnp.asarray(np.where(np.arange(20)[:, None] < 2, np.float32(8), honest))}  # the most they can
        out, state = step(rule, updates, seed=seed)
        groups = np.asarray(state.info.group)
        clean = [g for g in range(5) if g not in groups[:2]]
        means = np.stack([np.asarray(updates["a"])[groups == g].mean(axis=0) for g in clean])
        assert len(clean) >= 3
        assert (out["a"] >= means.min(axis=0) - 1e-4).all() and (out["a"] <= means.max(axis=0) + 1e-4).all()
    # Which the mean of all is not spared.
    assert (np.asarray(step(secure.secure_mean(8.0), updates)[0]["a"]) > honest[2:].mean(axis=0) + 0.5).all()


def test_groups_are_random_and_equal_and_do_not_see_the_absent():
    present = jnp.array([True] * 7 + [False] * 3)
    groups = np.asarray(secure.random_groups(present, 4, jax.random.key(0)))
    assert groups.shape == (4, 3) and sorted(groups.reshape(-1).tolist()) == [*range(10), 10, 10]
    counts = (groups < 7).sum(axis=1)
    assert counts.tolist() == [2, 2, 2, 1]
    alone = np.asarray(secure.random_groups(present[:7], 4, jax.random.key(0)))
    assert [sorted(g[g < 7].tolist()) for g in groups] == [sorted(g[g < 7].tolist()) for g in alone]
    keys = jax.random.split(jax.random.key(1), 2000)
    first = np.asarray(jax.vmap(lambda key: secure.random_groups(jnp.ones(6, bool), 3, key))(keys))
    together = np.mean([(0 in g) == (1 in g) for row in first for g in row[:1]])
    # Client 1 is in client 0's group with probability 1/5, so both or neither are in group 0 with 1/15 + 6/15.
    assert abs(together - 7 / 15) < 5 * np.sqrt(0.25 / 2000)


@pytest.mark.parametrize("make", [secure.secure_mean, lambda *a, **k: secure.group_wise(cj.robust.mean(), 3, *a, **k)])
def test_doubles_are_summed_as_doubles(make, x64):
    rng = np.random.default_rng(13)
    updates = {"a": jnp.asarray(rng.normal(size=(7, 5000))), "b": jnp.asarray(rng.normal(size=(7, 3)))}
    out, _ = step(make(8.0, num_bits=24, stochastic=True), updates)
    for name, x in updates.items():
        assert out[name].dtype == jnp.float64
        np.testing.assert_allclose(out[name], x.mean(axis=0), rtol=0, atol=8.0 / (2**23 - 1))
