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

from cedarjax.core.lowrank.interpret import SPECIAL, Interpreter, dense
from cedarjax.core.lowrank.matrix import Matrix, is_zero
from cedarjax.core.lowrank.node import LowRank
from cedarjax.core.types import Params, PyTree, Upload

Representation: TypeAlias = Literal["dense", "lowrank", "auto"]
"""How a client's update is held: dense; by its factors wherever a matrix enters through products; or by them where that
is the cheaper."""

UpdateFn: TypeAlias = Callable[[Params, PyTree, PyTree, jax.Array], tuple[Upload, PyTree, Any]]


def _is_special(x: object) -> bool:
    return isinstance(x, SPECIAL)


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
      `info.rank` says which: the rank of each leaf, 0 where it is dense. `"auto"` with an optimiser that is not linear
      is dense.

    Raises:
      ValueError: if the representation is unknown, or `"lowrank"` and an optimiser not linear in the gradients.
    """
    if representation not in ("dense", "lowrank", "auto"):
        raise ValueError(f'representation must be "dense", "lowrank" or "auto", got {representation!r}.')
    if representation == "dense":
        return update
    for tx in optimisers:
        culprit = nonlinear_part(tx)
        if culprit is not None and representation == "auto":
            return update
        if culprit is not None:
            raise ValueError(
                'the optimiser must be linear in the gradients for representation="lowrank", as SGD, momentum, weight '
                f"decay and clipping by the global norm are, got one that takes {culprit!r} of each number."
            )

    def run(shared: Params, client_state: PyTree, data: PyTree, key: jax.Array) -> tuple[Upload, PyTree, Any]:
        rows = num_rows(data)

        def wanted(leaf: jax.Array) -> bool:
            if jnp.ndim(leaf) != 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
                return False
            return representation == "lowrank" or pays(leaf.shape, rows)

        shapes = {leaf.shape for leaf in jax.tree.leaves(shared) if wanted(leaf)}
        if not shapes:
            return update(shared, client_state, data, key)
        closed, out = jax.make_jaxpr(update, return_shape=True)(shared, client_state, data, key)
        leaves = [Matrix.shared(leaf) if wanted(leaf) else leaf for leaf in jax.tree.leaves(shared)]
        values = Interpreter(shapes).run(
            closed.jaxpr, closed.consts, leaves + jax.tree.leaves((client_state, data, key))
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


def nonlinear_part(tx: optax.GradientTransformation) -> str | None:
    """The first thing that an optimiser does to a gradient and that is not linear in it.

    Args:
      tx: an optax optimiser.

    Returns:
      Name of a JAX primitive, or None for an optimiser whose steps keep low-rank gradients low-rank.

    Example:
      >>> nonlinear_part(optax.sgd(0.1, momentum=0.9)), nonlinear_part(optax.sign_sgd(0.1))
      (None, 'sign')
    """
    row = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    params = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    interpreter = Interpreter({params.shape})

    def two_steps(params: jax.Array, rows: jax.Array) -> jax.Array:
        state = tx.init({"kernel": params})
        for row in rows:
            updates, state = tx.update({"kernel": row.T @ row}, state, {"kernel": params})
            params = params + updates["kernel"]
        return params

    def probe(params: jax.Array, rows: list[jax.Array]) -> None:
        closed = jax.make_jaxpr(two_steps)(params, rows)
        (after,) = interpreter.run(closed.jaxpr, closed.consts, [Matrix.shared(params), *rows])
        if not isinstance(after, Matrix):
            interpreter.made_dense.append("add")

    jax.eval_shape(probe, params, [row, row])
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
    return jnp.asarray(value.left.shape[0] if isinstance(value, LowRank) else 0, jnp.int32)
