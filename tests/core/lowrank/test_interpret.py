import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax import lax

from cedarjax.core.lowrank import nonlinear_part, pays
from cedarjax.core.lowrank.interpret import Interpreter
from cedarjax.core.lowrank.matrix import Matrix
from cedarjax.core.lowrank.values import SPECIAL, dense

M, N, B = 4, 3, 5
RNG = np.random.default_rng(0)
W, X, D = (RNG.normal(size=shape) for shape in ((M, N), (B, M), (B, N)))


def single(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def interpreted(fun, *args, low=(0,)):
    """Results of the interpreter with some arguments as matrices known by their parts, before they are made dense."""
    closed = jax.make_jaxpr(fun)(*args)
    interpreter = Interpreter({args[i].shape for i in low})
    given = [Matrix.shared(x) if i in low else x for i, x in enumerate(args)]
    return interpreter.run(closed.jaxpr, closed.consts, given), interpreter


def check(fun, *args, low=(0,), rtol=1e-5, atol=1e-5):
    """The interpreter's results are the function's; returns them, and the primitives that wanted a dense matrix."""
    values, interpreter = interpreted(fun, *args, low=low)
    expected = jax.tree.leaves(fun(*args))
    for got, want in zip(values, expected, strict=True):
        got = jnp.asarray(dense(got), want.dtype)
        assert got.shape == want.shape
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=rtol, atol=atol)
    return values, interpreter.made_dense


# Random programs of what is linear: the oracle is numpy.

INDEX = st.integers(0, 3)
FACTOR = st.sampled_from([-2.0, 0.0, 0.5, 1.0])
STEP = st.one_of(
    *[st.tuples(st.just(name), INDEX, INDEX, FACTOR) for name in ("add", "sub", "where", "transposed", "product")],
    *[st.tuples(st.just(name), INDEX, INDEX, FACTOR) for name in ("scale", "traced", "divide", "negative")],
)


def run_program(steps, xp, w, x, d, s):
    """Matrices and products with vectors, in jax.numpy or numpy."""
    pool = [w, x.T @ d, w - 0.5 * (x.T @ d), xp.zeros_like(w)]
    for position, (name, i, j, factor) in enumerate(steps):
        a, b = pool[i], pool[j]
        if name == "add":
            new = a + b
        elif name == "sub":
            new = a - b
        elif name == "where":
            new = xp.where(s > factor, a, b)
        elif name == "transposed":
            new = (a.T - factor * b.T).T
        elif name == "product":  # the gradient of a layer at this matrix
            new = a - 0.01 * (x.T @ (x @ b))
        elif name == "scale":
            new = a * factor
        elif name == "traced":
            new = a * s
        elif name == "divide":
            new = a / 4.0
        else:
            new = -a
        pool[position % 4] = new
    a, b = new, pool[(len(steps) + 1) % 4]
    return a, b, x @ a, a @ d[0], d @ a.T, x[0] @ b, (a * b).sum(), (b**2).sum()


@given(st.lists(STEP, min_size=1, max_size=7), st.sampled_from([-1.0, 0.3]))
def test_random_programs(steps, s):
    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in (W, X, D, s)]
        values, interpreter = interpreted(lambda *args: run_program(steps, jnp, *args), *args)
        for got, want in zip(values, run_program(steps, np, W, X, D, np.float64(s)), strict=True):
            np.testing.assert_allclose(dense(got), want, rtol=1e-9, atol=1e-9)
        assert set(interpreter.made_dense) <= {"add", "sub", "select_n"}  # two matrices with different bases
        assert not any(isinstance(value, SPECIAL) for value in values[2:6])


# One program for each rule.

