"""An update of a matrix by its factors: what stands in a tree of updates where a dense leaf would."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.mixture import Mixture
from cedarjax.core.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """`sum_k left_k^T right_k`, one client's update of a matrix `[m, n]`.

    With a leading client axis on all fields it holds the updates of all clients. `core.gram`, `core.weighted_sum` and
    their relatives read it, so every rule that rests on them does. Other functions of the leaves must not: twice both
    factors is four times the update. One of the leaves is a PRNG key, on which arithmetic raises `TypeError`;
    `core.dense` gives the array that it can have.
    """

    lefts: tuple[jax.Array, ...]
    """`[R_k, m]` each; one pair of factors for every product that made the update, not copied together."""
    rights: tuple[jax.Array, ...]
    """`[R_k, n]` each."""
    guard: jax.Array
    """A key that nobody draws from: what is done to the leaves one by one fails on it."""

    @classmethod
    def of(cls, *factors: tuple[jax.Array, jax.Array]) -> "LowRank":
        """The sum of the products of pairs.

        Args:
          *factors: at least one pair `left [R_k, m]`, `right [R_k, n]`, or with a client axis in front.

        Returns:
          The update.
        """
        lefts, rights = zip(*factors, strict=True)
        words = jnp.zeros((*lefts[0].shape[:-2], 2), jnp.uint32)
        return cls(lefts, rights, jax.random.wrap_key_data(words, impl="threefry2x32"))

    @property
    def left(self) -> jax.Array:
        """All left factors, `[R, m]`."""
        return self.lefts[0] if len(self.lefts) == 1 else jnp.concatenate(self.lefts, axis=-2)

    @property
    def right(self) -> jax.Array:
        """All right factors, `[R, n]`."""
        return self.rights[0] if len(self.rights) == 1 else jnp.concatenate(self.rights, axis=-2)

    @property
    def rank(self) -> int:
        """`R`, the number of rows of all factors: the rank is at most that."""
        return sum(left.shape[-2] for left in self.lefts)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the matrix."""
        return self.rights[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, the client axis included where there is one."""
        return (*self.lefts[0].shape[:-2], self.lefts[0].shape[-1], self.rights[0].shape[-1])

    @property
    def size(self) -> int:
        """Number of entries of the matrix, those of all clients where there is a client axis."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix."""
        return len(self.shape)

    def checked(self) -> "LowRank":
        """Itself.

        Raises:
          TypeError: if its leaves were replaced by arrays of another kind.
        """
        if not jnp.issubdtype(self.guard.dtype, jax.dtypes.prng_key):
            raise TypeError(
                "updates must not be changed leaf by leaf while they are low-rank, use core.dense first; got a LowRank "
                f"whose guard is {self.guard.dtype}."
            )
        return self

    def map(self, left_fn: Callable[[jax.Array], jax.Array], right_fn: Callable[[jax.Array], jax.Array]) -> "LowRank":
        """The update with functions of its factors for factors.

        Args:
          left_fn: applied to every left factor.
          right_fn: applied to every right factor.

        Returns:
          The other update.
        """
        return dataclasses.replace(
            self, lefts=tuple(map(left_fn, self.lefts)), rights=tuple(map(right_fn, self.rights))
        )

    def astype(self, dtype: jnp.dtype) -> "LowRank":
        """The update with all factors in another dtype."""
        return self.map(lambda x: x.astype(dtype), lambda x: x.astype(dtype))

    def dense(self) -> jax.Array:
        """The matrix itself, `[m, n]`, or `[C, m, n]`."""
        left, right, rows = self.checked().left, self.right, self.lefts[0].ndim - 2
        batch = tuple(range(rows))
        return lax.dot_general(left, right, (((rows,), (rows,)), (batch, batch)), precision=lax.Precision.HIGHEST)


def keep(condition: jax.Array, x: jax.Array | LowRank) -> jax.Array | LowRank:
    """`x` where the condition holds, zeros elsewhere, whatever it holds there.

    Args:
      condition: bool scalar, or `[C]` for all clients.
      x: one leaf of an update.

    Returns:
      A leaf of the same kind, shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> print(keep(jnp.array([True, False]), jnp.array([[1.0, 2.0], [jnp.nan, 3.0]])))
      [[1. 2.]
       [0. 0.]]
    """

    def kept(a: jax.Array) -> jax.Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, jnp.zeros((), a.dtype)
        )

    return x.map(kept, kept) if isinstance(x, LowRank) else kept(x)


def is_low_rank(x: object) -> bool:
    """Whether a node of a tree is a `LowRank`: `is_leaf` for trees of updates."""
    return isinstance(x, LowRank)


def dense(updates: PyTree) -> PyTree:
    """Updates with an array in the place of every `LowRank`, and the rows of a `Mixture` written out.

    Args:
      updates: one client's update, or all clients'.

    Returns:
      The same tree of arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> dense({"kernel": LowRank.of((jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])))})
      {'kernel': Array([[3., 4.],
             [6., 8.]], dtype=float32)}
    """
    if isinstance(updates, Mixture):
        parts = tuple(dense(part) for part in updates.parts)
        return dataclasses.replace(updates, parts=parts).written()
    return jax.tree.map(lambda x: x.dense() if is_low_rank(x) else x, updates, is_leaf=is_low_rank)
