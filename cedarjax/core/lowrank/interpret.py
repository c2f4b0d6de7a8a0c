"""Runs a traced function with low-rank matrices in the places of dense ones.

The function is traced as it is, gradients, optimiser and all, and its primitives are run one by one. A product that
sums over the rows of a batch, such as the gradient `x^T d` of a dense layer, is not formed: it becomes a `Matrix` that
knows its factors. What is linear (a step of SGD, momentum, weight decay, a proximal term) keeps it one, and a product
with activations, the next step's forward and backward pass, is taken through the factors. Any other primitive makes the
matrix dense and goes on, so that the numbers are always those of the function, to rounding.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from cedarjax.core.jaxprs import scan_counts
from cedarjax.core.lowrank.matrix import Choice, Matrix, is_zero
from cedarjax.core.lowrank.values import SPECIAL, Product, Splat, Stack, Value, dense, scalar

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_IDENTITIES = ("copy", "stop_gradient", "name", "optimization_barrier", "pvary", "sharding_constraint")
_MOVES = (
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "dynamic_slice",
    "gather",
    "reshape",
    "rev",
    "select_n",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
)
"""Primitives whose results hold nothing but numbers of their operands."""


class Interpreter:
    """Runs jaxprs on values of which some are matrices known by their parts.

    Args:
      shapes: shapes of the matrices that are wanted by their factors.
      given: arrays that hold the client's data. What is only moved about of them, a batch that a step is skipped on for
        instance, is as finite as they are and needs no mask.
    """

    def __init__(self, shapes: Collection[tuple[int, ...]], given: Sequence[jax.Array] = ()):
        self.shapes = {*shapes, *(shape[::-1] for shape in shapes)}
        self._given = {id(x): x for x in given}
        self.made_dense: list[str] = []
        """Primitives that asked for a low-rank matrix itself, in order."""

    def run(self, jaxpr: jex.Jaxpr, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        """Results of the jaxpr."""
        values: dict[jex.Var, Value] = {}
        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return atom.val if isinstance(atom, jex.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            results = self._apply(eqn, [read(atom) for atom in eqn.invars], jaxpr.debug_info)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: jex.JaxprEqn, operands: list[Value], debug_info: Any) -> list[Value]:
        name = eqn.primitive.name
        special = any(isinstance(operand, SPECIAL) for operand in operands)
        # A call of the client's data alone is looked into, to see whether it only moves them about.
        if special or name in ("dot_general", "broadcast_in_dim") or (name in _CALLS and self._all_given(operands)):
            results = self._rule(name)(eqn, operands)
            if results is not None:
                return results
        self.made_dense += [name for x in operands if isinstance(x, Matrix) and x.terms]
        results = _bind(eqn, [dense(operand) for operand in operands], debug_info)
        return self._noted(results, name in _MOVES or _stays_finite(eqn, operands), operands)

    def _noted(self, results: list[Any], moved: bool, operands: Sequence[Value]) -> list[Any]:
        """The results, noted as given if they are moved from what is; integers always are finite."""
        moved = moved and self._all_given(operands)
        for x in results:
            if moved or not jnp.issubdtype(x.dtype, jnp.inexact):
                self._given[id(x)] = x
        return results

    def _all_given(self, operands: Sequence[Value]) -> bool:
        """Whether all operands are the client's data or literals."""
        return all(self._is_given(x) or not isinstance(x, (jax.Array, *SPECIAL)) for x in operands)

    def _is_given(self, x: Value) -> bool:
        return id(x) in self._given

    def _rule(self, name: str) -> Callable[[jex.JaxprEqn, list[Value]], list[Value] | None]:
        if name in _CALLS:
            return self._call
        if name in _IDENTITIES:
            return lambda eqn, operands: operands
        return getattr(self, f"_{name}", lambda eqn, operands: None)

    # Calls and control flow: run the body.

    def _call(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value]:
        jaxpr = eqn.params[_CALLS[eqn.primitive.name]]
        consts = getattr(jaxpr, "consts", ())
        return self.run(getattr(jaxpr, "jaxpr", jaxpr), consts, operands)

    def _cond(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value]:
        index, *operands = operands
        results, *others = (self.run(branch.jaxpr, branch.consts, operands) for branch in eqn.params["branches"])
        for number, other in enumerate(others, start=1):
            choice = Choice(index == number, self._is_given)
            results = [_choose(choice, a, b) for a, b in zip(other, results, strict=True)]
        return results

    def _scan(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        num_consts, num_carry = scan_counts(eqn)
        consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
        stacked = operands[num_consts + num_carry :]
        if not any(isinstance(value, Matrix) and not value.is_zero for value in carry):
            if not any(isinstance(value, Stack) for value in stacked):
                return None  # a loop over time that reads the weights: its products sum over all of it
        length, closed = eqn.params["length"], eqn.params["jaxpr"]
        columns: list[list[Value]] = [[None] * length for _ in eqn.outvars[num_carry:]]
        for step in reversed(range(length)) if eqn.params["reverse"] else range(length):
            slices = [
                x.values[step]
                if isinstance(x, Stack)
                else self._noted([lax.index_in_dim(dense(x), step, keepdims=False)], True, [x])[0]
                for x in stacked
            ]
            results = self.run(closed.jaxpr, closed.consts, [*consts, *carry, *slices])
            carry = results[:num_carry]
            for column, value in zip(columns, results[num_carry:], strict=True):
                column[step] = value
        return [*carry, *map(Stack, columns)] if length else None

    # Products.

    def _dot_general(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        lhs, rhs = operands
        (lhs_axes, rhs_axes), batch_axes = eqn.params["dimension_numbers"]
        precision, out = eqn.params["precision"], _result(eqn)
        if any(batch_axes):
            return None
        if isinstance(lhs, Matrix) and isinstance(rhs, Matrix):
            # One of them stands for activations that have the shape of a matrix by chance.
            self.made_dense.append("dot_general")
            lhs, rhs = (dense(lhs), rhs) if rhs.own_base is not None else (lhs, dense(rhs))
        if isinstance(lhs, Matrix) or isinstance(rhs, Matrix):
            if len(lhs_axes) != 1:
                return None
            first = isinstance(lhs, Matrix)
            matrix, axis = (lhs, lhs_axes[0]) if first else (rhs, rhs_axes[0])
            x = jnp.moveaxis(dense(rhs), rhs_axes[0], -1) if first else jnp.moveaxis(dense(lhs), lhs_axes[0], -1)
            product = matrix.apply(x, axis, precision, out.dtype)
            return [jnp.moveaxis(product, -1, 0) if first else product]
        lhs, rhs = dense(lhs), dense(rhs)
        if out.shape not in self.shapes or lhs.ndim - len(lhs_axes) != 1:
            return None
        left, right = (self._noted([_rows(x, axes)], True, [x])[0] for x, axes in ((lhs, lhs_axes), (rhs, rhs_axes)))
        return [Matrix.outer(left.astype(out.dtype), right.astype(out.dtype), precision)]

    def _mul(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        a, b = operands
        if isinstance(a, Matrix) and isinstance(b, Matrix):
            return [Product(a, b)]
        if not isinstance(a, Matrix | Product):
            a, b = b, a
        factor = scalar(b)
        if factor is None:
            return None
        if isinstance(a, Product):
            return [a._replace(first=a.first.times(factor))]
        return [a.times(factor)] if isinstance(a, Matrix) else None

    def _div(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        a, divisor = operands[0], scalar(operands[1])
        return None if divisor is None or is_zero(divisor) or not isinstance(a, Matrix) else [a.times(1.0 / divisor)]

    def _square(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        (a,) = operands
        return [Product(a, a)] if isinstance(a, Matrix) else None

    def _integer_pow(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        return self._square(eqn, operands) if eqn.params["y"] == 2 else None

    def _reduce_sum(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        (a,) = operands
        if not isinstance(a, Product) or sorted(eqn.params["axes"]) != [0, 1]:
            return None
        return [a.first.inner(a.second)]

    # What is linear.

    def _add(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        a, b = operands
        total = a.plus(b) if isinstance(a, Matrix) and isinstance(b, Matrix) else None
        return None if total is None else [total]

    _add_any = _add

    def _sub(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        a, b = operands
        return self._add(eqn, [a, b.times(-1.0)]) if isinstance(b, Matrix) else None

    def _neg(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        (a,) = operands
        return [a.times(-1.0)] if isinstance(a, Matrix) else None

    def _transpose(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        (a,) = operands
        return [a.transpose()] if isinstance(a, Matrix) and tuple(eqn.params["permutation"]) == (1, 0) else None

    def _convert_element_type(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        (a,), dtype = operands, eqn.params["new_dtype"]
        return [a.astype(dtype)] if isinstance(a, Matrix) and jnp.issubdtype(dtype, jnp.inexact) else None

    def _reduce_precision(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        kept, info = eqn.params, jnp.finfo(_result(eqn).dtype)
        return operands if kept["exponent_bits"] >= info.nexp and kept["mantissa_bits"] >= info.nmant else None

    def _reshape(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        return operands if isinstance(operands[0], Matrix) and _result(eqn).shape == operands[0].shape else None

    def _broadcast_in_dim(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        x, *sizes = operands
        out = _result(eqn)
        if out.shape not in self.shapes or sizes or isinstance(x, SPECIAL) or jnp.ndim(x) != 0:
            return None
        if not isinstance(x, jax.Array) and x == 0 and jnp.issubdtype(out.dtype, jnp.inexact):
            return [Matrix.zeros(out.shape, out.dtype)]
        return [Splat(x, out.shape, out.dtype)]

    def _select_n(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value] | None:
        which, *cases = operands
        which = which.value if isinstance(which, Splat) else dense(which)
        if len(cases) != 2 or jnp.ndim(which) != 0 or not all(isinstance(case, Matrix) for case in cases):
            return None
        chosen = cases[1].where(Choice(jnp.asarray(which, bool), self._is_given), cases[0])
        return None if chosen is None else [chosen]


def _choose(choice: Choice, a: Value, b: Value) -> Value:
    """`a` if the condition holds, else `b`."""
    if a is b:
        return a
    chosen = a.where(choice, b) if isinstance(a, Matrix) and isinstance(b, Matrix) else None
    return lax.select(choice.condition, *(jnp.asarray(dense(x)) for x in (a, b))) if chosen is None else chosen


def _stays_finite(eqn: jex.JaxprEqn, operands: Sequence[Value]) -> bool:
    """Whether finite operands give finite results: sums, products and quotients with a known number that is mild."""
    numbers = [abs(float(x)) for x in operands if not isinstance(x, (jax.Array, *SPECIAL)) and jnp.ndim(x) == 0]
    match eqn.primitive.name:
        case "add" | "sub" | "mul":
            return len(numbers) == 1 and numbers[0] <= 1
        case "div":
            return len(numbers) == 1 and not isinstance(operands[1], jax.Array) and 1 <= numbers[0] < float("inf")
        case "convert_element_type":
            aval: Any = eqn.invars[0].aval
            to, given = eqn.params["new_dtype"], aval.dtype
            if not jnp.issubdtype(to, jnp.floating) or not jnp.issubdtype(given, jnp.floating):
                return jnp.finfo(to).bits >= 32 if jnp.issubdtype(to, jnp.floating) else True
            return bool(jnp.finfo(to).max >= jnp.finfo(given).max)
    return False


def _bind(eqn: jex.JaxprEqn, operands: list[Any], debug_info: Any) -> list[Any]:
    """Results of the primitive as it is: the evaluation of a jaxpr of one line, the public way to bind."""
    given = {atom: x for atom, x in zip(eqn.invars, operands, strict=True) if not isinstance(atom, jex.Literal)}
    line = jex.Jaxpr((), list(given), eqn.outvars, [eqn], eqn.effects, debug_info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(line, ()))(*given.values())


def _result(eqn: jex.JaxprEqn) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the only result."""
    aval: Any = eqn.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _rows(x: jax.Array, contracted: Sequence[int]) -> jax.Array:
    """`[K, m]`: the axes that a product sums over in front, as one."""
    return jnp.moveaxis(x, contracted, range(len(contracted))).reshape(-1, x.shape[_free(x, contracted)])


def _free(x: jax.Array, contracted: Sequence[int]) -> int:
    return next(axis for axis in range(x.ndim) if axis not in contracted)
