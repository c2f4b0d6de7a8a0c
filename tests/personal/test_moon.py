import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.personal import cosine, model_contrast
from tests.local import local_oracles as oracles

RATE, MU, TEMPERATURE = 0.1, 0.8, 0.5
SERVER = optax.chain(cj.robust.mean(), optax.sgd(1.0))


def embed_fn(params, batch):
    """Representations `[B, 3]` of a model that shares its parameters with the federation of linear regressions."""
    return batch["x"] * params["w"][None] + params["b"]


def loss_fn(params, batch, key):
    return 0.5 * jnp.mean((embed_fn(params, batch).sum(axis=1) - batch["y"]) ** 2)


def embedded(w, x):
    return x * w[:3] + w[3]


def pulled_back(dz, x):
    """Gradient in `w [4]` of what has the gradient `dz [B, 3]` in the representations."""
    return np.append((dz * x).sum(axis=0), dz.sum())


def contrast(z, z_shared, z_previous):
    """The loss as the paper writes it, and its gradient in `z`, row by row."""
    losses, slopes = [], []
    for a, b, c in zip(z, z_shared, z_previous, strict=True):

        def cos(v, a=a):
            return a @ v / np.linalg.norm(a) / np.linalg.norm(v)

        def slope(v, a=a, cos=cos):
            return v / np.linalg.norm(a) / np.linalg.norm(v) - cos(v) * a / (a @ a)

        near, far = np.exp(cos(b) / TEMPERATURE), np.exp(cos(c) / TEMPERATURE)
        losses.append(-np.log(near / (near + far)))
        slopes.append(far / (near + far) * (slope(c) - slope(b)) / TEMPERATURE)
    return np.mean(losses), np.array(slopes) / len(z)


def build(**options):
    options = {"mu": MU, "temperature": TEMPERATURE, "batch_size": 2, "num_epochs": 2} | options
    return cj.personal.moon(loss_fn, embed_fn, optax.sgd(RATE), **options)


def test_rounds_follow_the_paper():
    _, xs, ys = oracles.federation()
    _, shared_w = oracles.start()
    previous, told = {}, 0
    for r, ids, weights, shared, states, info in oracles.rounds(build(), SERVER, weighted=True):
        trained = []
        for place, i in enumerate(ids):
            w, before, losses = shared_w.copy(), previous.get(i, shared_w), []
            for rows in oracles.rows_of(oracles.client_key(r, i), oracles.COUNTS[i], 2, 2):
                x, y = xs[i, rows], ys[i, rows]
                z = embedded(w, x)
                error = z.sum(axis=1) - y
                loss, slope = contrast(z, embedded(shared_w, x), embedded(before, x))
                losses.append(0.5 * np.mean(error**2) + MU * loss)
                w = w - RATE * pulled_back(error[:, None] / len(rows) + MU * slope, x)
            np.testing.assert_allclose(info.local.loss[place], np.mean(losses), rtol=1e-4)
            told += i in previous
            trained.append(w)
        for i, w in zip(ids, trained, strict=True):
            previous[i] = w
        shared_w = weights @ np.array(trained) / weights.sum()
        np.testing.assert_allclose(oracles.flat(shared), shared_w, rtol=1e-4, atol=1e-5)
        for i in range(oracles.NUM_CLIENTS):
            assert states.started[i] == (i in previous)
            own = oracles.flat(jax.tree.map(lambda leaf, i=i: leaf[i], states.previous))
            np.testing.assert_allclose(own, previous.get(i, oracles.start()[1]), rtol=1e-4, atol=1e-5)
    assert told >= 5  # most trainings had a previous model to move away from


def test_the_first_round_is_sgd():
    data = jax.tree.map(lambda x: x[0], oracles.federation()[0])
    params, key = oracles.start()[0], jax.random.key(1)
    plain = cj.local.sgd(loss_fn, optax.sgd(RATE), batch_size=2, num_epochs=2)
    want, _, want_info = plain.update(params, (), data, key)
    local = build()
    got, state, info = local.update(params, local.init(params), data, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.delta, want.delta)
    assert info.loss > want_info.loss
    after = jax.tree.map(lambda p, d: p - d, params, got.delta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.previous, after)


