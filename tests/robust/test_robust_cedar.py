"""Cedar's rule, against a restatement in numpy: what is specified, and what was published."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax.core import cohort_map, take_info
from cedarjax.robust import cedar, lower_minority, published_minority, similarity_weights, two_means

NUM_STIMULI, WIDTH, NUM_CLASSES = 9, 5, 4
RNG = np.random.default_rng(0)
STIMULI = RNG.normal(size=(NUM_STIMULI, WIDTH)).astype(np.float32)
PARAMS = {"body": {"w": RNG.normal(size=(WIDTH, WIDTH))}, "head": {"w": 2 * RNG.normal(size=(WIDTH, NUM_CLASSES))}}
PARAMS = jax.tree.map(np.float32, PARAMS)


def logits_fn(params, x):
    return jnp.tanh(x @ params["body"]["w"]) @ params["head"]["w"]


def make_updates(num_clients, seed=0, size=0.2, attackers=()):
    """Honest clients move a little; an attacker's model is unrelated to the received one."""
    rng = np.random.default_rng(seed)

    def one(p):
        delta = size * rng.normal(size=(num_clients, *p.shape))
        for i in attackers:
            delta[i] = p - 3 * rng.normal(size=p.shape)
        return delta.astype(np.float32)

    return jax.tree.map(one, PARAMS)


def upper(x):
    return x[np.triu_indices(len(x), 1)]


def numpy_rdm(params, raw=False):
    params = jax.tree.map(np.float64, params)
    out = np.tanh(STIMULI @ params["body"]["w"]) @ params["head"]["w"]
    if raw:
        return np.linalg.norm(out[:, None] - out[None], axis=-1)
    p = np.exp(out - out.max(axis=1, keepdims=True))
    u = p / np.linalg.norm(p, axis=1, keepdims=True)
    return 1 - u @ u.T


def models(updates, uploaded):
    """Each client's model, layers that it left out taken from the received one."""
    for i in range(len(updates["body"]["w"])):
        yield {n: {"w": PARAMS[n]["w"] - (updates[n]["w"][i] if uploaded[n][i] else 0)} for n in PARAMS}


def specified(updates, weights, uploaded, detect=True, min_gap=0.3, raw=False):
    """Similarity, dropped clients and the update of each layer, by the formulas."""
    reference = numpy_rdm(PARAMS, raw)
    s = np.array([np.corrcoef(upper(numpy_rdm(m, raw)), upper(reference))[0, 1] for m in models(updates, uploaded)])
    present = np.array(weights) > 0
    # plain 2-means over the present clients, by trying every cut
    values = np.sort(s[present])
    errors = [values[:k].var() * k + values[k:].var() * (len(values) - k) for k in range(1, len(values))]
    cut = int(np.argmin(errors)) + 1
    low = present & (s <= values[cut - 1])
    gap = values[cut:].mean() - values[:cut].mean()
    dropped = low if detect and 2 * low.sum() < present.sum() and gap > min_gap else np.zeros_like(low)
    w = np.where(present & ~dropped, np.maximum(s, 0) * weights, 0)
    update = {}
    for name in PARAMS:
        share = w * uploaded[name]
        x = updates[name]["w"].astype(np.float64)
        update[name] = np.tensordot(share / share.sum(), x, 1) if share.sum() > 0 else np.zeros(x.shape[1:])
    return np.where(present, s, 0), dropped, update, gap, w / w.sum()


def aggregate(updates, weights=None, params=PARAMS, jit=True, **options):
    rule = cedar(logits_fn, STIMULI, **options)
    update = jax.jit(rule.update) if jit else rule.update
    return update(updates, rule.init(params), params, weights=weights)


def everything(num_clients):
    return {name: np.ones(num_clients) for name in PARAMS}


