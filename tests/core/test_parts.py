from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cedarjax as cj
from cedarjax.core import freeze, in_part, merge, partition, train_only


class Net(NamedTuple):
    body: dict
    head: tuple


def make_params():
    return {"body": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones(3)}}


@pytest.mark.parametrize(
    ("tree", "part", "want"),
    [
        ({"a": {"x": 0, "y": 0}, "b": 0}, "a", {"a": {"x": True, "y": True}, "b": False}),
        ({"a": {"x": 0, "y": 0}, "b": 0}, "a/x", {"a": {"x": True, "y": False}, "b": False}),
        ({"a": 0, "b": 0, "c": 0}, ["c", "a"], {"a": True, "b": False, "c": True}),
        ({"a": 0, "b": 0, "c": 0}, ("b",), {"a": False, "b": True, "c": False}),
        ({"a": {"x": 0}, "ab": {"x": 0}}, "a", {"a": {"x": True}, "ab": {"x": False}}),
        ({"n1": 0, "c": {"n": 0, "w": 0}}, lambda n: "n" in n, {"n1": True, "c": {"n": True, "w": False}}),
        (Net({"w": 0}, (0, 0)), "head", Net({"w": False}, (True, True))),
        (Net({"w": 0}, (0, 0)), "head/1", Net({"w": False}, (False, True))),
        ([0, {"w": 0}], "1", [False, {"w": True}]),
        ({"a": 0, "none": None, "b": 0}, "b", {"a": False, "none": None, "b": True}),
    ],
)  # fmt: skip
def test_a_part_is_named_by_layers_or_a_predicate(tree, part, want):
    assert in_part(tree, part) == want


def test_a_predicate_may_return_what_is_true():
    assert in_part({"a": 0, "b": 0}, lambda name: np.bool_(name == "a")) == {"a": True, "b": False}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("tail", "layer 'tail' owns no parameter; the layers are"),
        (["body", "tail"], "layer 'tail' owns no parameter"),
        (["body", "body/bias"], "layers must not overlap"),
        (["body", "head"], "which is all of"),
        ([], "which is none of"),
        (lambda name: True, r"which is all of \['body/bias', 'body/kernel', 'head/kernel'\]"),
        (lambda name: "norm" in name, "which is none of"),
    ],
)
@pytest.mark.parametrize(
    "function", [in_part, partition, lambda tree, part: train_only(optax.sgd(1.0), part).init(tree)]
)
def test_parts_that_are_not_some_of_the_leaves(function, part, message):
    with pytest.raises(ValueError, match=message):
        function(make_params(), part)


def test_a_model_of_one_leaf_has_no_part():
    with pytest.raises(ValueError, match="which is none of"):
        in_part(jnp.ones(2), lambda name: name == "w")


@pytest.mark.parametrize(
    "tree", [make_params(), Net({"w": jnp.ones(2)}, (jnp.zeros(1), jnp.ones(3))), [1.0, {"w": 2.0}]]
)
def test_a_part_and_the_rest_are_the_tree(tree):
    part = [name for name in ("head", "1") if name in {n.split("/")[0] for n in cj.core.leaf_names(tree)}]
    taken, rest = partition(tree, part)
    sizes = [len(jax.tree.leaves(t)) for t in (taken, rest, tree)]
    assert sizes[0] + sizes[1] == sizes[2] and 0 < sizes[0] < sizes[2]
    assert jax.tree.structure(merge(taken, rest)) == jax.tree.structure(tree) == jax.tree.structure(merge(rest, taken))
    jax.tree.map(np.testing.assert_array_equal, merge(taken, rest), tree)
    is_none = {"is_leaf": lambda x: x is None}
    assert jax.tree.structure(taken, **is_none) == jax.tree.structure(rest, **is_none)


def test_what_is_not_there_is_neither_mapped_nor_summed():
    taken, rest = partition(make_params(), "head")
    assert cj.layers.payload_bytes(None, rest) == 4 * 9 and cj.layers.payload_bytes(None, taken) == 4 * 3
    assert jax.tree.map(jnp.sum, rest)["head"] == {"kernel": None}
    stacked = jax.vmap(lambda scale: jax.tree.map(lambda x: scale * x, rest))(jnp.arange(2.0))
    assert stacked["body"]["bias"].shape == (2, 3) and stacked["head"] == {"kernel": None}


def test_two_leaves_at_one_place():
    with pytest.raises(ValueError, match="one and other must not have a leaf at the same place"):
        merge({"a": 1.0, "b": None}, {"a": 2.0, "b": 1.0})


def test_parts_of_a_flax_model():
    model = cj.nn.functional(lambda rngs: cj.nn.MLP(4, (8,), 3, rngs=rngs))
    params = model.init(jax.random.key(0))
    head, body = partition(params, "head")
    assert cj.core.leaf_names(head) == ["head/bias", "head/kernel"]
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(model.apply(merge(body, head), x), model.apply(params, x))


def test_parts_of_an_nnx_state():
    state = nnx.state(nnx.Dict(body=nnx.Linear(2, 3, rngs=nnx.Rngs(0)), head=nnx.Linear(3, 1, rngs=nnx.Rngs(1))))
    head, body = partition(state, "head")
    assert cj.core.leaf_names(head) == ["head/bias", "head/kernel"]
    assert cj.core.leaf_names(body) == ["body/bias", "body/kernel"]


@pytest.mark.parametrize("which", ["train_only", "freeze"])
def test_one_part_is_trained(which):
    """Momentum and weight decay of the trained part are those of an optimiser that sees nothing else."""
    params = make_params()
    rng = np.random.default_rng(0)
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))
    tx, trained = (train_only(base, "body"), "body") if which == "train_only" else (freeze(base, "body"), "head")
    state, alone = tx.init(params), params[trained]
    alone_state = base.init(alone)
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, alone_state = base.update(grads[trained], alone_state, alone)
        alone = optax.apply_updates(alone, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params[trained], alone)
    still = "head" if trained == "body" else "body"
    jax.tree.map(np.testing.assert_array_equal, params[still], make_params()[still])


def test_a_frozen_part_may_have_gradients_that_are_not_finite():
    params = make_params()
    grads = {"body": params["body"], "head": {"kernel": jnp.full(3, jnp.nan)}}
    tx = freeze(optax.sgd(1.0), "head")
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not np.any(updates["head"]["kernel"]) and (updates["body"]["bias"] == -1).all()


def test_the_gradient_of_a_frozen_part_is_not_computed():
    """The program with a frozen part has fewer operations than the one that trains everything."""

    def step(tx, params, x):
        def loss(p):
            hidden = jnp.tanh(x @ p["body"]["kernel"] + p["body"]["bias"][None])
            return jnp.square(hidden @ p["head"]["kernel"]).sum()

        return tx.update(jax.grad(loss)(params), tx.init(params), params)[0]

    def flops(tx):
        lowered = jax.jit(lambda params, x: step(tx, params, x)).lower(make_params(), jnp.ones((64, 2)))
        return lowered.compile().cost_analysis()["flops"]

    assert flops(train_only(optax.sgd(1.0), "head")) < 0.8 * flops(optax.sgd(1.0))
