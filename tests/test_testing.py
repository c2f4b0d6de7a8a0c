"""The laws catch kernels that break them: every row breaks one and is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import testing


def valid(data):
    return jnp.arange(data.examples.shape[0], dtype=jnp.int32) < data.num_examples


def mean_of(data):
    return jnp.where(valid(data), data.examples, 0).sum() / jnp.maximum(data.num_examples, 1).astype(
        data.examples.dtype
    )


def kernel(delta_fn, init=lambda params: ()):
    """A local update from `delta_fn(params, state, data, key) -> (delta, state, info)`."""

    def update(shared, state, data, key):
        delta, state, info = delta_fn(shared, state, data, key)
        return cj.Upload(delta), state, info

    return cj.LocalUpdate(init, update)


def good(params, state, data, key):
    return {"w": params["w"] - mean_of(data) + jax.random.normal(key, ())}, state, ()


def reads_padding(params, state, data, key):
    return {"w": params["w"] - data.examples.mean()}, state, ()


def masks_by_multiplication(params, state, data, key):
    # Divided first, because XLA turns a product with a converted mask into a select.
    share = valid(data).astype(jnp.float32) / data.num_examples.astype(jnp.float32)
    return {"w": params["w"] - (data.examples * share).sum()}, state, ()


def divides_by_query_examples(params, state, data, key):
    return {"w": params["w"] / (data.num_examples - data.num_support).astype(jnp.float32)}, state, ()


def returns_float32(params, state, data, key):
    return {"w": params["w"].astype(jnp.float32) - mean_of(data).astype(jnp.float32)}, state, ()


def tells_an_update(params, state, data, key):
    return {"w": params["w"] - mean_of(data)}, state, {"delta": jnp.outer(params["w"], params["w"])}


def promotes_its_state(params, state, data, key):
    return {"w": params["w"] - mean_of(data)}, state + 0.5, ()


def draws_from_numpy(params, state, data, key):
    return {"w": params["w"] + np.float32(np.random.default_rng().normal())}, state, ()


def mutates(params, state, data, key):
    params["w"] = params["w"] + 1
    return {"w": params["w"] - mean_of(data)}, state, ()


def differs_when_traced(params, state, data, key):
    return {"w": params["w"] - jnp.asarray(isinstance(params["w"], jax.core.Tracer), jnp.float32)}, state, ()


PARAMS = {"w": jnp.array([0.5, 2.0, 1.0])}
DATA = cj.ClientData(
    jnp.array([[1.0, 2.0, 4.0], [3.0, 5.0, 0.0], [7.0, 0.0, 0.0]]),
    jnp.array([3, 2, 1], jnp.int32),
    jnp.array([1, 1, 0], jnp.int32),
)

BROKEN_LOCAL_UPDATES = {
    reads_padding: "ignores_padding",
    masks_by_multiplication: "ignores_padding",
    divides_by_query_examples: "stays_finite",
    returns_float32: "keeps_shapes",
    tells_an_update: "keeps_shapes",
    draws_from_numpy: "agrees_across_layouts",
    mutates: "leaves_inputs_alone",
    differs_when_traced: "agrees_without_jit",
}


def test_a_good_local_update_passes(mesh):
    testing.check_local_update(kernel(good), PARAMS, DATA, mesh=mesh)


@pytest.mark.parametrize("delta_fn", BROKEN_LOCAL_UPDATES, ids=lambda f: f.__name__)
def test_a_broken_local_update_is_named(delta_fn, mesh):
    law = BROKEN_LOCAL_UPDATES[delta_fn]
    with pytest.raises(AssertionError, match=f"law '{law}' is broken"):
        testing.check_local_update(kernel(delta_fn), dict(PARAMS), DATA, mesh=mesh, dtypes=(jnp.bfloat16,), laws=(law,))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("law", ["traces_once", "keeps_shapes"])
def test_a_state_that_changes_its_dtype_is_named(law):
    counting = kernel(promotes_its_state, lambda params: jnp.zeros((), jnp.int32))
    with pytest.raises(AssertionError, match=f"law '{law}' is broken"):
        testing.check_local_update(counting, PARAMS, DATA, laws=(law,))


def test_one_client_stands_for_several():
    one = jax.tree.map(lambda x: x[0], DATA)
    testing.check_local_update(kernel(good), PARAMS, one, laws=("ignores_padding", "ignores_order"))
    with pytest.raises(AssertionError, match="ignores_padding"):
        testing.check_local_update(kernel(reads_padding), PARAMS, one, laws=("ignores_padding",))


def broken_aggregator(fun):
    """Gets the weights as they come."""

    def update(updates, state, params=None, *, weights=None, key=None, **extra):
        per_leaf = weights if isinstance(weights, dict) else jax.tree.map(lambda _: weights, updates)
        return jax.tree.map(lambda x, w: fun(x, w, key), updates, per_leaf), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def guarded(x, w, key):
    rows = jnp.where(w[:, None] > 0, x, 0)
    return jnp.tensordot(w, rows, axes=1) / jnp.maximum(w.sum(), 1e-9)


UPDATES = {
    "a": jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0], [2.0, 2.0]]),
    "b": jnp.array([[1.0], [2.0], [3.0], [-4.0]]),
}

BROKEN_AGGREGATORS = {
    "removes_client_axis": lambda x, w, key: x,
    "ignores_order": lambda x, w, key: jnp.where(w.max() > 0, x[0], 0),
    "ignores_absent_clients": lambda x, w, key: jnp.tensordot(w, x, axes=1) / jnp.maximum(w.sum(), 1e-9),
    "ignores_nonfinite_clients": guarded,
    "survives_few_clients": lambda x, w, key: jnp.tensordot(w, x, axes=1) / w.sum(),
    "stays_finite": lambda x, w, key: guarded(x / jnp.linalg.norm(x, axis=1, keepdims=True), w, key),
    "reads_weights_by_layer": lambda x, w, key: jnp.where(w.sum() > 0, guarded(x, w, key), 1.0),
    "agrees_without_jit": lambda x, w, key: guarded(x, w, key) + jnp.asarray(isinstance(x, jax.core.Tracer), x.dtype),
}


@pytest.mark.parametrize("law", BROKEN_AGGREGATORS)
def test_a_broken_aggregator_is_named(law, mesh):
    with pytest.raises(AssertionError, match=f"law '{law}' is broken"):
        testing.check_aggregator(broken_aggregator(BROKEN_AGGREGATORS[law]), UPDATES, mesh=mesh, laws=(law,))


def test_a_rule_without_an_equivariance_is_named():
    clipped = optax.chain(cj.robust.mean(), optax.clip(0.5))
    for equivariance in testing.EQUIVARIANCES:
        with pytest.raises(AssertionError, match=f"law '{equivariance}' is broken"):
            testing.check_aggregator(clipped, UPDATES, laws=(), equivariances=(equivariance,))


def test_the_mean_passes_all(mesh):
    testing.check_aggregator(cj.robust.mean(), UPDATES, equivariances=tuple(testing.EQUIVARIANCES), mesh=mesh)


def attack(fun):
    return optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda u, s, p=None, *, byzantine, **_: (jax.tree.map(lambda x: fun(x, byzantine[:, None]), u), s),
    )


BYZANTINE = jnp.array([False, True, False, True])

BROKEN_ATTACKS = {
    "keeps_client_axis": lambda x, bad: x.sum(axis=0),
    "touches_malicious_rows_only": lambda x, bad: -x,
    "contains_nonfinite_rows": lambda x, bad: jnp.where(bad, x.sum(axis=0, keepdims=True), x),
    "agrees_without_jit": lambda x, bad: jnp.where(bad, x + float(isinstance(x, jax.core.Tracer)), x),
}


@pytest.mark.parametrize("law", BROKEN_ATTACKS)
def test_a_broken_attack_is_named(law):
    with pytest.raises(AssertionError, match=f"law '{law}' is broken"):
        testing.check_attack(attack(BROKEN_ATTACKS[law]), UPDATES, BYZANTINE, laws=(law,))


def test_an_attack_that_spares_a_malicious_row_is_named():
    with pytest.raises(AssertionError, match="row 1 is malicious and unchanged"):
        testing.check_attack(attack(lambda x, bad: x), UPDATES, BYZANTINE, laws=("touches_malicious_rows_only",))


def test_another_error_says_during_which_law():
    def fails(params, state, data, key):
        raise KeyError("mine")

    with pytest.raises(KeyError) as error:
        testing.check_local_update(kernel(fails), PARAMS, DATA, laws=("keeps_shapes",))
    assert "while checking the law 'keeps_shapes'" in error.value.__notes__


def test_arguments_that_do_not_fit():
    with pytest.raises(TypeError, match="data must be a ClientData, got dict"):
        testing.check_local_update(kernel(good), PARAMS, {})
    with pytest.raises(ValueError, match="laws must be among"):
        testing.check_local_update(kernel(good), PARAMS, DATA, laws=("no_such_law",))
    with pytest.raises(ValueError, match="at least 3 clients, got 2"):
        testing.check_aggregator(cj.robust.mean(), {"a": jnp.ones((2, 1))})
    with pytest.raises(ValueError, match="byzantine must be"):
        testing.check_attack(cj.attacks.sign_flip(1.0), UPDATES, jnp.zeros(4, bool))
