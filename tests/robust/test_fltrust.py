import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import robust
from cedarjax.robust import fltrust
from tests.robust import robust_oracles as oracles

NUM_CLIENTS = 8
WEIGHTS = np.array([1.0, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 2.0])
PRESENT = np.array([0, 1, 2, 4, 5, 7])


def make_updates(seed=0, dtype=np.float32):
    """Row 3 is absent and holds NaN, row 6 one Inf; row 1 points away, row 2 is zero."""
    rng = np.random.default_rng(seed)
    x = 1 + rng.normal(size=(NUM_CLIENTS, 10))
    x[1], x[2], x[5] = -x[0], 0, 1e6 * x[5]
    x[3], x[6, 8] = np.nan, np.inf
    x = x.astype(dtype)
    own = (1 + 0.1 * rng.normal(size=10)).astype(dtype)
    return {"a": x[:, :6].reshape(NUM_CLIENTS, 2, 3), "b": x[:, 6:]}, {"a": own[:6].reshape(2, 3), "b": own[6:]}


def oracle(x, w, g):
    """Trust of each client, and the rescaled rows' mean."""
    lengths = np.linalg.norm(x, axis=1)
    safe = np.where(lengths > 0, lengths, 1)
    trust = np.maximum(0, x @ g / (safe * np.linalg.norm(g)))
    return trust, (w * trust) @ (x * (np.linalg.norm(g) / safe)[:, None]) / (w * trust).sum()


def run(rule, updates, weights=WEIGHTS, params=None):
    return jax.jit(lambda u, w, p: rule.update(u, rule.init(None), p, weights=w))(
        jax.tree.map(jnp.asarray, updates), jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights), params
    )


def test_definition():
    updates, own = make_updates()
    got, state = run(fltrust(own), updates)
    x = oracles.flat(updates)[PRESENT]
    trust, want = oracle(x, WEIGHTS[PRESENT], oracles.flat_one(own))
    assert trust[1] == 0 and trust[2] == 0 and (trust > 0).sum() == 4
    np.testing.assert_allclose(oracles.flat_one(got), want, atol=2e-6)
    told = np.asarray(state.info.coefficients, np.float64)
    np.testing.assert_allclose(told[PRESENT] @ x, want, atol=4e-6)
    assert state.info.ok and state.num_nonfinite == 1 and not np.any(told[[1, 2, 3, 6]])


def test_length_of_an_update_does_not_matter():
    updates, own = make_updates()
    got, _ = run(fltrust(own), updates)
    scale = np.array([1e-8, 3, 1, 1, 1e9, 7, 1, 0.5], np.float32)
    scaled = jax.tree.map(lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)), updates)
    again, _ = run(fltrust(own), scaled)
    np.testing.assert_allclose(oracles.flat_one(again), oracles.flat_one(got), atol=2e-6)


def test_nobody_who_is_trusted_gives_zeros_and_says_so():
    updates, own = make_updates()
    for g, weights in ((jax.tree.map(lambda x: -x, own), np.eye(NUM_CLIENTS)[0]), (own, np.eye(NUM_CLIENTS)[1])):
        got, state = run(fltrust(g), updates, weights)
        assert not oracles.flat_one(got).any() and not state.info.ok
    got, state = run(fltrust(jax.tree.map(np.zeros_like, own)), updates)
    assert not oracles.flat_one(got).any() and not state.info.ok
    got, state = run(fltrust(own), updates, np.zeros(NUM_CLIENTS))
    assert not oracles.flat_one(got).any() and not state.info.ok


def test_server_update_may_be_a_function_of_the_parameters():
    updates, own = make_updates()
    params = jax.tree.map(lambda x: 2 * x, own)
    got, _ = run(fltrust(lambda p: jax.tree.map(lambda x: x / 2, p)), updates, params=params)
    want, _ = run(fltrust(own), updates)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match="params must be given"):
        run(fltrust(lambda p: p), updates)


def test_an_attacker_whose_square_overflows_is_not_trusted():
    updates, own = make_updates()
    updates["b"][5] = 1e30
    got, _ = run(fltrust(own), updates)
    rest = np.array([0, 1, 2, 4, 7])
    _, want = oracle(oracles.flat(updates)[rest], WEIGHTS[rest], oracles.flat_one(own))
    np.testing.assert_allclose(oracles.flat_one(got), want, atol=2e-6)


@pytest.mark.parametrize("wrapper", ["clip", "nnm"])
def test_rows_that_are_not_written(wrapper):
    updates, own = make_updates()
    x, w = oracles.flat(updates)[PRESENT], WEIGHTS[PRESENT]
    make, rows = {
        "clip": (lambda rule: robust.clip(2.0, rule), oracles.clip(x, 2.0)),
        "nnm": (lambda rule: robust.nnm(1, rule), oracles.nnm(x, w, 1)),
    }[wrapper]
    got, _ = run(make(fltrust(own)), updates)
    np.testing.assert_allclose(oracles.flat_one(got), oracle(rows, w, oracles.flat_one(own))[1], atol=1e-5)


def test_layers_that_clients_left_out():
    """Cosines and lengths are over what was uploaded."""
    updates, own = make_updates()
    updates["b"][6, 2] = 1.0
    flags = {"a": np.ones(NUM_CLIENTS), "b": np.ones(NUM_CLIENTS)}
    flags["a"][[0, 3]], flags["b"][[3, 4]] = 0, 0
    updates["a"][0], updates["b"][4] = np.nan, np.nan
    got, _ = run(fltrust(own), updates, flags)
    layers = [np.asarray(updates[k], np.float64).reshape(NUM_CLIENTS, -1) for k in "ab"]
    gs = [oracles.flat_one(own[k]) for k in "ab"]
    trust, rescaling = np.zeros(NUM_CLIENTS), np.zeros(NUM_CLIENTS)
    for i in range(NUM_CLIENTS):
        sent = [j for j, k in enumerate("ab") if flags[k][i] > 0]
        x = np.concatenate([layers[j][i] for j in sent] or [np.zeros(1)])
        g = np.concatenate([gs[j] for j in sent] or [np.zeros(1)])
        if np.linalg.norm(x) > 0:
            trust[i] = max(0, x @ g / np.linalg.norm(x) / np.linalg.norm(g))
            rescaling[i] = np.linalg.norm(g) / np.linalg.norm(x)
    told = trust / trust.sum() * rescaling
    want = []
    for x, k in zip(layers, "ab", strict=True):
        shared = np.where(flags[k] > 0, told, 0)
        want.append(shared * told.sum() / shared.sum() @ np.where(flags[k][:, None] > 0, x, 0))
    np.testing.assert_allclose(oracles.flat_one(got), np.concatenate(want), atol=4e-6)


def test_double_precision(x64):
    updates, own = make_updates(dtype=np.float64)
    got, _ = run(fltrust(own), updates)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float64")}
    _, want = oracle(oracles.flat(updates)[PRESENT], WEIGHTS[PRESENT], oracles.flat_one(own))
    np.testing.assert_allclose(oracles.flat_one(got), want, rtol=0, atol=1e-12)
