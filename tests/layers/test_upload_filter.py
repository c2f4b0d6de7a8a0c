"""The filter, driven round by round with chosen updates, against a restatement of the published arithmetic in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core import ClientData, LocalUpdate, Upload, cohort_map, layer_mask
from cedarjax.layers import budget_priority, stimulus_pairs, upload_filter, within_budget

NUM_STIMULI, WIDTH = 12, 6


def sent(shared, state, data, key):
    """A local update whose result is handed to it as data."""
    return Upload(data), state, {"seen": key}


LOCAL = LocalUpdate(lambda params: (), sent)


def make_params(num_layers, rng):
    layers = {
        f"layer{i}": {"kernel": rng.normal(size=(WIDTH, WIDTH)) / 2, "bias": np.zeros(WIDTH)} for i in range(num_layers)
    }
    return jax.tree.map(np.float32, {**layers, "head": {"kernel": rng.normal(size=(WIDTH, 3))}})


def make_features(np_like):
    def features_fn(params, x):
        features = {}
        for name in sorted(name for name in params if name.startswith("layer")):
            x = np_like.tanh(x @ params[name]["kernel"] + params[name]["bias"].reshape(1, -1))
            features[name] = x
        return features

    return features_fn


def make_stimuli(rng):
    return rng.normal(size=(NUM_STIMULI, WIDTH)).astype(np.float32)


def published_round(received, trained, stimuli, pairs, previous, num_skipped):
    """Scores and mask of one round, as the published filter computes them once a client has a previous score."""
    scores = []
    features_fn = make_features(np)
    before, after = features_fn(received, stimuli), features_fn(trained, stimuli)
    for name in before:
        distances = [[np.linalg.norm(x[name][a] - x[name][b]) for a, b in pairs] for x in (before, after)]
        scores.append(np.square(np.corrcoef(*distances)[0, 1]))
    mask = np.ones(len(scores))
    if previous is not None:
        change = [abs((last - now) / now) for last, now in zip(previous, scores, strict=True)]
        mask[np.argsort(change, kind="stable")[:num_skipped]] = 0
    return np.array(scores), mask


@pytest.mark.parametrize("compat", [True, False])
@pytest.mark.parametrize("num_layers", [2, 4, 8])
def test_six_rounds_of_the_published_filter(num_layers, compat):
    rng = np.random.default_rng(num_layers)
    stimuli = make_stimuli(rng)
    if compat:  # self pairs and repeats among the first 11, as published
        pairs = rng.integers(0, 11, size=(20, 2))
    else:
        pairs = np.array([(a, b) for a in range(NUM_STIMULI) for b in range(a + 1, NUM_STIMULI)])
    filtered = upload_filter(
        LOCAL, make_features(jnp), stimuli, pairs=jnp.asarray(pairs, jnp.int32) if compat else None, compat=compat
    )
    received = make_params(num_layers, rng)
    state, previous, skipped = filtered.init(received), None, 0
    update = jax.jit(filtered.update)
    for _ in range(6):
        delta = jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(np.float32), received)
        trained = jax.tree.map(lambda p, d: (p - d).astype(np.float64), received, delta)
        wanted, mask = published_round(received, trained, stimuli, pairs, previous, min(3, num_layers // 4))
        upload, state, info = update(received, state, delta, jax.random.key(0))
        # A correlation is known to a few units of 1e-7, so the square of one near 0 to 2 |r| times that.
        np.testing.assert_allclose(info.scores, wanted, rtol=1e-4, atol=5e-9)
        np.testing.assert_array_equal(info.mask, mask)
        for i in range(num_layers):
            for leaf in ("kernel", "bias"):
                assert upload.mask[f"layer{i}"][leaf] == mask[i]
                np.testing.assert_array_equal(upload.delta[f"layer{i}"][leaf], mask[i] * delta[f"layer{i}"][leaf])
        np.testing.assert_array_equal(upload.delta["head"]["kernel"], delta["head"]["kernel"])
        assert upload.mask["head"]["kernel"] == 1
        previous, skipped = wanted, skipped + int((mask == 0).sum())
        received = trained = jax.tree.map(np.float32, trained)
    assert skipped == 5 * min(3, num_layers // 4)


def two_layers(scale_one=1.0, scale_two=1.0):
    """Parameters of 24 + 40 judged bytes and 8 others; the name of the second starts with that of the first."""
    params = {"net": {"a": jnp.ones(6), "a1": scale_two * jnp.ones(10)}, "rest": jnp.ones(2)}
    params["net"]["a"] = scale_one * params["net"]["a"]
    return params


def two_features(params, x):
    return {"net/a": x * params["net"]["a"][:1].reshape(1, 1), "net/a1": x * params["net"]["a1"][:1].reshape(1, 1)}


X = jnp.linspace(0.0, 1.0, 5).reshape(5, 1)


def test_first_round_uploads_everything_and_stores_its_scores():
    filtered = upload_filter(LOCAL, two_features, X, max_bytes=40, score="update_norm")
    params = two_layers()
    state = filtered.init(params)
    assert not state.started
    upload, state, info = filtered.update(params, state, two_layers(2.0, 3.0), jax.random.key(0))
    np.testing.assert_array_equal(info.mask, [1, 1])
    np.testing.assert_allclose(info.scores, [2 * np.sqrt(6), 3 * np.sqrt(10)], rtol=1e-6)
    np.testing.assert_array_equal(state.scores, info.scores)
    assert all(leaf == 1 for leaf in jax.tree.leaves(upload.mask))
    assert state.started and state.credit == 0 and info.uploaded_bytes == 73 and info.full_bytes == 72
    np.testing.assert_array_equal(state.age, [0, 0])


def run(filtered, params, deltas, keys=None):
    state, infos, update = filtered.init(params), [], jax.jit(filtered.update)
    for i, delta in enumerate(deltas):
        key = jax.random.key(i) if keys is None else keys[i]
        upload, state, info = update(params, state, delta, key)
        infos.append((upload, state, info))
    return infos


def test_a_skipped_layer_is_absent_and_a_longer_name_is_another_layer():
    filtered = upload_filter(LOCAL, two_features, X, num_skipped=1, score="update_norm")
    _, (upload, state, info) = run(filtered, two_layers(), [two_layers(), two_layers(0.5, 1.0)])
    np.testing.assert_array_equal(info.mask, [0, 1])
    np.testing.assert_array_equal(upload.delta["net"]["a"], np.zeros(6))
    np.testing.assert_array_equal(upload.delta["net"]["a1"], np.ones(10))
    assert upload.mask["net"]["a"] == 0 and upload.mask["net"]["a1"] == 1 and upload.mask["rest"] == 1
    assert info.uploaded_bytes == 40 + 8 + 1 and info.full_bytes == 72
    np.testing.assert_array_equal(state.age, [1, 0])


def test_skipping_nothing_changes_no_bit_of_the_update():
    def noisy(shared, state, data, key):
        return Upload(jax.tree.map(lambda p: jax.random.normal(key, p.shape), shared)), state, ()

    local = LocalUpdate(lambda params: (), noisy)
    filtered = upload_filter(local, two_features, X, num_skipped=0, score="random")
    params, key = two_layers(), jax.random.key(3)
    plain, _, _ = local.update(params, (), None, key)
    upload, _, _ = filtered.update(params, filtered.init(params), None, key)
    jax.tree.map(np.testing.assert_array_equal, upload.delta, plain.delta)


def test_the_wrapped_update_gets_the_key_its_state_and_its_info_passes():
    local = LocalUpdate(
        lambda params: jnp.int32(7), lambda shared, n, data, key: (Upload(shared), n + 1, {"seen": key})
    )
    filtered = upload_filter(local, two_features, X)
    state = filtered.init(two_layers())
    assert state.client_state == 7
    _, state, info = filtered.update(two_layers(), state, None, jax.random.key(5))
    assert state.client_state == 8 and info.local["seen"] == jax.random.key(5)


def test_masks_multiply():
    inner = {"net": {"a": jnp.float32(1), "a1": jnp.float32(1)}, "rest": jnp.float32(0)}
    local = LocalUpdate(lambda params: (), lambda shared, state, data, key: (Upload(data, inner), state, ()))
    filtered = upload_filter(local, two_features, X, num_skipped=1, score="update_norm")
    _, (upload, _, info) = run(filtered, two_layers(), [two_layers(), two_layers(0.5, 1.0)])
    assert jax.tree.map(float, upload.mask) == {"net": {"a": 0.0, "a1": 1.0}, "rest": 0.0}
    np.testing.assert_array_equal(upload.delta["rest"], [0, 0])
    assert info.uploaded_bytes == 41


# Byte budgets


def budget_oracle(norms, sizes, max_bytes, carry_limit):
    """The rule in Python integers and float64: masks, ages and credits of every round."""
    num_layers = len(sizes)
    age, credit, rounds = [0] * num_layers, 0, []
    for i, norm in enumerate(norms):
        mask = [1] * num_layers
        if i > 0:
            total = sum(norm)
            share = [n / total if total else 1 / num_layers for n in norm]
            priority = [s + a / num_layers for s, a in zip(share, age, strict=True)]
            left, mask = max_bytes + credit, [0] * num_layers
            for layer in sorted(range(num_layers), key=lambda x: (-priority[x], x)):
                if sizes[layer] <= left:
                    mask[layer], left = 1, left - sizes[layer]
            credit = min(left, carry_limit)
        age = [0 if m else a + 1 for m, a in zip(mask, age, strict=True)]
        rounds.append((mask, list(age), credit))
    return rounds


def flat_layers(sizes):
    params = {f"l{i}": jnp.ones(size // 4) for i, size in enumerate(sizes)}

    def features_fn(params, x):
        return {name: x * params[name][:1].reshape(1, 1) for name in params}

    return params, features_fn


@pytest.mark.parametrize("carry_limit", [0, 30, 10_000])
def test_budget_against_integers(carry_limit):
    sizes, max_bytes, num_rounds = (8, 40, 72, 120, 4), 130, 25
    rng = np.random.default_rng(carry_limit)
    params, features_fn = flat_layers(sizes)
    norms = rng.gamma(0.5, size=(num_rounds, len(sizes))).astype(np.float32)
    norms[7] = 0
    filtered = upload_filter(LOCAL, features_fn, X, max_bytes=max_bytes, carry_limit=carry_limit, score="update_norm")
    update, state = jax.jit(filtered.update), filtered.init(params)
    for norm, (mask, age, credit) in zip(norms, budget_oracle(norms, sizes, max_bytes, carry_limit), strict=True):
        delta = {f"l{i}": jnp.zeros(size // 4).at[0].set(norm[i]) for i, size in enumerate(sizes)}
        allowed = max_bytes + int(state.credit)
        first = not state.started
        _, state, info = update(params, state, delta, jax.random.key(0))
        np.testing.assert_array_equal(info.mask, mask)
        np.testing.assert_array_equal(state.age, age)
        assert state.credit == credit
        spent = int(info.uploaded_bytes) - 1
        assert spent == sum(size for size, m in zip(sizes, mask, strict=True) if m)
        assert first or spent <= allowed
    assert (credit > 0) == (carry_limit > 0)


@pytest.mark.parametrize("importance", ["one layer", "rotating", "random", "equal", "broken"])
def test_no_layer_waits_longer_than_two_rounds_a_layer(importance):
    sizes = (50, 10, 60, 60, 35)  # one big layer a round, at most
    num_layers, rng = len(sizes), np.random.default_rng(0)

    @jax.jit
    def one(values, age):
        mask = within_budget(budget_priority(values, age), sizes, 60)
        return mask, jnp.where(mask > 0, 0, age + 1)

    age, longest = jnp.zeros(num_layers, jnp.int32), 0
    for _ in range(200):
        values = np.zeros(num_layers, np.float32)
        match importance:
            case "one layer":
                values[2] = 1
            case "rotating":  # everything on the layer that was served longest ago but one
                values[np.argsort(age)[-2]] = 1e30
            case "random":
                values = rng.gamma(0.1, size=num_layers).astype(np.float32)
            case "broken":
                values[[2, 3]] = np.nan, np.inf
        mask, age = one(values, age)
        assert 0 < np.asarray(mask) @ sizes <= 60
        longest = max(longest, int(age.max()))
    assert 1 <= longest <= 2 * num_layers - 1


def test_priority_shares():
    age = jnp.array([0, 3], jnp.int32)
    np.testing.assert_allclose(budget_priority(jnp.array([1.0, 3.0]), age), [0.25, 0.75 + 1.5])
    np.testing.assert_allclose(budget_priority(jnp.zeros(2), age), [0.5, 2.0])
    np.testing.assert_allclose(budget_priority(jnp.array([3e38, 3e38]), age), [0.5, 2.0])
    np.testing.assert_allclose(budget_priority(jnp.array([jnp.inf, 5.0]), age), [1.0, 1.5])
    np.testing.assert_allclose(budget_priority(jnp.array([jnp.nan, jnp.inf]), age), [0.5, 2.0])


def test_a_layer_larger_than_the_budget_is_named():
    filtered = upload_filter(LOCAL, two_features, X, max_bytes=39)
    with pytest.raises(ValueError, match="got 39 for layer 'net/a1' of 40 bytes"):
        filtered.init(two_layers())


# Other scores


def test_cosine_compares_with_the_clients_own_previous_update():
    filtered = upload_filter(LOCAL, two_features, X, num_skipped=1, score="cosine")
    rng = np.random.default_rng(0)
    deltas = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), two_layers()) for _ in range(4)]
    infos = run(filtered, two_layers(), deltas)
    for (_, _, info), now, before in zip(infos[1:], deltas[1:], deltas[:-1], strict=True):
        pairs = [(now["net"][n].astype(np.float64), before["net"][n]) for n in ("a", "a1")]
        wanted = [1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in pairs]
        np.testing.assert_allclose(info.scores, wanted, rtol=1e-5)
        np.testing.assert_array_equal(info.mask, np.arange(2) != np.argmin(wanted))
    assert upload_filter(LOCAL, two_features, X).init(two_layers()).previous == ()


@pytest.mark.parametrize("score", ["fisher", "taylor"])
def test_gradient_scores_use_all_valid_rows_at_the_trained_parameters(score):
    def loss_fn(params, batch, key):
        prediction = (batch["x"] * params["net"]["a"].reshape(1, -1)).sum(axis=1) + params["net"]["a1"].sum()
        return jnp.mean((prediction - batch["y"]) ** 2)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 6)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    padded = {"x": np.full((8, 6), np.nan, np.float32), "y": np.full(8, np.nan, np.float32)}
    padded["x"][:5], padded["y"][:5] = x, y
    delta = two_layers(0.25, 0.125)
    local = LocalUpdate(lambda params: (), lambda shared, state, data, key: (Upload(delta), state, ()))
    filtered = upload_filter(local, two_features, X, num_skipped=1, score=score, loss_fn=loss_fn)
    data = ClientData(padded, num_examples=jnp.int32(5), num_support=jnp.int32(2))
    state = filtered.init(two_layers())
    _, _, info = jax.jit(filtered.update)(two_layers(), state, data, jax.random.key(0))

    theta = {"a": np.full(6, 0.75), "a1": np.full(10, 0.875)}
    residual = x.astype(np.float64) @ theta["a"] + theta["a1"].sum() - y
    gradient = {"a": 2 * (residual[:, None] * x).mean(axis=0), "a1": np.full(10, 2 * residual.mean())}
    fisher = [np.mean(gradient[n] ** 2) for n in theta]
    taylor = [np.abs(theta[n] * gradient[n]).sum() for n in theta]
    np.testing.assert_allclose(info.scores, fisher if score == "fisher" else taylor, rtol=1e-5)


def test_random_is_bound_to_the_key():
    params, features_fn = flat_layers((4,) * 8)
    filtered = upload_filter(LOCAL, features_fn, X, num_skipped=4, score="random")
    state = filtered.update(params, filtered.init(params), params, jax.random.key(0))[1]
    masks = [np.asarray(filtered.update(params, state, params, jax.random.key(i))[2].mask) for i in (1, 1, 2, 3)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert all(mask.sum() == 4 for mask in masks)
    assert len({tuple(mask) for mask in masks}) > 1


# Degenerate and broken input


def test_a_dead_layer_is_defined():
    """The first layer answers 0 to everything: published NaN, here 0 and no change."""
    for compat, score, mask in ((False, 0.0, [0, 1]), (True, np.nan, [1, 0])):
        filtered = upload_filter(LOCAL, two_features, X, num_skipped=1, compat=compat)
        params = two_layers(0.0, 1.0)
        zero = jax.tree.map(jnp.zeros_like, params)
        first, second = run(filtered, params, [zero, zero])
        np.testing.assert_allclose(first[2].scores, [score, 1.0], rtol=1e-6)
        np.testing.assert_array_equal(second[2].mask, mask)


def test_a_score_that_falls_to_zero():
    """Published: 0 / 0 is NaN, 1 / 0 is Inf, and NaN sorts last. Here nothing happened to a layer that stays at 0."""
    received, unrelated = jnp.array([0.0, 1.0, 3.0]), jnp.array([0.0, 1.0, -1.0])  # distances 1 3 2 and 1 1 2
    params = {"a": received, "b": received}
    both = {"a": received - unrelated, "b": received - unrelated}
    one = {"a": both["a"], "b": jnp.zeros(3)}
    for compat, mask in ((True, [1, 0]), (False, [0, 1])):
        filtered = upload_filter(
            LOCAL, lambda p, x: {n: p[n].reshape(3, 1) for n in p}, None, num_skipped=1, compat=compat
        )
        first, second = run(filtered, params, [one, both])
        np.testing.assert_array_equal(first[2].scores, [0, 1])
        np.testing.assert_array_equal(second[2].scores, [0, 0])
        np.testing.assert_array_equal(second[2].mask, mask)


def test_a_diverged_layer_counts_as_the_most_important():
    for options in ({"num_skipped": 1}, {"max_bytes": 40}):
        filtered = upload_filter(LOCAL, two_features, X, **options)
        broken = two_layers(1.0, jnp.nan)
        _, (_, state, info) = run(filtered, two_layers(), [two_layers(0.5, 0.5), broken])
        np.testing.assert_array_equal(info.mask, [0, 1])
        assert np.isnan(state.scores[1]) and np.isfinite(state.scores[0])


def test_dtypes_are_kept():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), two_layers())
    filtered = upload_filter(LOCAL, two_features, X.astype(jnp.bfloat16), num_skipped=1)
    upload, state, info = filtered.update(params, filtered.init(params), params, jax.random.key(0))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(upload.delta))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(upload.mask))
    assert info.scores.dtype == jnp.float32 and info.full_bytes == 36


def test_everything_under_x64(x64):
    params, options = two_layers(), {"max_bytes": 100, "carry_limit": 5}
    filtered = upload_filter(LOCAL, two_features, X.astype(jnp.float64), **options)
    state = filtered.init(params)
    upload, after, info = jax.jit(filtered.update)(params, state, params, jax.random.key(0))
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert kinds == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert upload.delta["rest"].dtype == jnp.float64 and info.full_bytes.dtype == jnp.int32


# Transformations


@pytest.mark.slow
@pytest.mark.parametrize("score", ["rcs", "update_norm", "cosine", "random"])
@pytest.mark.parametrize("options", [{"num_skipped": 1}, {"max_bytes": 300, "carry_limit": 100}])
def test_scan_jit_and_cohort_maps_agree_with_plain_calls(score, options):
    rng = np.random.default_rng(0)
    params, stimuli, num_clients, num_rounds = make_params(3, rng), make_stimuli(rng), 3, 3
    filtered = upload_filter(LOCAL, make_features(jnp), stimuli, score=score, **options)
    deltas = jax.tree.map(
        lambda p: (0.3 * rng.normal(size=(num_rounds, num_clients, *p.shape))).astype(np.float32), params
    )
    keys = jax.random.split(jax.random.key(0), (num_rounds, num_clients))

    plain = []
    for c in range(num_clients):
        own = [jax.tree.map(lambda d, r=r, c=c: d[r, c], deltas) for r in range(num_rounds)]
        plain.append([info.mask for _, _, info in run(filtered, params, own, keys[:, c])])
    plain = np.array(plain).swapaxes(0, 1)

    for chunk_size in (None, 1, 2):
        map_fn = cohort_map(chunk_size)

        def one(state, inputs, map_fn=map_fn):
            upload, state, info = map_fn(filtered.update, params, state, *inputs)
            return state, (info.mask, upload.delta)

        state = jax.vmap(lambda _: filtered.init(params))(jnp.arange(num_clients))
        _, (masks, uploaded) = jax.jit(lambda s, xs, one=one: jax.lax.scan(one, s, xs))(state, (deltas, keys))
        np.testing.assert_array_equal(masks, plain)
        wanted = deltas["layer1"]["kernel"] * plain[:, :, 1, None, None]
        np.testing.assert_array_equal(uploaded["layer1"]["kernel"], wanted)
    assert (plain[1:] == 0).any()


def test_the_upload_weighs_layers_as_the_mask_says():
    filtered = upload_filter(LOCAL, two_features, X, num_skipped=1, score="update_norm")
    upload, _, info = run(filtered, two_layers(), [two_layers(), two_layers(0.5, 1.0)])[1]
    wanted = layer_mask(two_layers(), {"net/a": info.mask[0], "net/a1": info.mask[1]})
    jax.tree.map(np.testing.assert_array_equal, upload.mask, wanted)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_skipped": 1, "max_bytes": 9}, "num_skipped and max_bytes exclude each other, got 1 and 9"),
        ({"score": "size"}, "score must be one of .*'rcs'.*got 'size'"),
        ({"score": "fisher"}, "loss_fn must be given with score 'fisher', got None"),
        ({"carry_limit": 3}, "carry_limit needs max_bytes, got 3"),
        ({"carry_limit": -3, "max_bytes": 9}, "carry_limit must be at least 0, got -3"),
        ({"max_bytes": 0}, r"max_bytes \+ carry_limit must lie within \(0, 2\^31\), got 0"),
        ({"max_bytes": 2**31 - 1, "carry_limit": 1}, r"must lie within \(0, 2\^31\)"),
        ({"compat": True, "max_bytes": 9}, "compat must come with score 'rcs' and without max_bytes"),
        ({"compat": True, "score": "random"}, "compat must come with score 'rcs'.*'random'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        upload_filter(LOCAL, two_features, X, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_skipped": 2}, "num_skipped must satisfy 0 <= num_skipped < num_layers, got 2 and 2"),
        ({"num_skipped": -1}, "0 <= num_skipped < num_layers, got -1 and 2"),
        (
            {"pairs": jnp.array([[0, 5]], jnp.int32)},
            r"pairs must lie within \[0, num_stimuli\) = \[0, 5\), got \(0, 5\)",
        ),
        ({"pairs": jnp.array([[2, 2]], jnp.int32)}, r"itself unless compat=True, got \(2, 2\)"),
        ({"pairs": jnp.array([[0.0, 1.0]])}, r"pairs must be \[E, 2\] integers"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message):
    filtered = upload_filter(LOCAL, two_features, X, **options)
    with pytest.raises(ValueError, match=message):
        filtered.init(two_layers())


def test_self_pairs_pass_with_compat():
    pairs = jnp.array([[2, 2], [0, 1], [0, 1], [0, 4]], jnp.int32)
    filtered = upload_filter(LOCAL, two_features, X, pairs=pairs, compat=True)
    assert filtered.init(two_layers()).scores.shape == (2,)


@pytest.mark.parametrize(
    ("features_fn", "message"),
    [
        (lambda params, x: x, "features_fn must return a dict"),
        (lambda params, x: {}, "features_fn must return a dict of at least one layer"),
        (lambda params, x: {"rest": x[:, 0]}, r"\[S, F\] for every layer.*'rest'"),
        (lambda params, x: {"net": x, "rest": x[:2]}, r"with one S, got \(2, 1\) for 'rest'"),
        (lambda params, x: {"nett": x}, "layer 'nett' owns no parameter"),
        (lambda params, x: {"net": x, "net/a": x}, "layers must not overlap"),
    ],
)
def test_features_that_do_not_fit(features_fn, message):
    with pytest.raises(ValueError, match=message):
        upload_filter(LOCAL, features_fn, X).init(two_layers())


def test_drawn_pairs_are_used():
    pairs = stimulus_pairs(5, 3, jax.random.key(0))
    filtered = upload_filter(LOCAL, two_features, X, pairs=pairs)
    _, _, info = filtered.update(two_layers(), filtered.init(two_layers()), two_layers(0.5, 0.25), jax.random.key(0))
    np.testing.assert_allclose(info.scores, [1, 1], rtol=1e-6)
