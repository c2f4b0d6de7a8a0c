import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import Arrival, Upload

R = np.array([0.0, 0.25, 0.5, 1.0])


@pytest.mark.parametrize(
    ("curve", "by_hand"),
    [
        ("linear", R),
        ("convex_quadratic", [0, 0.0625, 0.25, 1]),
        ("concave_quadratic", [0, 0.4375, 0.75, 1]),
        ("convex_exponential", (np.exp(R) - 1) / (np.e - 1)),
        ("concave_exponential", (1 - np.exp(-2 * np.e * R)) / (1 - np.exp(-2 * np.e))),
    ],
)
def test_curves(curve, by_hand):
    got = cj.server.slmfed_smoothing(jnp.asarray(R, jnp.float32), curve)
    np.testing.assert_allclose(got, by_hand, rtol=1e-6, atol=1e-7)
    assert got[0] == 0 and got[-1] == 1
    fine = np.asarray(cj.server.slmfed_smoothing(jnp.linspace(0.0, 1.0, 101), curve))
    assert (np.diff(fine) > 0).all()
    bend = np.diff(fine, 2)
    if curve != "linear":
        assert (bend > -1e-6).all() if curve.startswith("convex") else (bend < 1e-6).all()
    np.testing.assert_array_equal(cj.server.slmfed_smoothing(jnp.array([-1.0, 3.0, jnp.nan]), curve), [0, 1, 0])


def test_the_synchronous_rule_is_a_masked_mean():
    """`theta_l = sum p_i theta_il / sum p_i` over those that have l; nobody has `c`, and it stays."""
    rng = np.random.default_rng(0)
    entropy, size = rng.uniform(size=4), np.array([3, 1, 4, 1.0])

    def softmax(x):
        x = np.exp((x - x.min()) / (x.max() - x.min()))
        return x / x.sum()

    p = (softmax(entropy) + softmax(size)) / 2
    weights = cj.select.softmax_indicator(jnp.asarray(entropy, jnp.float32), jnp.asarray(size, jnp.float32))
    np.testing.assert_allclose(weights, p, rtol=1e-5)

    theta = {name: rng.normal(size=3) for name in "abc"}
    trained = {name: rng.normal(size=(4, 3)) for name in "abc"}
    has = {"a": np.array([1, 1, 1, 1.0]), "b": np.array([0, 1, 0, 1.0]), "c": np.zeros(4)}

    def upload(shared, state, data, key):
        return Upload(jax.tree.map(jnp.subtract, shared, data["trained"]), data["has"]), (), ()

    local = cj.LocalUpdate(lambda params: (), upload)
    algorithm = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"trained": trained, "has": has})
    cohort = cj.Cohort(data, weights, jnp.arange(4, dtype=jnp.int32))
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), theta)
    state, _, _ = algorithm.step(algorithm.init(start), cohort, jax.random.key(0))
    for name in "ab":
        want = (p * has[name]) @ trained[name] / (p * has[name]).sum()
        np.testing.assert_allclose(state.params[name], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.params["c"], start["c"])


def merge(server, params, uploads):
    state = server.init(params)
    for model, mask, weight in uploads:
        delta = jax.tree.map(lambda p, m: p - jnp.float32(m), params, model)
        zero = jnp.int32(0)
        arrival = Arrival(Upload(delta, mask), params, zero, jnp.float32(weight), zero, jnp.float32(0.0))
        state, _ = server.receive(state, arrival)
    return state


def test_layers_that_few_uploaded_stay_near_the_old_model():
    """By hand: accuracy half the target, P = 1 for `a` and 0.25 for `b`."""
    params = {"a": jnp.float32(0.0), "b": jnp.float32(8.0)}
    all_, only_a = {"a": jnp.float32(1), "b": jnp.float32(1)}, {"a": jnp.float32(1), "b": jnp.float32(0)}
    uploads = [({"a": 4.0, "b": 16.0}, all_, 1.0), ({"a": 8.0, "b": 0.0}, only_a, 3.0)]

    def half(params):
        return jnp.float32(0.45)

    state = merge(cj.server.slmfed_async(half, 0.9, buffer_size=2), params, uploads)
    np.testing.assert_allclose(state.params["a"], (4 + 3 * 8) / 4, rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], 8 + (1 - 0.75 * 0.5) * 8, rtol=1e-6)
    state = merge(cj.server.slmfed_async(half, 0.9, total_weight=8.0, buffer_size=2), params, uploads)
    np.testing.assert_allclose(state.params["a"], (1 - 0.25) * 7, rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], 8 + (1 - 0.875 * 0.5) * 8, rtol=1e-6)


def test_accuracy_is_that_of_the_model_before_the_merge():
    server = cj.server.slmfed_async(lambda w: w / 10, 1.0, total_weight=2.0, buffer_size=1)
    state = server.init(jnp.float32(4.0))
    for want in (4 + (1 - 0.5 * 0.4) * 4, None):
        zero = jnp.int32(0)
        arrival = Arrival(Upload(jnp.float32(-4.0)), jnp.float32(4.0), zero, jnp.float32(1.0), zero, jnp.float32(0.0))
        state, _ = server.receive(state, arrival)
        if want is not None:
            np.testing.assert_allclose(state.params, want, rtol=1e-6)
    np.testing.assert_allclose(state.params, 0.5 * 0.72 * 7.2 + (1 - 0.5 * 0.72) * 8, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cj.server.slmfed_smoothing(0.5, "cubic"), "curve must be one of .*, got 'cubic'"),
        (lambda: cj.server.slmfed_async(lambda w: w, 1.0, curve="x", buffer_size=1), "curve must be one of"),
        (lambda: cj.server.slmfed_async(lambda w: w, 0.0, buffer_size=1), "target must be above 0, got 0.0"),
        (
            lambda: cj.server.slmfed_async(lambda w: w, 1.0, total_weight=-1.0, buffer_size=1),
            "total_weight must be above 0, got -1.0",
        ),
        (lambda: cj.server.slmfed_async(lambda w: w, 1.0), "exactly one of buffer_size and period"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
