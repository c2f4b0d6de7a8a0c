"""Whole attacks on small models: what they reconstruct of a gradient, of local training, of a part of the upload."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax import local, metrics, nn
from cedarjax.attacks import inversion

# optax.adam and optax.lbfgs mix dtypes.
pytestmark = pytest.mark.standard_promotion

KEY = jax.random.key(0)
SIDE, NUM_CLASSES = 28, 10


def cnn(params, x):
    """Two smooth convolutions and a linear map, without a bias but the last."""
    for name in ("conv1", "conv2"):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = nn.conv_general_dilated(x, params[name]["kernel"], (2, 2), "SAME", dimension_numbers=numbers)
        x = jnp.tanh(x)
    return x.reshape(x.shape[0], -1) @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(KEY, 3)
    return {
        "conv1": {"kernel": 0.2 * jax.random.normal(keys[0], (5, 5, 1, 8))},
        "conv2": {"kernel": 0.1 * jax.random.normal(keys[1], (3, 3, 8, 8))},
        "head": {"kernel": 0.1 * jax.random.normal(keys[2], (392, NUM_CLASSES)), "bias": jnp.zeros(NUM_CLASSES)},
    }


def pictures(count):
    """Smooth blobs with a sharp bar, `[count, 28, 28, 1]` in [0, 1]."""
    rng, grid = np.random.default_rng(0), np.arange(SIDE)
    found = np.zeros((count, SIDE, SIDE, 1), np.float32)
    for image in found[..., 0]:
        for _ in range(3):
            row, column, size = rng.uniform(6, 22), rng.uniform(6, 22), rng.uniform(2, 5)
            image += np.exp(-((grid[:, None] - row) ** 2 + (grid[None] - column) ** 2) / (2 * size**2))
        image[rng.integers(3, 24) :][:3, 4:24] = 1
    return np.minimum(found, 1)


LOSS = inversion.soft_cross_entropy(cnn)


def of_one(params, labels):
    """Observed gradients `[V, ...]` of one picture each."""
    x = pictures(len(labels))
    rows = {"x": jnp.asarray(x[:, None]), "y": jnp.asarray(labels, jnp.int32)[:, None]}
    return x, jax.vmap(lambda batch: inversion.gradient_of(LOSS, params)(batch, KEY))(rows)


def attack_all(simulate_fn, observed, count, attack_fn=inversion.inverting_gradients, rows=1, **options):
    """The attack on every victim, jitted; labels are read from the last bias."""

    def one(seen, key):
        label = inversion.label_of_gradient(bias=seen["head"]["bias"]).label[None]
        given = {"labels": label} if rows == 1 and "labels" not in options and "num_classes" not in options else {}
        return attack_fn(simulate_fn, seen, (rows, SIDE, SIDE, 1), key, **given, **options)

    return jax.jit(jax.vmap(one))(observed, jax.random.split(KEY, count))


def test_inverting_gradients_shows_the_pictures_of_single_gradients(params):
    labels = [3, 0, 7]
    x, observed = of_one(params, labels)
    found = attack_all(inversion.gradient_of(LOSS, params), observed, 3, num_steps=300, tv_weight=1e-3)
    np.testing.assert_array_equal(found.y[:, 0], labels)
    quality = metrics.reconstruction(found.x[:, 0], x)
    assert (quality.psnr > 20).all() and (quality.ssim > 0.8).all()
    assert found.x.min() >= 0 and found.x.max() <= 1
    # A blind guess, the mean picture, is far from that.
    assert (metrics.psnr(np.broadcast_to(x.mean(axis=0), x.shape), x) < 18).all()
    assert found.info.objective.shape == (3, 1, 301)
    assert (found.info.objective[:, 0, -1] < 0.1 * found.info.objective[:, 0, 0]).all()


def test_a_layer_that_was_not_sent_is_not_read_and_protects_little(params):
    x, observed = of_one(params, [4])
    mask = {"conv1": {"kernel": 0.0}, "conv2": {"kernel": 1.0}, "head": {"kernel": 1.0, "bias": 1.0}}
    hidden = {**observed, "conv1": {"kernel": jnp.full_like(observed["conv1"]["kernel"], jnp.nan)}}
    options = {"num_steps": 300, "tv_weight": 1e-3, "mask": mask}
    simulate_fn = inversion.gradient_of(LOSS, params)
    found = attack_all(simulate_fn, hidden, 1, **options)
    np.testing.assert_array_equal(found.x, attack_all(simulate_fn, observed, 1, **options).x)
    assert metrics.psnr(found.x[:, 0], x)[0] > 20


def test_labels_can_be_guessed_along(params):
    x, observed = of_one(params, [6])
    options = {"num_classes": NUM_CLASSES, "num_steps": 300, "tv_weight": 1e-3}
    found = attack_all(inversion.gradient_of(LOSS, params), observed, 1, **options)
    assert found.y.shape == (1, 1) and found.y[0, 0] == 6
    assert metrics.psnr(found.x[:, 0], x)[0] > 20


@pytest.mark.slow
def test_a_batch_is_reconstructed_up_to_its_order(params):
    x = pictures(2)
    batch = {"x": jnp.asarray(x), "y": jnp.array([8, 1], jnp.int32)}
    simulate_fn = inversion.gradient_of(LOSS, params)
    observed = simulate_fn(batch, KEY)
    own = jax.nn.softmax(cnn(params, jnp.asarray(pictures(6)[2:]))).mean(axis=0)
    counts = inversion.label_counts(observed["head"]["bias"], 2, mean_probabilities=own)
    labels = inversion.labels_from_counts(counts, 2)
    np.testing.assert_array_equal(labels, [1, 8])
    stacked = jax.tree.map(lambda leaf: leaf[None], observed)
    found = attack_all(simulate_fn, stacked, 1, rows=2, labels=labels, num_steps=300, tv_weight=1e-3)
    quality = metrics.reconstruction(found.x[0], x)
    np.testing.assert_array_equal(quality.order, [1, 0])
    assert quality.psnr.mean() > 20


@pytest.mark.slow
def test_local_training_is_inverted_through_its_steps(params):
    """One epoch of two steps with momentum; the attacker knows the order of the batches."""
    x, labels = pictures(2), jnp.array([2, 9], jnp.int32)
    client_key = jax.random.key(5)
    train = local.sgd(LOSS, optax.sgd(0.1, momentum=0.5), batch_size=1)
    upload = inversion.update_of(train, params)
    simulate_fn = lambda batch, key: upload(batch, client_key)  # noqa: E731
    observed = simulate_fn({"x": jnp.asarray(x), "y": labels}, KEY)
    stacked = jax.tree.map(lambda leaf: leaf[None], observed)
    found = attack_all(simulate_fn, stacked, 1, rows=2, labels=labels, num_steps=400, tv_weight=1e-3)
    quality = metrics.reconstruction(found.x[0], x)
    np.testing.assert_array_equal(quality.order, [0, 1])
    assert (quality.psnr > 20).all()


def small():
    """A smooth MLP of four inputs and the gradient of one example."""
    model = lambda w, x: jnp.tanh(x @ w["one"] + w["bias"][None]) @ w["two"]  # noqa: E731
    keys = jax.random.split(KEY, 3)
    weights = {
        "one": jax.random.normal(keys[0], (4, 8)),
        "bias": jnp.zeros(8),
        "two": jax.random.normal(keys[1], (8, 3)),
    }
    simulate_fn = inversion.gradient_of(inversion.soft_cross_entropy(model), weights)
    batch = {"x": jnp.array([[0.9, -0.5, 0.1, 0.3]]), "y": jnp.array([1], jnp.int32)}
    return simulate_fn, batch, simulate_fn(batch, KEY)


@pytest.mark.parametrize("known", [False, True])
def test_dlg_finds_inputs_and_labels_exactly(known):
    simulate_fn, batch, observed = small()
    options = {"labels": batch["y"]} if known else {"num_classes": 3}
    found = jax.jit(lambda k: inversion.dlg(simulate_fn, observed, (1, 4), k, num_steps=80, num_restarts=3, **options))(
        KEY
    )
    np.testing.assert_allclose(found.x, batch["x"], atol=5e-3)
    np.testing.assert_array_equal(found.y, batch["y"])
    assert found.info.value < 1e-5 and found.info.objective.shape == (3, 81)


def test_dlg_takes_another_optimiser():
    simulate_fn, batch, observed = small()
    options = {"labels": batch["y"], "tx": optax.adam(0.1), "num_steps": 300}
    found = jax.jit(lambda k: inversion.dlg(simulate_fn, observed, (1, 4), k, **options))(KEY)
    np.testing.assert_allclose(found.x, batch["x"], atol=2e-2)


def test_soft_labels_have_the_loss_of_hard_ones(params):
    batch = {"x": jnp.asarray(pictures(3)), "y": jnp.array([1, 2, 3], jnp.int32)}
    hard, theirs = LOSS(params, batch, KEY), nn.cross_entropy(cnn)(params, batch, KEY)
    soft = LOSS(params, {**batch, "y": jax.nn.one_hot(batch["y"], NUM_CLASSES)}, KEY)
    np.testing.assert_allclose(hard, theirs, rtol=1e-6)
    np.testing.assert_allclose(soft, hard, rtol=1e-6)


def test_the_update_of_one_step_is_its_gradient(params):
    batch = {"x": jnp.asarray(pictures(2)), "y": jnp.array([1, 2], jnp.int32)}
    train = local.sgd(LOSS, optax.sgd(0.5), batch_size=2)
    delta = inversion.update_of(train, params)(batch, KEY)
    gradient = inversion.gradient_of(LOSS, params)(batch, KEY)
    for a, b in zip(jax.tree.leaves(delta), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, 0.5 * b, rtol=1e-4, atol=1e-6)


def test_signed_adam_falls_by_ten_three_times():
    tx = inversion.signed_adam(0.5, 16)
    state, sizes = tx.init(jnp.zeros(1)), []
    for _ in range(16):
        updates, state = tx.update(jnp.full(1, 1e-12), state)
        sizes.append(-float(updates[0]))
    np.testing.assert_allclose(sizes, np.repeat([0.5, 0.05, 0.005, 0.0005], [6, 4, 4, 2]), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "num_classes must be at least 2 where labels are not known, got None"),
        ({"labels": jnp.array([0.5])}, TypeError, "labels must be integers, got float32"),
        ({"labels": jnp.array([0, 1])}, ValueError, r"labels must be \(1,\) for inputs \(1, 4\), got \(2,\)"),
        ({"num_classes": 3, "bounds": (1.0, 0.0)}, ValueError, r"bounds must be \(low, high\) with low < high"),
        ({"num_classes": 3, "tv_weight": -1.0}, ValueError, "tv_weight must be at least 0, got -1.0"),
        ({"num_classes": 3, "learning_rate": 0.0}, ValueError, "learning_rate must be above 0, got 0.0"),
        ({"num_classes": 3, "num_restarts": 0}, ValueError, "num_restarts must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, error, message):
    simulate_fn, _, observed = small()
    with pytest.raises(error, match=message):
        inversion.inverting_gradients(simulate_fn, observed, (1, 4), KEY, **options)


def test_labels_that_do_not_fit_the_logits_are_refused(params):
    batch = {"x": jnp.asarray(pictures(2)), "y": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"\[B\] integers or fit logits \(2, 10\), got \(2, 3\)"):
        LOSS(params, batch, KEY)


@pytest.mark.slow
def test_mnist_digits_are_shown(params, shared_data_dir):
    folder = shared_data_dir / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    from experiments.datasets import load

    federation = load("mnist", data_dir=shared_data_dir)
    x, labels = np.asarray(federation.x[:4]), np.asarray(federation.y[:4])
    rows = {"x": jnp.asarray(x[:, None]), "y": jnp.asarray(labels, jnp.int32)[:, None]}
    simulate_fn = inversion.gradient_of(LOSS, params)
    observed = jax.vmap(lambda batch: simulate_fn(batch, KEY))(rows)
    found = attack_all(simulate_fn, observed, 4, num_steps=1000, tv_weight=1e-3)
    np.testing.assert_array_equal(found.y[:, 0], labels)
    assert (metrics.psnr(found.x[:, 0], x) > 20).all()
