import flax.linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from cedarjax.core import layer_bytes, layer_mask, layer_names, leaf_names

LEAVES = ["block1/bias", "block1/kernel", "block10/bias", "block10/kernel", "head/bias", "head/kernel"]


class LinenNet(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        for name in ("block1", "block10", "head"):
            x = flax.linen.Dense(3, name=name)(x)
        return x


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.block1, self.block10, self.head = (nnx.Linear(3, 3, rngs=rngs) for _ in range(3))


def models():
    state = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param)
    return {
        "dict": {name: {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)} for name in ("block1", "block10", "head")},
        "linen": LinenNet().init(jax.random.key(0), jnp.ones((1, 3)))["params"],
        "nnx": state,
        "nnx as dict": nnx.to_pure_dict(state),
    }


@pytest.mark.parametrize("kind", ["dict", "linen", "nnx", "nnx as dict"])
def test_names_do_not_depend_on_the_container(kind):
    params = models()[kind]
    assert leaf_names(params) == LEAVES
    assert layer_names(params) == ("block1", "block10", "head")
    assert layer_bytes(params, ["head", "block1"]) == (48, 48)
    mask = layer_mask(params, {"block1": 0, "head": jnp.float32(0.5)})
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert [float(x) for x in jax.tree.leaves(mask)] == [0, 0, 1, 1, 0.5, 0.5]


def test_lists_tuples_and_leaves_at_the_top():
    params = {"blocks": [jnp.ones(1), {"kernel": jnp.ones(2)}], "scale": jnp.ones(3), "pair": (jnp.ones(4),)}
    assert leaf_names(params) == ["blocks/0", "blocks/1/kernel", "pair/0", "scale"]
    assert layer_names(params) == ("blocks", "blocks/1", "pair", "scale")
    assert layer_bytes(params, ["blocks", "scale"]) == (12, 12)


def test_a_layer_is_a_prefix_by_components():
    params = {"a": {"b": {"w": jnp.ones(1)}, "bc": {"w": jnp.ones(2)}}}
    mask = layer_mask(params, {"a/b": 0})
    assert float(mask["a"]["b"]["w"]) == 0 and float(mask["a"]["bc"]["w"]) == 1


def test_layer_bytes_reads_shapes_and_dtypes_only():
    params = {"a": jax.ShapeDtypeStruct((100_000, 100_000), jnp.bfloat16)}
    assert layer_bytes(params, ["a"]) == (2 * 10**10,)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["block"], "'block' owns no parameter; the layers are"),
        (["head", "head/kernel"], "must not overlap"),
        (["head/kernel/x"], "owns no parameter"),
    ],
)
def test_names_that_do_not_fit(names, message):
    params = models()["dict"]
    with pytest.raises(ValueError, match=message):
        layer_mask(params, dict.fromkeys(names, 0))
    with pytest.raises(ValueError, match=message):
        layer_bytes(params, names)
