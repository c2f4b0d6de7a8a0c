"""Bytes, exact to the integer, against sums of Python integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.core import layer_mask
from cedarjax.layers import payload_bytes

PARAMS = {
    "block1": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)},
    "block10": {"kernel": jnp.zeros((5, 7), jnp.bfloat16)},
    "head": {"kernel": jnp.zeros((7, 2), jnp.int8)},
}
BYTES = {"block1": 80, "block10": 70, "head": 14}


@given(st.dictionaries(st.sampled_from(sorted(BYTES)), st.sampled_from([0, 1]), min_size=1))
def test_judged_layers_and_one_bit_each(judged):
    wanted = sum(size * judged.get(name, 1) for name, size in BYTES.items()) + -(-len(judged) // 8)
    got = payload_bytes(judged, PARAMS)
    assert got == wanted and got.dtype == jnp.int32
    tree = layer_mask(PARAMS, {name: jnp.float32(value) for name, value in judged.items()})
    assert payload_bytes(tree, PARAMS, num_layers=len(judged)) == wanted


def test_without_a_mask_there_is_no_bitmap():
    assert payload_bytes(None, PARAMS) == 164


def test_a_tree_counts_the_layers_that_hold_parameters():
    mask = jax.tree.map(lambda _: jnp.float32(0), PARAMS)
    assert payload_bytes(mask, PARAMS) == 1
    many = {f"layer{i}": {"w": jnp.zeros(1)} for i in range(9)}
    assert payload_bytes(jax.tree.map(lambda _: 1, many), many) == 36 + 2


@pytest.mark.parametrize("value", [True, 1, np.float32(1.0), jnp.ones((), jnp.bfloat16)])
def test_every_kind_of_scalar_counts(value):
    assert payload_bytes({"head": value}, PARAMS) == 165


def test_jit_vmap_and_shape_structs():
    shapes = jax.eval_shape(lambda: PARAMS)
    masks = jnp.array([0.0, 1.0])
    got = jax.jit(jax.vmap(lambda m: payload_bytes({"block1": m}, shapes)))(masks)
    np.testing.assert_array_equal(got, [85, 165])


def test_more_than_float32_can_count():
    params = {"big": jax.ShapeDtypeStruct((16777217,), jnp.int8), "small": jax.ShapeDtypeStruct((1,), jnp.int8)}
    assert payload_bytes({"small": 1}, params) == 16777219
    assert payload_bytes({"small": 0}, params) == 16777218


def test_totals_beyond_int32():
    params = {"huge": jax.ShapeDtypeStruct((2**30,), jnp.float32)}
    with pytest.raises(ValueError, match=r"less than 2\^31 bytes unless jax_enable_x64 is set, got 4294967296"):
        payload_bytes(None, params)
    with pytest.raises(ValueError, match="got 4294967297"):
        payload_bytes({"huge": 1}, params)


def test_totals_beyond_int32_with_x64(x64):
    params = {"huge": jax.ShapeDtypeStruct((2**30,), jnp.float32)}
    got = payload_bytes({"huge": 1}, params)
    assert got.dtype == jnp.int64 and got == 2**32 + 1
    assert payload_bytes({"head": 0}, PARAMS).dtype == jnp.int32


def test_payload_rejects_bad_masks():
    with pytest.raises(ValueError, match="layer 'block' owns no parameter"):
        payload_bytes({"block": 1}, PARAMS)
    with pytest.raises(ValueError, match="mask must be None, a dict of layer names or a tree"):
        payload_bytes([1, 0], PARAMS)
    with pytest.raises(ValueError, match="num_layers must be at least 0 and come with a mask, got 3"):
        payload_bytes(None, PARAMS, num_layers=3)
