"""Pre-aggregators hand a rule other rows: the same as the rule on rows that numpy wrote out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax import core, robust
from cedarjax.robust.bucketing import random_buckets
from tests.robust import robust_oracles as oracles

NUM_CLIENTS, F = 11, 2
SHAPES = {"a": (2, 3), "b": {"c": (4,)}}
WEIGHTS = np.array([2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 2.0, 1.0, 4.0, 1.0, 1.0])  # row 2 is absent
PRESENT = np.array([0, 1, 3, 4, 5, 7, 8, 9, 10])  # row 6 is not finite


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_updates(seed=0, offset=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    updates = jax.tree.map(
        lambda s: (offset + rng.normal(size=(NUM_CLIENTS, *s))).astype(dtype),
        SHAPES,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    updates["a"][2], updates["b"]["c"][6, 1] = np.nan, np.inf
    return updates


def run(rule, updates, weights=WEIGHTS, **extra):
    def once(updates, weights, extra):
        state = rule.init(jax.tree.map(lambda x: x[0], updates))
        return rule.update(updates, state, weights=weights, **extra)

    return jax.jit(once)(
        jax.tree.map(jnp.asarray, updates), jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights), extra
    )


def present(updates, weights=WEIGHTS):
    return oracles.flat(updates)[PRESENT], np.asarray(weights)[PRESENT]


# Rules of every kind, and what they make of rows: by inner products, by columns, linear, with a state, with lengths.
RULES = {
    "multi_krum": (lambda: robust.multi_krum(F), lambda x, w: oracles.multi_krum(x, w, F)),
    "trimmed_mean": (lambda: robust.trimmed_mean(F), lambda x, w: oracles.trimmed_mean(x, w, F)),
    "mean": (robust.mean, oracles.mean),
    "centered_clipping": (lambda: robust.centered_clipping(2.0), lambda x, w: oracles.centered_clipping(x, w, 2.0)),
    "bulyan": (lambda: robust.bulyan(1), lambda x, w: oracles.bulyan(x, w, 1)),
    "sign_majority": (robust.sign_majority, lambda x, w: np.sign(w @ np.sign(x))),
    "norm_clip": (lambda: robust.norm_clip(1.5), lambda x, w: oracles.mean(oracles.clip(x, 1.5), w)),
    "nnm_median": (lambda: robust.nnm(1, robust.median()), lambda x, w: oracles.median(oracles.nnm(x, w, 1), w)),
    "clip_krum": (lambda: robust.clip(2.0, robust.krum(F)), lambda x, w: oracles.krum(oracles.clip(x, 2.0), w, F)),
    "chain": (
        lambda: optax.chain(robust.mean(), optax.scale(-2.0)),
        lambda x, w: -2 * oracles.mean(x, w),
    ),
}
WRAPPERS = {
    "nnm": (lambda rule: robust.nnm(F, rule), lambda x, w: oracles.nnm(x, w, F)),
    "arc": (lambda rule: robust.arc(F, rule), lambda x, w: oracles.arc(x, F)),
    "clip": (lambda rule: robust.clip(3.0, rule), lambda x, w: oracles.clip(x, 3.0)),
}


# Rows that are mixed of the same neighbours are equal, and what Bulyan's Krum prefers among them is rounding.
PAIRS = [(wrapper, rule) for wrapper in WRAPPERS for rule in RULES if (wrapper, rule) != ("nnm", "bulyan")]


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "rule"), PAIRS)
def test_rule_of_rows_that_were_written_out(wrapper, rule):
    updates = make_updates()
    got, state = run(WRAPPERS[wrapper][0](RULES[rule][0]()), updates)
    x, w = present(updates)
    want = RULES[rule][1](WRAPPERS[wrapper][1](x, w), w)
    np.testing.assert_allclose(oracles.flat_one(got), want, rtol=0, atol=5e-6)
    assert state.num_nonfinite == 1 and bool(state.info.ok)
    np.testing.assert_array_equal(state.info.nonfinite, np.arange(NUM_CLIENTS) == 6)
    told = state.info.coefficients
    if rule in ("multi_krum", "norm_clip", "clip_krum", "centered_clipping"):
        assert not np.any(told[np.array([2, 6])])
        np.testing.assert_allclose(np.asarray(told, np.float64)[PRESENT] @ x, want, rtol=0, atol=5e-6)
    else:
        assert told is None


def test_nests_of_all_of_them():
    """Rows of rows of rows, of which only the first inner products are taken."""
    updates = make_updates(3)
    x, w = present(updates)
    rule = robust.clip(3.5, robust.nnm(1, robust.arc(F, robust.multi_krum(F, 3))))
    got, state = run(rule, updates)
    rows = oracles.arc(oracles.nnm(oracles.clip(x, 3.5), w, 1), F)
    np.testing.assert_allclose(oracles.flat_one(got), oracles.multi_krum(rows, w, F, 3), atol=5e-6)
    told = np.asarray(state.info.coefficients, np.float64)
    np.testing.assert_allclose(told[PRESENT] @ x, oracles.flat_one(got), atol=5e-6)


def test_nearest_neighbours_far_from_the_origin():
    """An offset of ten thousand standard deviations leaves the neighbours, and the digits of the differences."""
    updates = make_updates(4, offset=1e4)
    x, w = present(updates)
    got, _ = run(robust.nnm(F, robust.multi_krum(F)), updates)
    want = oracles.multi_krum(oracles.nnm(x, w, F), w, F)
    np.testing.assert_allclose(oracles.flat_one(got), want, rtol=1e-6)  # of the offset


def test_neighbour_means_of_a_few():
    x = np.random.default_rng(1).normal(size=(6, 3))
    got = robust.neighbour_means(jnp.asarray(x @ x.T, jnp.float32), jnp.array([1.0, 2.0, 0.0, 1.0, 1.0, 3.0]), 3)
    rows, w = [0, 1, 3, 4, 5], np.array([1.0, 2.0, 1.0, 1.0, 3.0])
    np.testing.assert_allclose(np.asarray(got)[rows] @ x, oracles.nnm(x[rows], w, 2), atol=1e-6)
    assert not np.any(got[2]) and not np.any(got[:, 2])


def test_clipping_changes_nothing_that_is_short_enough():
    updates = make_updates()
    for rule in (robust.clip(1e9, robust.krum(F)), robust.arc(0, robust.krum(F))):
        got, _ = run(rule, updates)
        want, _ = run(robust.krum(F), updates)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_adaptive_clipping_of_ties_and_zeros():
    updates = {"a": jnp.array([[3.0, 4.0], [0.0, 5.0], [-5.0, 0.0], [0.0, 0.0], [0.0, -500.0]])}
    got, state = run(robust.arc(1, robust.mean()), updates, np.ones(5))
    np.testing.assert_allclose(got["a"], np.array([3 - 5, 4 + 5 - 5]) / 5, rtol=1e-6)
    got, _ = run(robust.arc(2, robust.mean()), {"a": jnp.zeros((5, 2))}, np.ones(5))
    np.testing.assert_array_equal(got["a"], 0.0)


# --- bucketing ---


def test_buckets_hold_s_clients_and_one_holds_the_rest():
    for num_present in range(NUM_CLIENTS + 1):
        there = np.random.default_rng(num_present).permutation(NUM_CLIENTS) < num_present
        for size in (1, 2, 3, 20):
            got = np.asarray(random_buckets(jnp.asarray(there), size, jax.random.key(size)))
            assert (got[~there] == NUM_CLIENTS).all()
            full, rest = divmod(num_present, size)
            assert np.bincount(got[there], minlength=full + (rest > 0)).tolist() == [size] * full + [rest] * (rest > 0)


def test_every_partition_is_as_likely():
    """Of four clients there are three ways to make pairs."""
    keys = jax.random.split(jax.random.key(0), 3000)
    buckets = np.asarray(jax.jit(jax.vmap(lambda k: random_buckets(jnp.ones(4, bool), 2, k)))(keys))
    partner = [(b[0] == b[1:]).argmax() for b in buckets]
    counts = np.bincount(partner, minlength=3)
    assert np.abs(counts - 1000).max() < 130  # five standard deviations
    assert 0.45 < buckets[:, 0].mean() < 0.55


def dealt(s, key, there):
    """The buckets that a wrapper of this key deals: members, in terms of the clients."""
    own_key, _ = jax.random.split(key)
    bucket = np.asarray(random_buckets(jnp.asarray(there), s, own_key))
    return [np.flatnonzero(bucket == i) for i in range(bucket[there].max() + 1)]


INSIDE = {
    "median": (robust.median, oracles.median),
    "krum": (lambda: robust.krum(1), lambda x, w: oracles.krum(x, w, 1)),
    "mean": (robust.mean, oracles.mean),
    "nnm_trimmed_mean": (
        lambda: robust.nnm(1, robust.trimmed_mean(1)),
        lambda x, w: oracles.trimmed_mean(oracles.nnm(x, w, 1), w, 1),
    ),
}


@pytest.mark.parametrize("rule", INSIDE)
def test_rule_of_means_of_buckets(rule):
    updates, key = make_updates(), jax.random.key(7)
    got, state = run(robust.bucketing(2, INSIDE[rule][0]()), updates, key=key)
    there = np.isin(np.arange(NUM_CLIENTS), PRESENT)
    groups = dealt(2, key, there)
    assert len(groups) == 5
    x = oracles.flat(updates)
    rows = np.stack([oracles.mean(x[g], WEIGHTS[g]) for g in groups])
    want = INSIDE[rule][1](rows, np.array([WEIGHTS[g].sum() for g in groups]))
    np.testing.assert_allclose(oracles.flat_one(got), want, atol=5e-6)
    assert state.num_nonfinite == 1 and state.info.ok
    if rule == "krum":
        told = np.asarray(state.info.coefficients, np.float64)
        np.testing.assert_allclose(told[PRESENT] @ x[PRESENT], want, atol=5e-6)


def test_absent_clients_change_no_bucket():
    updates, key = make_updates(), jax.random.key(3)
    alone = jax.tree.map(lambda x: x[PRESENT], updates)
    rule = robust.bucketing(2, robust.median())
    got, _ = run(rule, updates, key=key)
    want, _ = run(rule, alone, WEIGHTS[PRESENT], key=key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_an_attacker_whose_square_overflows_is_in_no_bucket():
    """A rule inside that squares lengths could not tell any more."""
    updates = make_updates()
    updates["a"][4] = 1e30
    x = oracles.flat(updates)
    for inside in (robust.krum(1), robust.nnm(1, robust.median())):
        got, state = run(robust.bucketing(2, inside), updates, key=jax.random.key(0))
        assert state.info.nonfinite.tolist() == [i in (4, 6) for i in range(NUM_CLIENTS)]
        assert np.abs(oracles.flat_one(got)).max() < np.abs(np.delete(x[PRESENT], 3, axis=0)).max()


def test_bucketing_needs_a_key_and_a_size():
    rule = robust.bucketing(2, robust.mean())
    with pytest.raises(ValueError, match="key must be given"):
        run(rule, make_updates())
    with pytest.raises(ValueError, match="s must be at least 1, got 0"):
        robust.bucketing(0, robust.mean())
    for bad in (2.0, True):
        with pytest.raises(TypeError, match="s must be an int"):
            robust.bucketing(bad, robust.mean())


def test_keys_matter_and_repeat():
    rule, updates = robust.bucketing(3, robust.median()), make_updates()
    first, again, other = (oracles.flat_one(run(rule, updates, key=jax.random.key(k))[0]) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# --- layers that clients left out ---

UPLOADED = {"a": np.ones(NUM_CLIENTS), "b": {"c": np.ones(NUM_CLIENTS)}}
UPLOADED["a"][[1, 8]] = 0
UPLOADED["b"]["c"][[3, 5]] = 0


def layered_updates():
    """Left-out layers hold NaN; no client is absent."""
    updates = make_updates(5)
    updates["a"][2], updates["b"]["c"][6, 1] = 0.5, 0.25
    updates["a"][[1, 8]], updates["b"]["c"][[3, 5]] = np.nan, np.nan
    return updates


def layers(updates):
    """Pairs of `[C, D_l]` with NaN where a layer was left out, and `[C]` flags."""
    leaves = [np.asarray(x, np.float64).reshape(NUM_CLIENTS, -1) for x in jax.tree.leaves(updates)]
    return list(zip(leaves, [u > 0 for u in jax.tree.leaves(UPLOADED)], strict=True))


def test_clipping_by_the_lengths_of_what_was_uploaded():
    updates = layered_updates()
    got, _ = run(robust.clip(2.0, robust.mean()), updates, UPLOADED)
    pairs = layers(updates)
    squares = sum(np.where(u, np.where(u[:, None], x, 0).__pow__(2).sum(axis=1), 0) for x, u in pairs)
    sent = sum(u * x.shape[1] for x, u in pairs)
    factors = np.minimum(1, 2.0 / np.sqrt(squares * 10 / sent))
    want = [(factors[u, None] * x[u]).mean(axis=0) for x, u in pairs]
    np.testing.assert_allclose(oracles.flat_one(got), np.concatenate(want), atol=2e-6)


def test_neighbours_by_the_layers_that_both_uploaded():
    updates = layered_updates()
    got, _ = run(robust.nnm(F, robust.median()), updates, UPLOADED)
    pairs = layers(updates)
    both = [u[:, None] & u[None] for _, u in pairs]
    distances = sum(
        np.where(b, np.nan_to_num(np.square(x[:, None] - x[None])).sum(axis=2), 0)
        for (x, _), b in zip(pairs, both, strict=True)
    )
    common = sum(b * x.shape[1] for (x, _), b in zip(pairs, both, strict=True))
    scaled = np.where(common > 0, distances * 10 / np.maximum(common, 1), np.inf)
    scaled = np.where(common > 0, scaled, scaled[common > 0].max())
    np.fill_diagonal(scaled, 0)
    nearest = np.argsort(scaled, axis=1, kind="stable")[:, : NUM_CLIENTS - F]
    want = []
    for x, u in pairs:
        groups = [[j for j in rows if u[j]] for rows in nearest]
        want.append(np.median([x[group].mean(axis=0) for group in groups], axis=0))
    np.testing.assert_allclose(oracles.flat_one(got), np.concatenate(want), atol=5e-6)


def test_buckets_of_those_who_uploaded_a_layer():
    updates, key = layered_updates(), jax.random.key(2)
    got, _ = run(robust.bucketing(2, robust.mean()), updates, UPLOADED, key=key)
    groups = dealt(2, key, np.ones(NUM_CLIENTS, bool))
    want = []
    for x, u in layers(updates):
        members = [[i for i in g if u[i]] for g in groups]
        rows = [x[m].mean(axis=0) for m in members if m]
        want.append(np.average(rows, axis=0, weights=[len(g) for g, m in zip(groups, members, strict=True) if m]))
    np.testing.assert_allclose(oracles.flat_one(got), np.concatenate(want), atol=2e-6)


# --- errors and too few ---


@pytest.mark.parametrize("make", [robust.nnm, robust.arc])
def test_number_of_attackers(make):
    with pytest.raises(ValueError, match="f must be at least 0, got -1"):
        make(-1, robust.mean())
    with pytest.raises(TypeError, match="f must be an int"):
        make(1.0, robust.mean())
    with pytest.raises(TypeError, match="rule must be an aggregator"):
        make(1, robust.mean)
    with pytest.raises(ValueError, match=r"f must satisfy 2 \* f < num_clients, got f = 6 and num_clients = 11"):
        run(make(6, robust.mean()), make_updates())


def test_clip_needs_a_length():
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        robust.clip(0.0, robust.mean())
    with pytest.raises(TypeError, match="rule must be an aggregator"):
        robust.clip(1.0, "mean")


@pytest.mark.parametrize("make", [robust.nnm, robust.arc])
def test_too_few_by_values_hand_on_the_rows_as_they_are(make):
    updates = make_updates()
    weights = np.where(np.isin(np.arange(NUM_CLIENTS), [0, 4, 7, 9]), WEIGHTS, 0)
    got, state = run(make(2, robust.mean()), updates, weights)
    x, w = oracles.flat(updates)[[0, 4, 7, 9]], weights[[0, 4, 7, 9]]
    np.testing.assert_allclose(oracles.flat_one(got), oracles.mean(x, w), atol=2e-6)
    assert not state.info.ok


def test_what_a_rule_inside_tells_counts():
    """Enough for the wrapper, too few for the rule."""
    updates = make_updates()
    weights = np.where(np.arange(NUM_CLIENTS) < 6, WEIGHTS, 0)  # five are present
    _, state = run(robust.nnm(1, robust.krum(2)), updates, weights)
    assert not state.info.ok
    _, state = run(robust.nnm(1, robust.krum(1)), updates, weights)
    assert state.info.ok


def test_state_of_a_rule_inside_is_carried():
    rule = robust.nnm(F, robust.centered_clipping(0.5))
    updates = jax.tree.map(jnp.asarray, make_updates())
    state = rule.init(jax.tree.map(lambda x: x[0], updates))
    x, w = present(updates)
    rows, center = oracles.nnm(x, w, F), None
    step = jax.jit(lambda state: rule.update(updates, state, weights=jnp.asarray(WEIGHTS, jnp.float32)))
    for _ in range(3):
        out, state = step(core.take_info(state)[0])
        center = oracles.centered_clipping(rows, w, 0.5, center=center)
        np.testing.assert_allclose(oracles.flat_one(out), center, atol=5e-6)
    assert state.num_nonfinite == 3


def test_double_precision(x64):
    updates = make_updates(dtype=np.float64)
    x, w = present(updates)
    got, _ = run(robust.nnm(F, robust.arc(F, robust.trimmed_mean(F))), updates)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float64")}
    want = oracles.trimmed_mean(oracles.arc(oracles.nnm(x, w, F), F), w, F)
    np.testing.assert_allclose(oracles.flat_one(got), want, rtol=0, atol=1e-12)
