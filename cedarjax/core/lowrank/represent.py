"""Exact low-rank client weights: a local update that never forms a client's own copy of a matrix.

After `T` steps on batches of `B` rows a client's kernel is `W_0 + U V` with a rank of at most `T B`, because each
gradient is a sum over rows, `x^T d`. So all clients share one large product `X W_0`, a client's own part of the next
step is `-lr (x_t x_s^T) d_s`, the mean over clients is one large product `X^T d`, and inner products between clients
come from the factors. No numbers are given up: the factors are exact.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.lowrank.interpret import Interpreter
from cedarjax.core.lowrank.matrix import Matrix, is_zero
from cedarjax.core.lowrank.node import LowRank
from cedarjax.core.lowrank.values import SPECIAL, dense
from cedarjax.core.types import Params, PyTree, Upload

Representation: TypeAlias = Literal["dense", "lowrank", "auto"]
"""How a client's update is held: dense; by its factors wherever a matrix enters through products; or by them where that
is the cheaper."""

_EXAMPLE = {"kernel": jax.ShapeDtypeStruct((3, 2), "float32"), "bias": jax.ShapeDtypeStruct((2,), "float32")}

UpdateFn: TypeAlias = Callable[[Params, PyTree, PyTree, jax.Array], tuple[Upload, PyTree, Any]]


def _is_special(x: object) -> bool:
    return isinstance(x, SPECIAL)


class NonlinearError(ValueError):
    """An optimiser that is not linear in the gradients cannot keep them low-rank."""


def represented(
    update: UpdateFn,
    representation: Representation,
    *optimisers: optax.GradientTransformation,
    num_rows: Callable[[PyTree], int],
) -> UpdateFn:
    """The same local update with its matrices held in a representation.

    Args:
      update: `LocalUpdate.update` of one client; its info has a field `rank`.
      representation: `"dense"`, `"lowrank"` or `"auto"`.
      *optimisers: all that step the parameters inside.
      num_rows: of a client's data, the rows of all batches together: what the rank can be at most.

    Returns:
      An update with the same results to rounding. A matrix held by factors has a `LowRank` in `Upload.delta`, and
      `info.rank` says which: the number of rows of its factors, 0 where it is dense. `"auto"` with an optimiser that
      is not linear is dense.

    Raises:
      ValueError: if the representation is unknown, or `"lowrank"` and an optimiser not linear in the gradients.
    """
    if representation not in ("dense", "lowrank", "auto"):
        raise ValueError(f'representation must be "dense", "lowrank" or "auto", got {representation!r}.')
    if representation == "dense":
        return update

    def is_linear(params: Params) -> bool:
        culprit = next(filter(None, (nonlinear_part(tx, params) for tx in optimisers)), None)
        if culprit is not None and representation == "lowrank":
            raise NonlinearError(
                'the optimiser must be linear in the gradients for representation="lowrank", as SGD, momentum, weight '
                f"decay and clipping by the global norm are, got one that takes {culprit!r} of each number."
            )
        return culprit is None

    try:
        is_linear(_EXAMPLE)
    except NonlinearError:
        raise
    except Exception:  # an optimiser for one tree of parameters; it is judged when that is known
        pass

    def run(shared: Params, client_state: PyTree, data: PyTree, key: jax.Array) -> tuple[Upload, PyTree, Any]:
        rows = num_rows(data)

        def wanted(leaf: jax.Array) -> bool:
            if jnp.ndim(leaf) != 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
                return False
            return representation == "lowrank" or pays(leaf.shape, rows)

        shapes = {leaf.shape for leaf in jax.tree.leaves(shared) if wanted(leaf)}
        if not shapes or not is_linear(shared):
            upload, client_state, info = update(shared, client_state, data, key)
            return upload, client_state, info._replace(rank=jax.tree.map(_rank, upload.delta, upload.delta))
        closed, out = jax.make_jaxpr(update, return_shape=True)(shared, client_state, data, key)
        leaves = [Matrix.shared(leaf) if wanted(leaf) else leaf for leaf in jax.tree.leaves(shared)]
        given = jax.tree.leaves((data, key))
        values = Interpreter(shapes, given).run(
            closed.jaxpr, closed.consts, [*leaves, *jax.tree.leaves(client_state), *given]
        )
        upload, client_state, info = jax.tree.unflatten(jax.tree.structure(out), values)
        delta = jax.tree.map(_uploaded, upload.delta, out[0].delta, is_leaf=_is_special)
        mask, client_state, info = jax.tree.map(
            _array, (upload.mask, client_state, info), (out[0].mask, *out[1:]), is_leaf=_is_special
        )
        return Upload(delta, mask), client_state, info._replace(rank=jax.tree.map(_rank, out[0].delta, delta))

    return run


def pays(shape: tuple[int, ...], num_rows: int) -> bool:
    """Whether the factors of a matrix are cheaper than a copy of it a client.

    Args:
      shape: `(m, n)`.
      num_rows: rank of its update.

    Returns:
      `num_rows * (m + n) <= m * n`: the factors then have fewer numbers than the matrix.

    Example:
      >>> pays((784, 128), 20), pays((128, 10), 20)
      (True, False)
    """
    rows, columns = shape
    return num_rows * (rows + columns) <= rows * columns


def nonlinear_part(tx: optax.GradientTransformation, params: Params) -> str | None:
    """The first thing that an optimiser does to the gradient of a matrix and that is not linear in it.

    Args:
      tx: an optax optimiser.
      params: what it steps, arrays or their shapes.

    Returns:
      Name of a JAX primitive, or None for an optimiser whose steps keep low-rank gradients low-rank.

    Example:
      >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
      >>> nonlinear_part(optax.sgd(0.1, momentum=0.9), params), nonlinear_part(optax.sign_sgd(0.1), params)
      (None, 'sign')
    """
    leaves, structure = jax.tree.flatten(params)
    is_matrix = [jnp.ndim(leaf) == 2 for leaf in leaves]
    interpreter = Interpreter({leaf.shape for leaf, matrix in zip(leaves, is_matrix, strict=True) if matrix})

    def factors(leaf: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct((1, size), leaf.dtype) for size in leaf.shape)

    def two_steps(leaves: list[jax.Array], gradients: list[list[Any]]) -> list[jax.Array]:
        params = jax.tree.unflatten(structure, leaves)
        state = tx.init(params)
        for gradient in gradients:
            formed = [g[0].T @ g[1] if isinstance(g, tuple) else g for g in gradient]
            updates, state = tx.update(jax.tree.unflatten(structure, formed), state, params)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        return jax.tree.leaves(params)

    def probe(leaves: list[jax.Array], gradients: list[list[Any]]) -> None:
        closed = jax.make_jaxpr(two_steps)(leaves, gradients)
        values = [Matrix.shared(leaf) if matrix else leaf for leaf, matrix in zip(leaves, is_matrix, strict=True)]
        after = interpreter.run(closed.jaxpr, closed.consts, [*values, *jax.tree.leaves(gradients)])
        if not all(isinstance(x, Matrix) for x, matrix in zip(after, is_matrix, strict=True) if matrix):
            interpreter.made_dense.append("add")

    gradient = [factors(leaf) if matrix else leaf for leaf, matrix in zip(leaves, is_matrix, strict=True)]
    jax.eval_shape(probe, leaves, [gradient, gradient])
    return interpreter.made_dense[0] if interpreter.made_dense else None


def _uploaded(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array | LowRank:
    """What is sent of one leaf: factors where nothing but factors is left."""
    if isinstance(value, Matrix) and value.terms and is_zero(value.scale):
        return LowRank.of(*value.factors())
    return _array(value, like)


def _array(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    value = dense(value)
    return value if isinstance(value, jax.Array) else jnp.asarray(value, like.dtype)


def _rank(like: jax.ShapeDtypeStruct, value: jax.Array | LowRank) -> jax.Array:
    return jnp.asarray(value.rank if isinstance(value, LowRank) else 0, jnp.int32)
