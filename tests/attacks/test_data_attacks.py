"""Poisoned data: one class renamed, and examples stamped with a trigger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.attacks import backdoor_cohort, stamp, targeted_flip, targeted_flip_cohort
from cedarjax.core import ClientData, Cohort

FLAGS = jnp.array([True, False, True])
MASK = np.zeros((4, 4), bool)
MASK[2:, 2:] = True


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 4), min_size=4, max_size=4)), min_size=3, max_size=3),
    st.permutations(range(5)),
)
def test_one_class_is_renamed(clients, classes):
    source, target, *_ = classes
    flags, labels = [c[0] for c in clients], [c[1] for c in clients]
    got = targeted_flip(jnp.array(labels), jnp.array(flags), source, target)
    wanted = [[target if flag and y == source else y for y in row] for flag, row in clients]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint8])
def test_targeted_flip_keeps_shapes_and_dtypes(dtype):
    for shape in ((3,), (3, 2), (3, 2, 4)):
        got = jax.jit(lambda x: targeted_flip(x, FLAGS, 1, 8))(jnp.ones(shape, dtype))
        assert got.shape == shape and got.dtype == dtype
        np.testing.assert_array_equal(got[0], jnp.full(shape[1:], 8, dtype))
        np.testing.assert_array_equal(got[1], jnp.ones(shape[1:], dtype))


def make_cohort(byzantine=FLAGS, examples=None, num_rows=20):
    rng = np.random.default_rng(0)
    if examples is None:
        x = rng.normal(size=(3, num_rows, 4, 4)).astype(np.float32)
        examples = {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, 3, size=(3, num_rows)), jnp.int32), "z": x}
    count = jnp.full(3, num_rows, jnp.int32)
    ids = jnp.array([7, 3, 5], jnp.int32)
    return Cohort(ClientData(examples, count, count // 2), jnp.ones(3), ids, state=(), byzantine=byzantine)


def same_but(cohort, other, *keys):
    """Whether two cohorts differ in these examples only."""
    rest = {**other.data.examples, **{key: cohort.data.examples[key] for key in keys}}
    jax.tree.map(np.testing.assert_array_equal, other._replace(data=other.data._replace(examples=rest)), cohort)


def test_targeted_flip_cohort():
    cohort = make_cohort()
    flipped = targeted_flip_cohort(cohort, 1, 9)
    same_but(cohort, flipped, "y")
    y = np.asarray(cohort.data.examples["y"])
    np.testing.assert_array_equal(flipped.data.examples["y"], np.where((y == 1) & np.asarray(FLAGS)[:, None], 9, y))


def test_stamp():
    x = np.random.default_rng(0).normal(size=(5, 4, 4)).astype(np.float32)
    trigger = np.arange(16, dtype=np.float32).reshape(4, 4)
    for value in (trigger, np.float32(2.0)):
        wanted = np.where(MASK, value, x)
        np.testing.assert_array_equal(stamp(x, value, MASK), wanted)
        np.testing.assert_array_equal(jax.vmap(lambda one, v=value: stamp(one, v, MASK))(x), wanted)
    bytes_in = stamp(np.zeros((4, 4), np.uint8), trigger, MASK)
    assert bytes_in.dtype == jnp.uint8
    np.testing.assert_array_equal(bytes_in, np.where(MASK, trigger, 0))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.35, 0.7, 1.0])
def test_backdoor_spreads_evenly(fraction):
    cohort = make_cohort()
    poisoned = backdoor_cohort(cohort, lambda x: stamp(x, jnp.float32(5.0), MASK), target=4, fraction=fraction)
    same_but(cohort, poisoned, "x", "y")
    changed = np.asarray(poisoned.data.examples["y"] == 4)  # there is no class 4 before
    np.testing.assert_array_equal(changed[~np.asarray(FLAGS)], False)
    # share of 20 rows in hundredths: whole numbers, so that no rounding decides
    shares = np.arange(1, 21) * round(100 * fraction) // 100
    np.testing.assert_array_equal(changed[np.asarray(FLAGS)].cumsum(axis=1), [shares, shares])
    x = np.asarray(cohort.data.examples["x"])
    np.testing.assert_array_equal(
        poisoned.data.examples["x"], np.where(changed[:, :, None, None], np.where(MASK, 5, x), x)
    )


def test_backdoor_with_a_key_depends_on_the_client_alone():
    cohort = make_cohort(jnp.ones(3, bool), num_rows=400)
    key = jax.random.key(1)

    def changed(cohort, key=key):
        return np.asarray(backdoor_cohort(cohort, lambda x: x, 4, 0.25, key=key).data.examples["y"] == 4)

    drawn = changed(cohort)
    np.testing.assert_allclose(drawn.mean(axis=1), 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 400))
    order = jnp.array([2, 0, 1])
    np.testing.assert_array_equal(changed(jax.tree.map(lambda x: x[order], cohort)), drawn[np.asarray(order)])
    assert (drawn[0] != drawn[1]).any() and (changed(cohort, jax.random.key(2)) != drawn).any()
    np.testing.assert_array_equal(jax.jit(changed_labels)(cohort, key) == 4, drawn)
    shorter = make_cohort(jnp.ones(3, bool), jax.tree.map(lambda x: x[:, :100], cohort.data.examples), num_rows=100)
    np.testing.assert_array_equal(changed(shorter), drawn[:, :100])


def changed_labels(cohort, key):
    return backdoor_cohort(cohort, lambda x: x, 4, 0.25, key=key).data.examples["y"]


def test_data_attacks_refuse():
    labels = jnp.zeros((3, 2), jnp.int32)
    for source, target in ((1, 1), (-1, 2), (1, -2)):
        message = f"source and target must be two classes, at least 0, got {source} and {target}"
        with pytest.raises(ValueError, match=message):
            targeted_flip(labels, FLAGS, source, target)
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        targeted_flip(jnp.zeros((3, 2)), FLAGS, 0, 1)
    with pytest.raises(ValueError, match="byzantine must be given"):
        targeted_flip_cohort(make_cohort(None), 0, 1)
    with pytest.raises(
        ValueError, match=r"label_key must be a key of cohort.data.examples, got 'w' for \['x', 'y', 'z'\]"
    ):
        targeted_flip_cohort(make_cohort(), 0, 1, label_key="w")
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got"):
            backdoor_cohort(make_cohort(), lambda x: x, 1, fraction)
    with pytest.raises(ValueError, match="target must be at least 0, got -1"):
        backdoor_cohort(make_cohort(), lambda x: x, -1)
    with pytest.raises(ValueError, match="input_key must be a key"):
        backdoor_cohort(make_cohort(), lambda x: x, 1, input_key="w")
    with pytest.raises(
        ValueError, match=r"mask must have the shape of one input, got \(4, 4\) for inputs of shape \(2, 3\)"
    ):
        stamp(jnp.zeros((2, 3)), jnp.float32(1.0), MASK)
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        stamp(jnp.zeros((4, 4)), jnp.float32(1.0), jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"trigger must be a scalar or have the shape of mask, \(4, 4\), got \(3,\)"):
        stamp(jnp.zeros((4, 4)), jnp.ones(3), MASK)
