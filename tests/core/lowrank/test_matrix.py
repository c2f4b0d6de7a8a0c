import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from cedarjax.core.lowrank.matrix import Choice, Matrix, is_zero

M, N = 4, 3
RNG = np.random.default_rng(0)
BASE, LEFT, RIGHT = RNG.normal(size=(M, N)), RNG.normal(size=(3, 2, M)), RNG.normal(size=(3, 2, N))
X, Y = RNG.normal(size=(2, 5, M)), RNG.normal(size=(2, 5, N))

FACTORS = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0])
INDEX = st.integers(0, 4)
STEP = st.one_of(
    st.tuples(st.just("plus"), INDEX, INDEX),
    st.tuples(st.just("times"), INDEX, FACTORS),
    st.tuples(st.just("times_traced"), INDEX, FACTORS),
    st.tuples(st.just("transposed_plus"), INDEX, INDEX),
    st.tuples(st.just("where"), INDEX, INDEX, st.booleans()),
)


def starts():
    """The same matrices by their parts, and in numpy."""
    base = jnp.asarray(BASE)
    outers = [Matrix.outer(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(LEFT, RIGHT, strict=True)]
    matrices = [Matrix.shared(base), *outers, Matrix.zeros((M, N), base.dtype)]
    arrays = [BASE, *(a.T @ b for a, b in zip(LEFT, RIGHT, strict=True)), np.zeros((M, N))]
    return matrices, arrays


def apply_step(step, matrices, arrays):
    name, i, *rest = step
    a, x = matrices[i], arrays[i]
    if name == "times":
        return a.times(rest[0]), x * rest[0]
    if name == "times_traced":
        return a.times(jnp.asarray(rest[0])), x * rest[0]
    b, y = matrices[rest[0]], arrays[rest[0]]
    if name == "plus":
        return a.plus(b), x + y
    if name == "transposed_plus":
        return a.transpose().plus(b.transpose()).transpose(), x + y
    return a.where(Choice(jnp.asarray(rest[1])), b), x if rest[1] else y


@given(st.lists(STEP, min_size=1, max_size=8))
def test_the_algebra_is_that_of_arrays(steps):
    with jax.enable_x64(True):
        matrices, arrays = starts()
        for position, step in enumerate(steps):
            matrix, array = apply_step(step, matrices, arrays)
            matrices[position % 5], arrays[position % 5] = matrix, array
        other, other_array = matrices[(position + 1) % 5], arrays[(position + 1) % 5]
        close = {"rtol": 1e-10, "atol": 1e-10}
        np.testing.assert_allclose(matrix.dense(), array, **close)
        np.testing.assert_allclose(matrix.transpose().dense(), array.T, **close)
        np.testing.assert_allclose(matrix.apply(jnp.asarray(X), 0, None), X @ array, **close)
        np.testing.assert_allclose(matrix.apply(jnp.asarray(Y), 1, None), Y @ array.T, **close)
        np.testing.assert_allclose(matrix.inner(other), np.sum(array * other_array), **close)
        if is_zero(matrix.scale):
            parts = [np.asarray(left).T @ np.asarray(right) for left, right in matrix.factors()]
            np.testing.assert_allclose(sum(parts, np.zeros((M, N))), array, **close)


def test_two_bases_have_no_sum_and_no_choice():
    one, other = Matrix.shared(jnp.ones((M, M))), Matrix.shared(jnp.zeros((M, M)))
    choice = Choice(jnp.array(True))
    assert one.plus(other) is None and one.where(choice, other) is None
    assert one.plus(one.transpose()) is None and one.where(choice, one.transpose()) is None
    assert one.plus(one).scale == 2 and one.plus(other.times(0.0)).scale == 1


def test_equal_terms_are_one_term():
    (_, a, b, *_), _ = starts()
    total = a.plus(b.times(2.0)).plus(a.times(0.5)).plus(b)
    assert [term.coefficient for term in total.terms] == [1.5, 3.0]
    assert a.plus(a.times(-1.0)).is_zero
    assert len(total.where(Choice(jnp.array(False)), a).factors()) == 2


def test_rows_of_data_that_two_terms_share_are_sent_once():
    """Momentum: the same inputs, another gradient at the layer's output."""
    x, d, e = (jnp.asarray(a[0], jnp.float32) for a in (LEFT, RIGHT, RIGHT[1:]))
    total = Matrix.outer(x, d).plus(Matrix.outer(x, e).times(2.0))
    ((left, right),) = total.factors()
    assert left.shape == (2, M) and right.shape == (2, N)
    np.testing.assert_allclose(left.T @ right, x.T @ (d + 2 * e), rtol=1e-5, atol=1e-6)


def test_no_terms_have_no_factors():
    assert not Matrix.zeros((M, N), jnp.float32).factors()
    assert not Matrix.zeros((M, N), jnp.float32).apply(jnp.ones((2, M)), 0, None).any()


@pytest.mark.parametrize("taken", [False, True])
def test_what_is_not_taken_may_hold_anything(taken):
    base = jnp.asarray(BASE, jnp.float32)
    bad = Matrix.shared(base).plus(Matrix.outer(jnp.full((2, M), jnp.nan), jnp.full((2, N), jnp.inf)))
    good = Matrix.shared(base).plus(Matrix.outer(jnp.ones((1, M)), jnp.ones((1, N))))
    picked = good.where(Choice(jnp.array(True)), bad) if taken else bad.where(Choice(jnp.array(False)), good)
    np.testing.assert_allclose(picked.dense(), base + 1, rtol=1e-6)


def test_a_coefficient_that_is_not_taken_may_be_anything():
    good = Matrix.shared(jnp.asarray(BASE, jnp.float32))
    bad = good.plus(Matrix.outer(jnp.zeros((1, M)), jnp.zeros((1, N))).times(jnp.float32(jnp.inf)))
    picked = jax.jit(lambda flag: bad.where(Choice(flag), good).dense())(jnp.array(False))
    np.testing.assert_allclose(picked, BASE, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_casts(dtype):
    with jax.enable_x64(True):
        matrix = Matrix.shared(jnp.asarray(BASE, jnp.float32))
        matrix = matrix.plus(Matrix.outer(*(jnp.asarray(a[0], jnp.float32) for a in (LEFT, RIGHT))).times(0.5))
        cast = matrix.astype(dtype)
        assert cast.dense().dtype == cast.apply(jnp.asarray(X, dtype), 0, None).dtype == cast.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(cast.dense(), np.float64), BASE + 0.5 * LEFT[0].T @ RIGHT[0], rtol=0.03, atol=0.03
        )


def test_a_traced_factor_survives_a_cast():
    """A learning rate in float32, a cast of the update to the parameters' dtype, and another multiple."""
    rate = jnp.float32(0.5)
    step = Matrix.outer(*(jnp.asarray(a[0], jnp.float32) for a in (LEFT, RIGHT))).times(rate).astype(jnp.bfloat16)
    twice = step.times(jnp.bfloat16(0.5)).plus(step)
    np.testing.assert_allclose(np.asarray(twice.dense(), np.float64), 0.75 * LEFT[0].T @ RIGHT[0], rtol=0.05, atol=0.05)