def close(got, wanted, rtol=2e-4, atol=2e-6):
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name]["w"], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("attackers", [(), (1,), (0, 6)])
@pytest.mark.parametrize("detect", [True, False])
@pytest.mark.parametrize("representation", ["softmax", "raw"])
def test_the_specified_rule(attackers, detect, representation):
    updates = make_updates(8, seed=3, attackers=attackers)
    weights = np.array([3.0, 1.0, 2.0, 0.0, 1.0, 5.0, 2.0, 1.0])
    raw = representation == "raw"
    s, dropped, wanted, gap, shares = specified(updates, weights, everything(8), detect, raw=raw)
    got, state = aggregate(updates, jnp.asarray(weights, jnp.float32), detect=detect, representation=representation)
    np.testing.assert_allclose(state.info.similarity, s, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(state.info.dropped, dropped)
    np.testing.assert_array_equal(np.flatnonzero(dropped), attackers if detect else [])
    np.testing.assert_allclose(state.info.gap, gap, rtol=1e-3)
    np.testing.assert_allclose(state.info.weights, shares, rtol=2e-4, atol=1e-6)
    assert state.num_dropped == dropped.sum() and state.info.ok and not state.info.nonfinite.any()
    close(got, wanted)


def test_layers_that_clients_left_out():
    updates = make_updates(6, attackers=(2,))
    uploaded = {"body": np.array([1, 0, 1, 1, 0, 1]), "head": np.array([1, 1, 1, 0, 1, 1])}
    counts = np.array([2.0, 1, 1, 3, 1, 1])
    _, dropped, wanted, _, _ = specified(updates, counts, uploaded)
    assert list(np.flatnonzero(dropped)) == [2]
    for name in PARAMS:  # a layer that was not uploaded is never read
        updates[name]["w"][uploaded[name] == 0] = np.nan
    weights = {name: {"w": jnp.asarray(counts * uploaded[name], jnp.float32)} for name in PARAMS}
    got, state = aggregate(updates, weights)
    np.testing.assert_array_equal(state.info.dropped, dropped)
    assert not state.info.nonfinite.any()
    close(got, wanted)


def test_a_layer_that_nobody_uploaded_stays():
    weights = {"body": {"w": jnp.zeros(4)}, "head": {"w": jnp.ones(4)}}
    got, _ = aggregate(make_updates(4), weights)
    np.testing.assert_array_equal(got["body"]["w"], np.zeros((WIDTH, WIDTH)))
    assert np.abs(got["head"]["w"]).max() > 0


def test_a_dropped_client_is_dropped_from_every_layer():
    updates = make_updates(5, attackers=(4,))
    got, state = aggregate(updates, jnp.ones(5))
    assert state.info.dropped.tolist() == [False] * 4 + [True]
    moved = jax.tree.map(lambda x: np.concatenate([x[:4], 1e3 + 0 * x[4:]]), updates)
    honest, _ = aggregate(moved, jnp.array([1.0, 1, 1, 1, 0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, honest)


def test_absent_clients_may_hold_anything():
    updates = make_updates(5)
    wanted, state = aggregate(updates, jnp.array([1.0, 2.0, 0.0, 1.0, 0.0]))
    for name in PARAMS:
        updates[name]["w"][2], updates[name]["w"][4] = np.nan, np.inf
    got, holed = aggregate(updates, jnp.array([1.0, 2.0, 0.0, 1.0, 0.0]))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    jax.tree.map(np.testing.assert_array_equal, holed, state)


def test_clients_that_are_not_finite_are_absent_and_named():
    updates = make_updates(5)
    wanted, _ = aggregate(updates, jnp.array([1.0, 0.0, 1.0, 0.0, 1.0]))
    updates["body"]["w"][1, 0, 0] = np.inf  # the model still answers: tanh hides it
    updates["head"]["w"][3] = -3e38  # finite, but the model's answers are not
    got, state = aggregate(updates, jnp.ones(5))
    np.testing.assert_array_equal(state.info.nonfinite, [False, True, False, True, False])
    np.testing.assert_array_equal(state.info.weights[jnp.array([1, 3])], [0, 0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, wanted)


def test_nobody_left_keeps_the_parameters():
    updates = make_updates(3)
    got, state = aggregate(updates, jnp.zeros(3))
    assert not state.info.ok and all((np.asarray(x) == 0).all() for x in jax.tree.leaves(got))
    opposed = {
        "body": {"w": np.zeros((2, WIDTH, WIDTH), np.float32)},
        "head": {"w": np.zeros((2, WIDTH, 4), np.float32)},
    }
    constant = jax.tree.map(lambda p, d: d + p[None], PARAMS, opposed)  # models that answer 0 to everything
    got, state = aggregate(constant, jnp.ones(2))
    np.testing.assert_array_equal(state.info.similarity, [0, 0])
    assert not state.info.ok and all((np.asarray(x) == 0).all() for x in jax.tree.leaves(got))


def test_a_received_model_that_sees_no_difference_screens_nobody():
    blind = {"body": PARAMS["body"], "head": {"w": np.zeros((WIDTH, NUM_CLASSES), np.float32)}}
    updates, weights = make_updates(4), np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    got, state = aggregate(updates, jnp.asarray(weights), params=blind)
    wanted = {n: np.tensordot(weights / 10, updates[n]["w"].astype(np.float64), 1) for n in PARAMS}
    close(got, wanted, rtol=1e-5)
    assert not state.info.ok and state.num_dropped == 0
    np.testing.assert_allclose(state.info.weights, weights / 10, rtol=1e-6)


def test_one_client():
    updates = make_updates(1)
    got, state = aggregate(updates, jnp.array([7.0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-6), got, updates)
    assert state.info.labels.tolist() == [1] and state.info.gap == 0 and not state.info.dropped.any()


# What was published


def published(updates, uploaded, judged, detect):
    """Restated from the published arithmetic, with the larger cluster kept."""
    reference = 1 - numpy_rdm(PARAMS)

    def corr2(a, b):
        a, b = a - a.sum() / len(a), b - b.sum() / len(b)
        return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    s = np.array([corr2(1 - numpy_rdm(m), reference) for m in models(updates, uploaded)])
    weights = s.copy()
    if detect:
        scaled = np.sort((s - s.min()) / (s.max() - s.min()))
        cuts = range(1, len(s))
        cut = min(cuts, key=lambda k: scaled[:k].var() * k + scaled[k:].var() * (len(s) - k))
        high = s >= np.sort(s)[cut]
        kept = high if high.sum() > len(s) / 2 else ~high if high.sum() < len(s) / 2 else high == high[0]
        weights = np.where(kept, weights, 0)
    update = {}
    for name in PARAMS:
        w = uploaded[name] if name in judged else weights
        update[name] = np.tensordot(w / w.sum(), updates[name]["w"].astype(np.float64), 1)
    return s, update, weights


@pytest.mark.parametrize("detect", [True, False])
@pytest.mark.parametrize("attackers", [(2,), (0, 1, 2, 3), (0, 1, 2)])
def test_compat(detect, attackers):
    """A minority, a majority and exactly half of attackers: the larger cluster, or the first client's, is kept."""
    updates = make_updates(6, seed=5, attackers=attackers)
    uploaded = {"body": np.array([1, 1, 0, 1, 0, 1]), "head": np.ones(6)}
    s, wanted, w = published(updates, uploaded, ("body",), detect)
    weights = {name: {"w": jnp.asarray(uploaded[name] * np.arange(1, 7), jnp.float32)} for name in PARAMS}
    got, state = aggregate(updates, weights, detect=detect, compat=True, layers=("body",))
    np.testing.assert_allclose(state.info.similarity, s, rtol=1e-5)
    np.testing.assert_allclose(state.info.weights, w / w.sum(), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(state.info.dropped, w == 0)
    close(got, wanted, rtol=1e-4, atol=1e-6)


def test_compat_without_layers_weighs_everything_by_similarity():
    updates = make_updates(4)
    s, wanted, _ = published(updates, everything(4), (), detect=False)
    got, state = aggregate(updates, jnp.array([9.0, 1.0, 1.0, 1.0]), detect=False, compat=True)
    close(got, wanted, rtol=1e-4, atol=1e-6)
    assert (s > 0.9).all() and state.info.ok


# Bare kernels


def test_lower_minority_is_strict_in_number_and_in_gap():
    def dropped(scores, min_gap, present=None):
        present = jnp.ones(len(scores), bool) if present is None else jnp.array(present)
        labels, centers = two_means(jnp.array(scores), present.astype(jnp.float32))
        return lower_minority(labels, centers, present, min_gap).tolist()

    assert dropped([0.5, 1.0, 1.0], 0.25) == [True, False, False]
    assert dropped([0.5, 1.0, 1.0], 0.5) == [False] * 3  # not more than min_gap
    assert dropped([0.5, 0.5, 1.0, 1.0], 0.25) == [False] * 4  # half is no minority
    assert dropped([0.5, 0.5, 1.0], 0.25) == [False] * 3
    assert dropped([0.5, 0.1, 1.0, 1.0], 0.25, [True, False, True, True]) == [True, False, False, False]
    assert dropped([0.7, 0.7], 0.0) == [False] * 2


def test_published_minority_and_its_ties():
    def dropped(labels, present):
        return published_minority(jnp.array(labels), jnp.array(present)).tolist()

    assert dropped([0, 0, 1], [True] * 3) == [False, False, True]
    assert dropped([1, 0, 1], [True] * 3) == [False, True, False]
    assert dropped([0, 1], [True] * 2) == [False, True]
    assert dropped([0, 1, 0], [False, True, True]) == [False, False, True]
    assert dropped([1, 1], [True] * 2) == [False, False]


def test_similarity_weights_clip_at_zero():
    s, n = jnp.array([1.0, -1.0, 0.0, 0.5, 0.5]), jnp.array([2.0, 2.0, 2.0, 4.0, 0.0])
    np.testing.assert_array_equal(similarity_weights(s, n, jnp.zeros(5, bool)), [2, 0, 0, 2, 0])
    np.testing.assert_array_equal(similarity_weights(s, n, jnp.array([1, 0, 0, 0, 0], bool)), [0, 0, 0, 2, 0])


# Protocol


@pytest.mark.slow
def test_jit_layouts_and_permutation(mesh):
    updates, weights = make_updates(7, attackers=(3,)), jnp.array([1.0, 2, 3, 1, 0, 1, 2])
    wanted, state = aggregate(updates, weights, jit=False)
    layouts = (None, cohort_map(1), cohort_map(3), cohort_map(1, mesh))
    runs = [aggregate(updates, weights, map_fn=map_fn) for map_fn in layouts]
    order = np.array([6, 2, 0, 4, 3, 1, 5])
    moved, moved_state = aggregate(jax.tree.map(lambda x: x[order], updates), weights[order])
    np.testing.assert_array_equal(moved_state.info.dropped, state.info.dropped[order])
    for got, other in [*runs, (moved, state)]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)
        np.testing.assert_array_equal(other.info.dropped, state.info.dropped)


def test_a_mesh_gathers_vectors_and_no_updates(mesh):
    rule = cedar(logits_fn, STIMULI, map_fn=cohort_map(1, mesh))
    clients = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("clients"))
    updates, weights = jax.device_put((make_updates(8), jnp.ones(8)), clients)
    program = jax.jit(rule.update).lower(updates, rule.init(PARAMS), PARAMS, weights=weights).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", program)
    assert set(gathered) <= {"8"}
    assert "all-reduce" in program


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_same_dtype_out(dtype):
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    rule = cedar(logits_fn, STIMULI.astype(dtype))
    got, state = jax.jit(rule.update)(cast(make_updates(3)), rule.init(None), cast(PARAMS), weights=jnp.ones(3))
    assert all(x.dtype == dtype for x in jax.tree.leaves(got)) and state.info.similarity.dtype == jnp.float32


def test_under_x64(x64):
    cast = lambda tree: jax.tree.map(np.float64, tree)  # noqa: E731
    updates = cast(make_updates(4))
    rule = cedar(logits_fn, STIMULI.astype(np.float64))
    got, _ = jax.jit(rule.update)(updates, rule.init(None), cast(PARAMS), weights=jnp.ones(4, jnp.float64))
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(got))
    close(got, specified(updates, np.ones(4), everything(4))[2], rtol=1e-5)


def test_the_state_is_a_carry_and_counts():
    tx = optax.chain(cedar(logits_fn, STIMULI), optax.sgd(1.0))
    updates = make_updates(5, attackers=(1,))

    def one(carry, _):
        params, opt_state = carry
        step, opt_state = tx.update(updates, opt_state, params, weights=jnp.ones(5))
        opt_state, infos = take_info(opt_state)
        return (jax.tree.map(jnp.add, params, jax.tree.map(lambda x: 0 * x, step)), opt_state), infos

    (_, opt_state), infos = jax.lax.scan(one, (PARAMS, tx.init(PARAMS)), length=3)
    assert opt_state[0].num_dropped == 3 and opt_state[0].info is None
    assert infos[0].dropped.shape == (3, 5) and (infos[0].dropped.sum(axis=0) == jnp.array([0, 3, 0, 0, 0])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_gap": -0.1}, "min_gap must be at least 0, got -0.1"),
        ({"representation": "hidden"}, "representation must be one of .*'softmax', 'raw'.*got 'hidden'"),
        ({"layers": ("body",)}, "layers must be empty unless compat=True, got .'body',."),
        ({"compat": True, "representation": "raw"}, "compat=True must come with representation 'softmax', got 'raw'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        cedar(logits_fn, STIMULI, **options)


def test_calls_that_do_not_fit():
    updates = make_updates(3)
    rule = cedar(logits_fn, STIMULI)
    with pytest.raises(ValueError, match="params must be given to update"):
        rule.update(updates, rule.init(PARAMS), weights=jnp.ones(3))
    with pytest.raises(ValueError, match=r"weights must be \[C\] with C = 3.*\(2,\)"):
        aggregate(updates, jnp.ones(2))
    weights = {name: {"w": jnp.ones(3)} for name in PARAMS}
    with pytest.raises(ValueError, match="layers must name the judged layers"):
        aggregate(updates, weights, compat=True)
    with pytest.raises(ValueError, match="layer 'bodyy' owns no parameter"):
        aggregate(updates, weights, compat=True, layers=("bodyy",))
    few = cedar(logits_fn, STIMULI[:2])
    with pytest.raises(ValueError, match=r"logits_fn must return \[S, K\] with S >= 3 stimuli, got the shape \(2, 4\)"):
        few.update(updates, few.init(PARAMS), PARAMS)
