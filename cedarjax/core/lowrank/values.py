"""What stands for an array while a function is interpreted: its parts, or what is not worth forming."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from cedarjax.core.lowrank.matrix import Matrix, Scalar


class Splat(NamedTuple):
    """A matrix of one number."""

    value: Scalar
    """The number."""
    shape: tuple[int, ...]
    """`(m, n)`."""
    dtype: jnp.dtype
    """Dtype of the matrix."""

    def dense(self) -> jax.Array:
        """The matrix itself."""
        return jnp.full(self.shape, self.value, self.dtype)


class Product(NamedTuple):
    """Elementwise product of two matrices, of which only the sum is wanted."""

    first: Matrix
    """`[m, n]`."""
    second: Matrix
    """`[m, n]`."""

    def dense(self) -> jax.Array:
        """The product itself."""
        return self.first.dense() * self.second.dense()


class Stack(NamedTuple):
    """What the steps of an unrolled scan gave, not stacked."""

    values: list[Any]
    """One a step."""

    def dense(self) -> jax.Array:
        """Stacked."""
        return jnp.stack([dense(value) for value in self.values])


Value: TypeAlias = Any
"""An array, a literal of the jaxpr, or one of `Matrix`, `Splat`, `Product` and `Stack`."""
SPECIAL = (Matrix, Splat, Product, Stack)


def dense(value: Value) -> Any:
    """A value as an array or literal that every primitive takes."""
    return value.dense() if isinstance(value, SPECIAL) else value


def scalar(value: Value) -> Scalar | None:
    """The number that a value stands for, or None."""
    if isinstance(value, Splat):
        return value.value
    if isinstance(value, SPECIAL):
        return None
    if isinstance(value, jax.Array):
        return value if value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.inexact) else None
    return float(value) if jnp.ndim(value) == 0 else None
