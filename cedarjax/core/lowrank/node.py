"""An update of a matrix by its factors: what stands in a tree of updates where a dense leaf would."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """`left^T right`, one client's update of a matrix `[m, n]`; with a leading client axis on all fields, all clients'.

    `core.gram`, `core.weighted_sum` and their relatives read it, so every rule that rests on them does. Other functions
    of the leaves must not: twice both factors is four times the update. Such arithmetic is found out (`intact` loses
    its dtype) and refused; `core.dense` gives the array that it can have.
    """

    left: jax.Array
    """`[R, m]`."""
    right: jax.Array
    """`[R, n]`."""
    intact: jax.Array
    """True; of another dtype after arithmetic on the leaves."""

    @classmethod
    def of(cls, left: jax.Array, right: jax.Array) -> "LowRank":
        """One client's update."""
        # Formed once: every reader would gather, mask and concatenate the rows of the batches anew.
        left, right = lax.optimization_barrier((left, right))
        return cls(left, right, jnp.ones((), bool))

    def checked(self) -> "LowRank":
        """Itself.

        Raises:
          TypeError: if arithmetic was done on the factors.
        """
        if self.intact.dtype != bool:
            raise TypeError(
                "updates must not be changed leaf by leaf while they are low-rank: put core.dense() in front, got a "
                f"LowRank whose factors went through arithmetic (intact: {self.intact.dtype})."
            )
        return self

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the matrix."""
        return self.right.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, the client axis included where there is one."""
        return (*self.left.shape[:-2], self.left.shape[-1], self.right.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix."""
        return len(self.shape)

    def astype(self, dtype: jnp.dtype) -> "LowRank":
        """The update with both factors in another dtype."""
        return dataclasses.replace(self, left=self.left.astype(dtype), right=self.right.astype(dtype))

    def scaled(self, factor: jax.Array) -> "LowRank":
        """A multiple.

        Args:
          factor: scalar, or `[C]` for one factor a client.

        Returns:
          Of the same dtype.
        """
        factor = factor.astype(self.right.dtype)
        return dataclasses.replace(self, right=self.right * factor.reshape(factor.shape + (1, 1)))

    def dense(self) -> jax.Array:
        """The matrix itself, `[m, n]`, or `[C, m, n]`."""
        self.checked()
        batch = tuple(range(self.left.ndim - 2))
        rows = self.left.ndim - 2
        return lax.dot_general(
            self.left, self.right, (((rows,), (rows,)), (batch, batch)), precision=lax.Precision.HIGHEST
        )


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

    return dataclasses.replace(x, left=kept(x.left), right=kept(x.right)) if isinstance(x, LowRank) else kept(x)


def is_low_rank(x: object) -> bool:
    """Whether a node of a tree is a `LowRank`: `is_leaf` for trees of updates."""
    return isinstance(x, LowRank)


def dense(updates: PyTree) -> PyTree:
    """Updates with an array in the place of every `LowRank`.

    Args:
      updates: one client's update, or all clients'.

    Returns:
      The same tree of arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> dense({"kernel": LowRank.of(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))})
      {'kernel': Array([[3., 4.],
             [6., 8.]], dtype=float32)}
    """
    return jax.tree.map(lambda x: x.dense() if is_low_rank(x) else x, updates, is_leaf=is_low_rank)
