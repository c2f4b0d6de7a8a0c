"""Flipped labels: an involution on the flagged clients, nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.attacks import flip_cohort, label_flip
from cedarjax.core import ClientData, Cohort


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 6), min_size=4, max_size=4)), min_size=3, max_size=3),
    st.integers(7, 9),
)
def test_flags_decide(clients, num_classes):
    flags, labels = [c[0] for c in clients], [c[1] for c in clients]
    got = label_flip(jnp.array(labels), jnp.array(flags), num_classes)
    wanted = [[num_classes - 1 - y if flag else y for y in row] for flag, row in zip(flags, labels, strict=True)]
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(label_flip(got, jnp.array(flags), num_classes), labels)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint8])
def test_shapes_and_dtypes(dtype):
    flags = jnp.array([True, False])
    for shape in ((2,), (2, 3), (2, 3, 4)):
        labels = jnp.ones(shape, dtype)
        got = jax.jit(lambda x: label_flip(x, flags, 10))(labels)
        assert got.shape == shape and got.dtype == dtype
        np.testing.assert_array_equal(got[0], jnp.full(shape[1:], 8, dtype))
        np.testing.assert_array_equal(got[1], labels[1])


def make_cohort(byzantine, examples=None):
    count = jnp.full(2, 3, jnp.int32)
    if examples is None:
        examples = {"x": jnp.ones((2, 3, 5)), "y": jnp.array([[0, 1, 2], [0, 1, 2]])}
    return Cohort(
        ClientData(examples, count, count), jnp.array([1.0, 2.0]), jnp.arange(2), state=(), byzantine=byzantine
    )


def test_flip_cohort_changes_labels_only():
    cohort = make_cohort(jnp.array([False, True]))
    flipped = flip_cohort(cohort, 4)
    np.testing.assert_array_equal(flipped.data.examples["y"], [[0, 1, 2], [3, 2, 1]])
    restored = flipped._replace(data=flipped.data._replace(examples=cohort.data.examples))
    jax.tree.map(np.testing.assert_array_equal, restored, cohort)
    np.testing.assert_array_equal(cohort.data.examples["y"], [[0, 1, 2], [0, 1, 2]])
    named = make_cohort(jnp.array([True, True]), {"label": jnp.array([[0], [1]])})
    np.testing.assert_array_equal(flip_cohort(named, 3, label_key="label").data.examples["label"], [[2], [1]])


def test_label_flip_rejects_bad_input():
    flags = jnp.array([True, False])
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        label_flip(jnp.zeros((2, 3), jnp.int32), flags, 1)
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        label_flip(jnp.zeros((2, 3)), flags, 3)
    with pytest.raises(ValueError, match=r"byzantine must be \[C\] with C = 3.*\(2,\)"):
        label_flip(jnp.zeros((3, 3), jnp.int32), flags, 3)
    with pytest.raises(ValueError, match="labels must be .*got a scalar"):
        label_flip(jnp.int32(3), flags, 3)
    with pytest.raises(ValueError, match="byzantine must be given"):
        flip_cohort(make_cohort(None), 4)
    with pytest.raises(ValueError, match=r"label_key must be a key of cohort.data.examples, got 'z' for \['x', 'y'\]"):
        flip_cohort(make_cohort(flags), 4, label_key="z")
    with pytest.raises(ValueError, match="got 'y' for tuple"):
        flip_cohort(make_cohort(flags, (jnp.ones((2, 1)),)), 4)
