"""What can be read off a gradient, and the parts of a search, against numpy in float64."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from cedarjax import local, nn
from cedarjax.attacks import inversion
from cedarjax.core import ClientData

KEY = jax.random.key(0)


def mlp(in_features=20, hidden=(16, 8), num_classes=5, seed=0):
    model = nn.functional(lambda rngs: nn.MLP(in_features, hidden, num_classes, rngs=rngs))
    return model, model.init(jax.random.key(seed))


def batch_of(rows, in_features=20, num_classes=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((rows, in_features)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, num_classes, rows).astype(np.int32))}


# Analytic inversion


@pytest.mark.parametrize("seed", range(4))
def test_the_first_layer_gives_its_input_away(seed):
    model, params = mlp(seed=seed)
    batch = batch_of(1, seed=seed)
    gradient = jax.grad(nn.cross_entropy(model.apply))(params, batch, KEY)
    found = inversion.linear_input(**gradient["block1"])
    np.testing.assert_allclose(found.x, batch["x"][0], atol=1e-5)
    assert found.ok and found.unit == np.argmax(np.abs(gradient["block1"]["bias"]))


def test_so_does_the_update_of_one_step_whatever_its_rate():
    model, params = mlp()
    batch = batch_of(1)
    for rate in (0.3, 1e-3):
        train = local.sgd(nn.cross_entropy(model.apply), optax.sgd(rate), batch_size=1)
        data = ClientData(batch, jnp.int32(1), jnp.int32(1))
        delta = train.update(params, (), data, KEY)[0].delta
        np.testing.assert_allclose(inversion.linear_input(**delta["block1"]).x, batch["x"][0], atol=1e-4)


def test_victims_are_vmapped():
    model, params = mlp()
    batch = batch_of(6)
    rows = jax.tree.map(lambda x: x[:, None], batch)
    gradients = jax.vmap(lambda b: jax.grad(nn.cross_entropy(model.apply))(params, b, KEY))(rows)
    found = jax.jit(jax.vmap(inversion.linear_input))(gradients["block1"]["kernel"], gradients["block1"]["bias"])
    np.testing.assert_allclose(found.x, batch["x"], atol=1e-5)


def test_nothing_is_read_where_nothing_is_told():
    kernel = jnp.ones((3, 2))
    for bias in (jnp.zeros(2), jnp.array([jnp.nan, 0.0])):
        found = inversion.linear_input(kernel, bias)
        assert not found.ok
        np.testing.assert_array_equal(found.x, np.zeros(3))
    found = inversion.linear_input(kernel.at[:, 0].set(jnp.inf), jnp.array([jnp.inf, 2.0]))
    assert found.ok and found.unit == 1
    np.testing.assert_array_equal(found.x, [0.5, 0.5, 0.5])


def test_units_of_a_batch_give_weighted_means_and_lone_examples():
    rng = np.random.default_rng(0)
    x, weights = rng.random((3, 4)), np.array([[0.0, 1.0, 0.0], [2.0, -0.5, 0.0], [0.0, 3.0, 0.0]])
    rows, ok = inversion.linear_inputs(jnp.float32(x.T @ weights), jnp.float32(weights.sum(axis=0)))
    np.testing.assert_allclose(rows[0], x[1], rtol=1e-6)
    np.testing.assert_allclose(rows[1], (x[0] - 0.5 * x[1] + 3 * x[2]) / 3.5, rtol=1e-5)
    np.testing.assert_array_equal(ok, [True, True, False])
    np.testing.assert_array_equal(rows[2], np.zeros(4))


def test_half_precision_goes_in_and_comes_out():
    found = inversion.linear_input(jnp.ones((2, 3), jnp.bfloat16), jnp.full(3, 2.0, jnp.bfloat16))
    assert found.x.dtype == jnp.bfloat16 and found.x.tolist() == [0.5, 0.5]


# Labels


def test_the_label_of_one_example_is_found_always():
    """300 models and examples, from the bias and from the kernel behind ReLU features."""
    model, _ = mlp()
    params = jax.vmap(model.init)(jax.random.split(KEY, 300))
    batch = jax.tree.map(lambda x: x[:, None], batch_of(300))
    gradients = jax.vmap(lambda p, b: jax.grad(nn.cross_entropy(model.apply))(p, b, KEY))(params, batch)
    head = gradients["head"]
    features = jax.vmap(lambda p, b: model.features(p, b["x"])["block2"])(params, batch)
    alive = np.asarray(features.max(axis=(1, 2)) > 0)
    assert alive.sum() > 250
    by_bias = jax.vmap(lambda b: inversion.label_of_gradient(bias=b))(head["bias"])
    by_kernel = jax.vmap(lambda k: inversion.label_of_gradient(kernel=k))(head["kernel"])
    np.testing.assert_array_equal(by_bias.label, batch["y"][:, 0])
    assert by_bias.ok.all()
    np.testing.assert_array_equal(by_kernel.label[alive], batch["y"][alive, 0])
    assert by_kernel.ok[alive].all() and not by_kernel.ok[~alive].any()


def test_a_batch_is_no_single_example():
    assert not inversion.label_of_gradient(bias=jnp.array([-0.3, -0.2, 0.5])).ok


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 10**6))
def test_counts_are_exact_where_probabilities_are_known(labels, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (len(labels), 6))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = (probabilities - np.eye(6)[labels]).mean(axis=0)
    counts = np.bincount(labels, minlength=6)
    known = jnp.float32(probabilities.mean(axis=0))
    found = inversion.label_counts(jnp.float32(gradient), len(labels), mean_probabilities=known)
    np.testing.assert_array_equal(found, counts)
    rows = inversion.labels_from_counts(found, len(labels))
    np.testing.assert_array_equal(rows, sorted(labels))
    # Without them classes of negative gradient are still certain, and there are as many labels as examples.
    rough = np.asarray(inversion.label_counts(jnp.float32(gradient), len(labels)))
    assert rough.sum() == len(labels) and rough.min() >= 0 and (rough[gradient < -1e-6] > 0).all()


def test_counts_of_a_local_update_at_the_start_of_training():
    model, params = mlp(num_classes=5)
    batch = batch_of(12, seed=3)
    train = local.sgd(nn.cross_entropy(model.apply), optax.sgd(0.05), batch_size=4)
    delta = train.update(params, (), ClientData(batch, jnp.int32(12), jnp.int32(12)), KEY)[0].delta
    own = jax.nn.softmax(model.apply(params, batch_of(40, seed=4)["x"])).mean(axis=0)
    counts = inversion.label_counts(delta["head"]["bias"] / (0.05 * 3), 12, mean_probabilities=own)
    truth = np.bincount(np.asarray(batch["y"]), minlength=5)
    assert np.abs(np.asarray(counts) - truth).sum() <= 2


# Distances


def trees(seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": {"c": rng.normal(size=4).astype(np.float32)}}


def flat(tree, mask):
    return np.concatenate([np.float64(x)[m] for x, m in zip(jax.tree.leaves(tree), mask, strict=True)])


MASKS = {
    "all": (None, (np.ones((3, 2), bool), np.ones(4, bool))),
    "a leaf": ({"a": 1.0, "b": {"c": 0.0}}, (np.ones((3, 2), bool), np.zeros(4, bool))),
    "entries": (
        {"a": 0.5, "b": {"c": np.array([1, 0, 0, 1.0])}},
        (np.ones((3, 2), bool), np.array([True, False, False, True])),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_distances_are_their_formulas_on_what_was_sent(name):
    mask, sent = MASKS[name]
    guess, seen = trees(0), trees(1)
    a, b = flat(guess, sent), flat(seen, sent)
    # What was not sent is not read.
    hidden = jax.tree.map(lambda x, m: np.where(m, x, np.nan), seen, jax.tree.unflatten(jax.tree.structure(seen), sent))
    expected = {
        inversion.squared_distance: ((a - b) ** 2).sum() / (b**2).sum(),
        inversion.cosine_distance: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        inversion.sign_distance: (a[np.sign(a) != np.sign(b)] ** 2).sum() / (a**2).sum(),
    }
    for distance_fn, value in expected.items():
        np.testing.assert_allclose(distance_fn(guess, hidden, mask), value, rtol=1e-5)
        gradient = jax.grad(distance_fn)(guess, hidden, mask)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_distances_have_no_scale_and_no_nan_at_zero(scale):
    guess, seen = trees(0), trees(1)
    big = [jax.tree.map(lambda x: np.float32(scale) * x, tree) for tree in (guess, seen)]
    for distance_fn in (inversion.squared_distance, inversion.cosine_distance, inversion.sign_distance):
        np.testing.assert_allclose(distance_fn(*big), distance_fn(guess, seen), rtol=1e-4)
        nothing = jax.tree.map(np.zeros_like, guess)
        gradient = jax.grad(distance_fn)(nothing, seen)
        assert np.isfinite(distance_fn(nothing, seen)) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        assert np.isfinite(distance_fn(guess, nothing))


def test_total_variation_by_hand():
    x = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 2.0]])[None, :, :, None]
    assert inversion.total_variation(x) == pytest.approx(2 / 3 + (1 + 1 + 1 + 1) / 4)


# Searching


def test_a_search_keeps_its_best_point():
    """Steps far too long: the objective goes up, and the start is returned."""
    simulate_fn = lambda guess, key: {"a": guess**3}  # noqa: E731
    observed = {"a": jnp.array([1.0])}
    guess, info = inversion.match(
        simulate_fn, observed, lambda key: jnp.array([2.0]), optax.sgd(50.0), KEY, num_steps=6
    )
    told = np.asarray(info.objective[0])
    assert told[1] > told[0] and info.value == told.min()
    np.testing.assert_allclose((guess**3 - 1) ** 2, [info.value], rtol=1e-5)


def test_the_best_start_is_chosen_and_its_objective_is_of_what_is_returned():
    """A double well whose deeper half is met by some of the starts only."""
    simulate_fn = lambda guess, key: {"a": guess, "b": guess**2}  # noqa: E731
    observed = {"a": jnp.array([-1.0]), "b": jnp.array([1.0])}

    def search(num_restarts, key):
        start_fn = lambda k: jax.random.uniform(k, (1,), minval=-0.5, maxval=3.0)  # noqa: E731
        return inversion.match(
            simulate_fn, observed, start_fn, optax.sgd(0.05), key, num_steps=60, num_restarts=num_restarts
        )

    guess, info = search(8, KEY)
    assert info.objective.shape == (8, 61) and np.ptp(info.objective[:, -1]) >= 0
    assert info.chosen == np.argmin(info.objective.min(axis=1)) and info.value == info.objective.min()
    value = inversion.squared_distance(simulate_fn(guess, None), observed)
    np.testing.assert_allclose(value, info.value, rtol=1e-5, atol=1e-9)
    # The starts of fewer restarts are among those of more.
    np.testing.assert_allclose(search(3, KEY)[1].objective, info.objective[:3], rtol=1e-6)


def test_what_is_not_finite_is_never_chosen():
    simulate_fn = lambda guess, key: {"a": jnp.sqrt(guess)}  # noqa: E731
    start_fn = lambda k: jnp.where(jax.random.bernoulli(k), 0.5, -1.0) * jnp.ones(1)  # noqa: E731
    observed = {"a": jnp.ones(1)}
    guess, info = inversion.match(simulate_fn, observed, start_fn, optax.sgd(0.1), KEY, num_steps=4, num_restarts=6)
    spoiled = np.isinf(info.objective).all(axis=1)
    assert spoiled.any() and not spoiled.all() and not spoiled[info.chosen] and guess[0] > 0
    nothing = lambda key: jnp.full(1, -1.0)  # noqa: E731
    guess, info = inversion.match(simulate_fn, observed, nothing, optax.sgd(0.1), KEY, num_steps=2)
    assert info.value == np.inf and guess[0] == -1


def test_bounds_and_priors_are_kept():
    simulate_fn = lambda guess, key: {"a": guess}  # noqa: E731
    options = {
        "num_steps": 40,
        "project_fn": lambda g: jnp.clip(g, 0, 1),
        "prior_fn": lambda g: 0.25 * jnp.abs(g).sum(),
    }
    observed = {"a": jnp.array([2.0, 0.2])}
    start_fn = lambda key: jnp.full(2, 5.0)  # noqa: E731
    guess, _ = inversion.match(simulate_fn, observed, start_fn, optax.sgd(0.2), KEY, **options)
    # The first entry stops at its bound, the second pays more for its size than it gains.
    assert guess[0] == 1 and 0 <= guess[1] < 0.05


def test_one_trace_serves_all_victims_and_equal_keys_give_equal_guesses():
    traces = []

    def simulate_fn(guess, key):
        traces.append(1)
        return {"a": jnp.tanh(guess)}

    def attack(observed, key):
        return inversion.match(
            simulate_fn, observed, lambda k: jax.random.normal(k, (2,)), optax.sgd(0.3), key, num_steps=9
        )

    run = jax.jit(jax.vmap(attack))
    observed, keys = {"a": jnp.array([[0.1, 0.2], [0.3, -0.4], [0.5, 0.0]])}, jax.random.split(KEY, 3)
    together = run(observed, keys)
    count = len(traces)
    again = run(observed, keys)
    assert len(traces) == count
    for i in range(3):
        alone = attack(jax.tree.map(lambda x, i=i: x[i], observed), keys[i])
        for a, b, c in zip(*(jax.tree.leaves(t) for t in (together, again, alone)), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a[i], c, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inversion.linear_input(jnp.ones((2, 3)), jnp.ones(2)), ValueError, r"\[in, out\] and \[out\]"),
        (lambda: inversion.label_of_gradient(), ValueError, r"kernel must be \[in, K\]"),
        (lambda: inversion.label_of_gradient(bias=jnp.ones(1)), ValueError, r"\[K\] with K >= 2"),
        (lambda: inversion.label_counts(jnp.ones(3), 0), ValueError, "num_examples must be at least 1, got 0"),
        (
            lambda: inversion.label_counts(jnp.ones(3), 2, mean_probabilities=jnp.ones(2)),
            ValueError,
            r"mean_probabilities must be \(3,\), got \(2,\)",
        ),
        (
            lambda: inversion.squared_distance({"a": 1.0}, {"a": 1.0}, {"b": 1.0}),
            ValueError,
            "mask must have the structure",
        ),
        (
            lambda: inversion.squared_distance({"a": jnp.ones(3)}, {"a": jnp.ones(3)}, {"a": jnp.ones(2)}),
            ValueError,
            r"mask must hold scalars or arrays of shape \(3,\), got \(2,\)",
        ),
        (lambda: inversion.total_variation(jnp.ones((4, 1, 1))), ValueError, "H, W >= 2"),
        (
            lambda: inversion.match(
                lambda g, k: {"a": g}, {"b": 1.0}, lambda k: jnp.ones(()), optax.sgd(1.0), KEY, num_steps=1
            ),
            ValueError,
            "observed must have the structure",
        ),
        (
            lambda: inversion.match(
                lambda g, k: g, jnp.ones(2), lambda k: jnp.ones(()), optax.sgd(1.0), KEY, num_steps=1
            ),
            ValueError,
            r"observed must have the shapes of a simulated upload, \(\), got \(2,\)",
        ),
        (
            lambda: inversion.match(
                lambda g, k: g, jnp.ones(()), lambda k: jnp.ones(()), optax.sgd(1.0), KEY, num_steps=0
            ),
            ValueError,
            "num_steps must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
