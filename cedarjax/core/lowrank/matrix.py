"""A matrix known by its parts, `scale * base + sum_k coefficient_k * left_k^T right_k`, and its algebra.

Sums, differences, multiples, transposes and casts of such matrices are such matrices, products with vectors come from
the parts, and so do inner products between two of them. Nothing here ever builds the matrix, but `dense`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Scalar: TypeAlias = jax.Array | float
"""A traced scalar, or a number known while tracing."""


def is_zero(value: object) -> bool:
    """Whether a scalar is known to be 0 while tracing."""
    return isinstance(value, int | float) and value == 0


def _times(a: Scalar, b: Scalar) -> Scalar:
    if is_zero(a) or is_zero(b):
        return 0.0
    a, b = _alike(a, b)
    return a * b


def _plus(a: Scalar, b: Scalar) -> Scalar:
    if is_zero(a) or is_zero(b):
        return b if is_zero(a) else a
    a, b = _alike(a, b)
    return a + b


def _alike(a: Scalar, b: Scalar) -> tuple[Scalar, Scalar]:
    """Both in the wider dtype, where both are traced."""
    if not isinstance(a, jax.Array) or not isinstance(b, jax.Array) or a.dtype == b.dtype:
        return a, b
    dtype = max(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.astype(dtype), b.astype(dtype)


def _scaled(coefficient: Scalar, x: jax.Array) -> jax.Array:
    if isinstance(coefficient, int | float):
        return x if coefficient == 1 else x * jnp.asarray(coefficient, x.dtype)
    return x * coefficient.astype(x.dtype)


class Term(NamedTuple):
    """`coefficient * left^T right`."""

    coefficient: Scalar
    """Kept apart, so that the same factors with another coefficient are known to be the same."""
    left: jax.Array
    """`[K, m]`."""
    right: jax.Array
    """`[K, n]`."""


class Choice:
    """A choice between two values by a scalar condition.

    It masks an array once: what was the same factor before is the same factor after.

    Args:
      condition: bool scalar.
      is_finite: tells of an array whether it is known to be finite whatever is chosen. Such factors stay as they are.
    """

    def __init__(self, condition: jax.Array, is_finite: Callable[[jax.Array], bool] = lambda x: False):
        self.condition = condition
        self._is_finite = is_finite
        self._masked: dict[tuple[int, bool], tuple[jax.Array, jax.Array]] = {}

    def pick(self, a: Scalar, b: Scalar, dtype: jnp.dtype) -> Scalar:
        """`a` if the condition holds, else `b`."""
        if a is b or (isinstance(a, int | float) and isinstance(b, int | float) and a == b):
            return a
        return jnp.where(self.condition, jnp.asarray(a, dtype), jnp.asarray(b, dtype))

    def mask(self, x: jax.Array, *, unless: bool) -> jax.Array:
        """`x` if the condition holds, else zeros; the other way round with `unless`."""
        if (id(x), unless) not in self._masked:
            zero = jnp.zeros((), x.dtype)
            masked = jnp.where(self.condition, zero, x) if unless else jnp.where(self.condition, x, zero)
            self._masked[id(x), unless] = (masked, x)  # x is held, so that its id stays its own
        return self._masked[id(x), unless][0]

    def mask_product(self, left: jax.Array, right: jax.Array, *, unless: bool) -> tuple[jax.Array, jax.Array]:
        """Factors of a product that is zero where the condition says so: one is masked if the other is finite."""
        if self._is_finite(left):
            return left, self.mask(right, unless=unless)
        if self._is_finite(right):
            return self.mask(left, unless=unless), right
        return self.mask(left, unless=unless), self.mask(right, unless=unless)


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """`scale * base + sum of the terms`, `[m, n]`."""

    shape: tuple[int, ...]
    """`(m, n)`."""
    dtype: jnp.dtype
    """Of all parts."""
    base: jax.Array | None
    """A matrix that all clients share, `[m, n]`, or `[n, m]` when it is `transposed`; None for no such part."""
    transposed: bool
    """Whether the base stands transposed."""
    scale: Scalar
    """Multiple of the base; a Python 0 is known to be none."""
    terms: tuple[Term, ...]
    """No two with the same two factors."""
    precision: lax.PrecisionLike = None
    """Of the products that make the matrix dense."""

    @classmethod
    def shared(cls, base: jax.Array) -> "Matrix":
        """A matrix that is all base."""
        return cls(base.shape, base.dtype, base, False, 1.0, ())

    @classmethod
    def outer(cls, left: jax.Array, right: jax.Array, precision: lax.PrecisionLike = None) -> "Matrix":
        """`left^T right`."""
        shape = (left.shape[1], right.shape[1])
        return cls(shape, left.dtype, None, False, 0.0, (Term(1.0, left, right),), precision)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "Matrix":
        """The matrix of zeros."""
        return cls(shape, dtype, None, False, 0.0, ())

    @property
    def is_zero(self) -> bool:
        """Whether the matrix is known to be zero."""
        return not self.terms and is_zero(self.scale)

    @property
    def own_base(self) -> jax.Array | None:
        """The base as it stands in the matrix, `[m, n]`; None where it is no part of it."""
        if self.base is None or is_zero(self.scale):
            return None
        return self.base.T if self.transposed else self.base

    def transpose(self) -> "Matrix":
        """The transposed matrix."""
        terms = tuple(Term(coefficient, right, left) for coefficient, left, right in self.terms)
        return dataclasses.replace(self, shape=self.shape[::-1], transposed=not self.transposed, terms=terms)

    def astype(self, dtype: jnp.dtype) -> "Matrix":
        """Every part in another dtype; rounds each part, where a dense matrix would round the sum."""
        if dtype == self.dtype:
            return self
        base = None if self.base is None else self.base.astype(dtype)
        terms = tuple(Term(c, left.astype(dtype), right.astype(dtype)) for c, left, right in self.terms)
        return dataclasses.replace(self, dtype=dtype, base=base, terms=terms)

    def times(self, factor: Scalar) -> "Matrix":
        """A multiple."""
        terms = tuple(term._replace(coefficient=_times(term.coefficient, factor)) for term in self.terms)
        return dataclasses.replace(self, scale=_times(self.scale, factor), terms=() if is_zero(factor) else terms)

    def plus(self, other: "Matrix") -> "Matrix | None":
        """The sum; None if both have a base and not the same one."""
        with_base = self._base_of_both(other)
        if with_base is None:
            return None
        merged = self._by_factors()
        for factors, term in other._by_factors().items():
            if factors in merged:
                term = term._replace(coefficient=_plus(merged[factors].coefficient, term.coefficient))
            merged[factors] = term
        terms = tuple(term for term in merged.values() if not is_zero(term.coefficient))
        return dataclasses.replace(with_base, scale=_plus(self.scale, other.scale), terms=terms)

    def where(self, choice: Choice, other: "Matrix") -> "Matrix | None":
        """This if the condition holds, else the other; None if both have a base and not the same one.

        A term that only one of them has is set to zero where it is not taken, also if it is not finite there.
        """
        with_base = self._base_of_both(other)
        if with_base is None:
            return None
        mine, theirs = self._by_factors(), other._by_factors()

        def masked(term: Term, *, unless: bool) -> Term:
            a, b = (0.0, term.coefficient) if unless else (term.coefficient, 0.0)
            known = isinstance(term.coefficient, int | float)  # a traced one may not be finite either
            coefficient = term.coefficient if known else choice.pick(a, b, self.dtype)
            return Term(coefficient, *choice.mask_product(term.left, term.right, unless=unless))

        terms = [
            term._replace(coefficient=choice.pick(term.coefficient, theirs[factors].coefficient, self.dtype))
            if factors in theirs
            else masked(term, unless=False)
            for factors, term in mine.items()
        ]
        terms += [masked(term, unless=True) for factors, term in theirs.items() if factors not in mine]
        scale = choice.pick(self.scale, other.scale, self.dtype)
        return dataclasses.replace(with_base, scale=scale, terms=tuple(terms))

    def apply(self, x: jax.Array, axis: int, precision: lax.PrecisionLike, dtype: jnp.dtype | None = None) -> jax.Array:
        """`x [..., m]` times the matrix, `[..., n]`; with `axis=1`, `x [..., n]` times the transposed, `[..., m]`.

        Args:
          x: operand, contracted over its last axis.
          axis: axis of the matrix that is contracted.
          precision: of the products.
          dtype: of the accumulation and the result; default: that of the matrix.

        Returns:
          An array of that dtype.
        """
        dtype = self.dtype if dtype is None else dtype

        def contract(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
            contracted = (((a.ndim - 1,), (axis,)), ((), ()))
            return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=dtype)

        parts = []
        if self.base is not None and not is_zero(self.scale):
            parts.append(_scaled(self.scale, contract(x, self.base, 1 - axis if self.transposed else axis)))
        for coefficient, left, right in self.terms:
            inner, outer = (left, right) if axis == 0 else (right, left)
            rows = _scaled(coefficient, contract(x, inner, 1))
            parts.append(contract(rows, outer.astype(dtype), 0))
        if not parts:
            return jnp.zeros((*x.shape[:-1], self.shape[1 - axis]), dtype)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def inner(self, other: "Matrix", precision: lax.PrecisionLike = lax.Precision.HIGHEST) -> jax.Array:
        """Sum of the elementwise product with a matrix of the same shape, a scalar."""
        total = jnp.zeros((), self.dtype)
        for coefficient, left, right in other.terms:
            total = total + _scaled(coefficient, jnp.sum(self.apply(left, 0, precision) * right))
        base = other.own_base
        if base is None:
            return total
        for coefficient, left, right in self.terms:
            image = jnp.matmul(left, base, precision=precision) * right
            total = total + _scaled(other.scale, _scaled(coefficient, jnp.sum(image)))
        if self.own_base is not None:
            total = total + _scaled(self.scale, _scaled(other.scale, jnp.sum(self.own_base * base)))
        return total

    def factors(self) -> list[tuple[jax.Array, jax.Array]]:
        """Pairs `left [K, m]`, `right [K, n]`; all terms, coefficients included, are the sum of `left^T right`."""
        lefts: dict[int, tuple[jax.Array, jax.Array]] = {}
        for coefficient, left, right in self.terms:
            right = _scaled(coefficient, right)
            if id(left) in lefts:  # the same rows of data in two terms: one term
                right = lefts[id(left)][1] + right
            lefts[id(left)] = (left, right)
        return list(lefts.values())

    def dense(self) -> jax.Array:
        """The matrix itself, `[m, n]`."""
        total = None
        if self.terms:
            left, right = (jnp.concatenate(parts) for parts in zip(*self.factors(), strict=True))
            total = lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=self.precision)
        if self.own_base is not None:
            base = _scaled(self.scale, self.own_base)
            total = base if total is None else base + total
        return jnp.zeros(self.shape, self.dtype) if total is None else total

    def _by_factors(self) -> dict[tuple[int, int], Term]:
        return {(id(term.left), id(term.right)): term for term in self.terms}

    def _base_of_both(self, other: "Matrix") -> "Matrix | None":
        """The one of the two that has the base; None if both have one and not the same."""
        precision = self.precision if self.precision is not None else other.precision
        both = not is_zero(self.scale) and not is_zero(other.scale)
        if both and (self.base is not other.base or self.transposed != other.transposed):
            return None
        return dataclasses.replace(other if is_zero(self.scale) else self, precision=precision)