PROGRAMS = {
    "precision": lambda w, x, d: jnp.dot(x, w - x.T @ d, precision="highest"),
    "no_contracted_axis": lambda w, x, d: w - lax.dot_general(x[0], d[0], (((), ()), ((), ()))),
    "two_contracted_axes": lambda w, x, d: (
        w - jnp.einsum("abi,abj->ij", jnp.stack([x, x * 2.0]), jnp.stack([d, d * 3.0]))
    ),
    "contracted_axes_in_another_order": lambda w, x, d: (
        w - lax.dot_general(jnp.stack([x, x * 2.0]), jnp.stack([d.T, d.T * 3.0]), ((((1, 0)), ((2, 0))), ((), ())))
    ),
    "on_the_left_of_three_axes": lambda w, x, d: jnp.einsum("ij,abi->jab", w - x.T @ d, jnp.stack([x, x])),
    "vmapped_rows": lambda w, x, d: jax.vmap(lambda row: jnp.tanh(row @ (w - x.T @ d)))(x),
    "nested_jit": lambda w, x, d: jax.jit(lambda w: jax.jit(lambda w: w - x.T @ d)(w) * 2.0)(w),
    "checkpoint": lambda w, x, d: jax.checkpoint(lambda w: w - x.T @ d)(w) * 2.0,
    "literal_index": lambda w, x, d: lax.cond(True, lambda w: w - x.T @ d, lambda w: w * 2.0, w),
    "traced_index": lambda w, x, d: lax.cond(x[0, 0] > 0, lambda w: w - x.T @ d, lambda w: w * 2.0, w),
    "three_branches": lambda w, x, d: lax.switch(
        (x[0, 0] > -9).astype(jnp.int32) * 2,
        [lambda w: w - x.T @ d, lambda w: w * 2.0, lambda w: w * 3.0 - 2.0 * (x.T @ d)],
        w,
    ),
    "index_out_of_range": lambda w, x, d: lax.switch(jnp.int32(9), [lambda w: w - x.T @ d, lambda w: w * 2.0], w),
    "integer_select": lambda w, x, d: lax.select_n(jnp.int32(1), w, w - x.T @ d),
    "backwards": lambda w, x, d: lax.scan(
        lambda w, i: (w - i * (x.T @ d), x @ w), w, jnp.arange(3.0, dtype=jnp.float32), reverse=True
    ),
    "literal_per_step": lambda w, x, d: lax.scan(
        lambda w, i: (w - x.T @ d, (1.0, 2, True)), w, jnp.arange(3, dtype=jnp.int32)
    ),
    "squares": lambda w, x, d: (
        jnp.sum(jnp.square(w - x.T @ d)),
        jnp.sum((w - x.T @ d) ** 2),
        jnp.sum(w * (x.T @ d) * 3.0),
        jnp.sum(w * w),
    ),
    "zeros": lambda w, x, d: (jnp.zeros_like(w) + x.T @ d, x @ jnp.zeros_like(w), jnp.zeros_like(w) * 2.0),
    "same_shape": lambda w, x, d: (w - x.T @ d).reshape(w.shape),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_stays_low_rank(name):
    values, made_dense = check(PROGRAMS[name], *single(W, X, D))
    assert not made_dense
    assert all(isinstance(value, SPECIAL) for value in values if np.shape(dense(value)) == (M, N))


FALLBACKS = {
    "exp": lambda w: jnp.exp(w),
    "power": lambda w: w**3,
    "elementwise_product": lambda w: w * w,
    "sum": lambda w: (w.sum(), w.sum(axis=0), jnp.square(w).sum(axis=1)),
    "maximum": lambda w: jnp.maximum(w, 0.0),
    "gather": lambda w: w[jnp.array([2, 0, 2])],
    "slice": lambda w: w[1:, :2],
    "concatenate": lambda w: jnp.concatenate([w, w]),
    "with_itself": lambda w: w.T @ w,
    "mask": lambda w: jnp.where(jnp.arange(M * N).reshape(M, N) % 2 == 0, w, -w),
    "other_shape": lambda w: (w.reshape(-1), w.reshape(N, M), w[None]),
    "integers": lambda w: w.astype(jnp.int32),
    "two_bases": lambda w: (w + jnp.ones_like(w), jnp.ones_like(w) - w, w / jnp.full_like(w, 3.0)),
    "while": lambda w: lax.fori_loop(0, 3, lambda i, w: w * 0.5 + 1.0, w),
    "rows_of_a_scan": lambda w: lax.scan(lambda c, row: (c + row.sum(), row * 2.0), jnp.float32(0), w),
    "weights_of_a_scan": lambda w: lax.scan(
        lambda h, _: (jnp.tanh(h @ w @ w.T), h), jnp.ones((2, M)), jnp.arange(3, dtype=jnp.int32)
    ),
    "empty_scan": lambda w: lax.scan(lambda w, i: (w * 2.0, i), w, jnp.zeros(0)),
    "sort": lambda w: jnp.sort(w, axis=0),
    "two_axes_at_once": lambda w: jnp.vdot(w, w * 2.0),
    "svd": lambda w: jnp.linalg.svd(w, compute_uv=False),
    "batched_product": lambda w: jax.vmap(lambda row, x: row @ x)(w, jnp.ones((M, N, 2))),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_anything_else_is_made_dense(name):
    w, x, d = single(W, X, D)
    _, made_dense = check(lambda w, x, d: FALLBACKS[name](w - x.T @ d), w, x, d)
    assert made_dense or name in ("elementwise_product", "sum", "while")


def test_a_square_matrix_is_not_its_transposed():
    s, x = single(RNG.normal(size=(M, M)), X)
    _, made_dense = check(
        lambda s, x: ((s - x.T @ x).T @ x[0], (s + s.T) @ x[0], jnp.where(x[0, 0] > 0, s.T, s), s.T - s), s, x
    )
    assert not made_dense  # without terms, nothing was low-rank


def test_low_rank_values_of_a_scan_are_read_by_the_next_and_by_others():
    def fun(w, x, d):
        w, steps = lax.scan(lambda w, i: (w - i * (x.T @ d), w), w, jnp.arange(3.0, dtype=jnp.float32))
        _, images = lax.scan(lambda c, w: (c + 1.0, x @ w), jnp.float32(0), steps, reverse=True)
        return w, images, steps, steps.sum(axis=0), jnp.stack([steps[0], w])

    values, _ = check(fun, *single(W, X, D))
    assert isinstance(values[0], Matrix)


@pytest.mark.parametrize("name", ["constant", "rows", "flags"])
def test_an_operand_that_is_no_array(name):
    """A matrix of one number, the gradient of a mean; and the stacked results of an unrolled scan."""

    def constant(w, x, d):
        return w - jnp.full((M, N), d[0, 0]) @ jnp.ones((N, N)), x

    def rows(w, x, d):
        w, rows = lax.scan(lambda w, i: (w - x.T @ d, (x @ w)[:, 0]), w, jnp.arange(M, dtype=jnp.int32))
        return w, rows @ d

    def flags(w, x, d):
        w, flags = lax.scan(lambda w, i: (w - x.T @ d, (x @ w).sum() > 0), w, jnp.arange(3, dtype=jnp.int32))
        return w, jnp.where(flags, jnp.ones(3), jnp.zeros(3))

    check({"constant": constant, "rows": rows, "flags": flags}[name], *single(W, X, D))


def test_reduced_precision_of_the_same_width_changes_nothing():
    _, made_dense = check(lambda w, x, d: lax.reduce_precision(w - x.T @ d, 8, 23), *single(W, X, D))
    assert not made_dense


def test_reduced_precision_rounds():
    check(lambda w, x, d: lax.reduce_precision(w - x.T @ d, 8, 3), *single(W, X, D))


def test_division_by_zero_is_left_to_the_function():
    values, _ = interpreted(lambda w: w / 0.0, *single(W))
    np.testing.assert_array_equal(dense(values[0]), np.sign(W) * np.inf)


@pytest.mark.parametrize("x64", [False, True])
def test_literals_keep_their_dtype(x64):
    def fun(w, x, d):
        w, told = lax.scan(lambda w, i: (w - x.T @ d, (1.0, 3)), w, jnp.arange(2, dtype=jnp.int32))
        flag = lax.cond(x[0, 0] > 0, lambda w: (w, jnp.float32(1)), lambda w: (w * 2.0, jnp.float32(0)), w)
        return w, told, flag

    with jax.enable_x64(x64):
        args = single(W, X, D)
        types = [x.dtype for x in jax.tree.leaves(jax.eval_shape(fun, *args))]
        values, _ = interpreted(fun, *args)
        assert [jnp.result_type(dense(value)) for value in values] == types
        check(fun, *args)


def test_products_with_wider_accumulation():
    """Operands in bfloat16, the result in float32."""
    w, x, d = (a.astype(jnp.bfloat16) for a in single(W, X, D))
    contract = (((1,), (0,)), ((), ()))
    values, made_dense = check(
        lambda w, x, d: lax.dot_general(x, w - 0.5 * (x.T @ d), contract, preferred_element_type=jnp.float32),
        *(w, x, d),
        rtol=0.05,
        atol=0.1,
    )
    assert values[0].dtype == jnp.float32 and not made_dense


def test_effects_are_kept():
    seen = []

    def fun(w, x, d):
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), w - x.T @ d)
        return x @ w

    args = single(W, X, D)
    check(fun, *args)
    jax.effects_barrier()
    assert len(seen) == 2
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-5, atol=1e-5)