def test_the_previous_model_of_a_new_client_is_not_the_initial_one():
    """A client that comes late has no previous model; what `init` was given must not be taken for one."""
    data = jax.tree.map(lambda x: x[0], oracles.federation()[0])
    params, key = oracles.start()[0], jax.random.key(1)
    later, local = jax.tree.map(lambda p: p + 1, params), build()
    got = local.update(later, local.init(params), data, key)[0]
    want = local.update(later, local.init(later), data, key)[0]
    jax.tree.map(np.testing.assert_array_equal, got.delta, want.delta)


def test_the_contrast_and_its_gradient():
    z, shared, previous = np.random.default_rng(0).normal(size=(3, 5, 4))
    loss, slope = contrast(z, shared, previous)
    args = [jnp.asarray(x, jnp.float32) for x in (z, shared, previous)]
    got, grad = jax.value_and_grad(model_contrast)(*args, TEMPERATURE)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6)


def test_a_representation_of_zero_has_no_gradient():
    zero, one = jnp.zeros((1, 3)), jnp.ones((1, 3))
    for z, shared, previous in [(zero, one, -one), (zero, zero, zero), (one, zero, one)]:
        loss, grad = jax.value_and_grad(model_contrast)(z, shared, previous, 0.5)
        assert jnp.isfinite(loss) and jnp.isfinite(grad).all()
    assert not jax.grad(model_contrast)(zero, one, -one, 0.5).any()
    np.testing.assert_allclose(cosine(1e-6 * one, one), 1.0, rtol=1e-5)


def test_a_small_temperature_does_not_overflow():
    one = jnp.ones((1, 3))
    loss, grad = jax.value_and_grad(model_contrast)(one + jnp.array([[0.0, 0.0, 1.0]]), -one, one, 1e-3)
    assert loss > 1000 and jnp.isfinite(grad).all()


def test_cosines_of_bfloat16_are_taken_in_float32():
    a = jnp.full((1, 300), 1 / 3, jnp.bfloat16)
    assert cosine(a, a).dtype == jnp.float32
    np.testing.assert_allclose(cosine(a, a), 1.0, rtol=1e-5)


def test_the_shared_model_is_deployed():
    params, local = oracles.start()[0], build()
    other = jax.tree.map(jnp.ones_like, params)
    assert local.model(params, cj.personal.MoonState(other, jnp.ones((), bool))) is params


def test_weight_and_temperature_can_be_swept():
    data = jax.tree.map(lambda x: x[0], oracles.federation()[0])
    params = oracles.start()[0]
    state = cj.personal.MoonState(jax.tree.map(lambda p: p - 0.3, params), jnp.ones((), bool))

    def delta(mu, temperature):
        return build(mu=mu, temperature=temperature).update(params, state, data, jax.random.key(1))[0].delta

    swept = jax.vmap(delta)(jnp.array([0.1, 2.0]), jnp.array([0.2, 1.0]))
    for i, pair in enumerate([(0.1, 0.2), (2.0, 1.0)]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-4), swept, delta(*pair))


@pytest.mark.slow
def test_laws():
    oracles.check_laws(build(num_steps_fn=oracles.half))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": -0.5}, "mu must be at least 0, got -0.5"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_embeddings_of_the_wrong_shape():
    local = cj.personal.moon(loss_fn, lambda params, batch: batch["y"], optax.sgd(RATE), batch_size=2)
    data, params = jax.tree.map(lambda x: x[0], oracles.federation()[0]), oracles.start()[0]
    with pytest.raises(ValueError, match=r"embed_fn must return \[B, d\] with B = 2, got the shape \(2,\)"):
        local.update(params, local.init(params), data, jax.random.key(0))