def test_derivatives_and_vmap_of_the_interpreted_function():
    """A learning rate is swept and differentiated through the factors."""
    w, x, d = single(W, X, D)

    def loss(rate):
        return jnp.sum(jnp.square(jnp.tanh(x @ (w - rate * (x.T @ d)))))

    def low_rank(rate):
        def fun(w, rate):
            return jnp.sum(jnp.square(jnp.tanh(x @ (w - rate * (x.T @ d)))))

        (value,), _ = interpreted(fun, w, rate)
        return value

    rates = jnp.array([0.1, 0.3], jnp.float32)
    got, want = (jax.jit(jax.vmap(jax.value_and_grad(fun)))(rates) for fun in (low_rank, loss))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4), got, want)


# Optimisers.

MATRIX = {"kernel": jnp.zeros((3, 2))}
NAMED = {"one": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
LINEAR = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "weight_decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "unit_norm": lambda: optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "schedule": lambda: optax.sgd(optax.linear_schedule(0.1, 0.01, 5)),
    "inject": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "nothing": optax.set_to_zero,
    "matrices_only": lambda: optax.masked(optax.sgd(0.1), lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_optimisers(name):
    assert nonlinear_part(LINEAR[name](), MATRIX) is None


NONLINEAR = {
    "adam": (lambda: optax.adam(0.1), ("mul", "integer_pow", "square")),
    "rmsprop": (lambda: optax.rmsprop(0.1), ("mul", "integer_pow", "square")),
    "sign": (lambda: optax.sign_sgd(0.1), ("sign",)),
    "clip": (lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1)), ("clamp", "max", "min", "jit")),
    "centralize": (lambda: optax.chain(optax.centralize(), optax.sgd(0.1)), ("reduce_sum",)),
    "zero_nans": (lambda: optax.chain(optax.zero_nans(), optax.sgd(0.1)), ("is_finite", "ne")),
    "noise": (lambda: optax.noisy_sgd(0.1, key=0), ("add",)),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", NONLINEAR)
def test_optimisers_that_are_not(name):
    make, names = NONLINEAR[name]
    assert nonlinear_part(make(), MATRIX) in names


def test_an_optimiser_that_names_its_parameters():
    tx = optax.masked(optax.add_decayed_weights(0.1), {"one": {"kernel": True, "bias": False}})
    assert nonlinear_part(optax.chain(tx, optax.sgd(0.1)), NAMED) is None


@pytest.mark.parametrize(
    ("shape", "num_rows", "expected"),
    [((784, 128), 110, True), ((784, 128), 111, False), ((1, 1), 1, False), ((2, 2), 1, True), ((10**6, 1), 1, False)],
)
def test_pays_while_the_factors_have_fewer_numbers(shape, num_rows, expected):
    assert pays(shape, num_rows) is expected
    assert expected == (num_rows * sum(shape) <= shape[0] * shape[1])
