"""Rows that are linear combinations of other rows, never written out.

A pre-aggregator hands a rule other rows than it was given: means of neighbours, means of buckets, clipped rows. All of
them are `matrix @ updates`, so their inner products are `matrix @ gram @ matrix.T` and a combination of them is one of
the updates. `core.gram`, `core.weighted_sum` and their relatives read a `Mixture` as they read a tree, and what is
known of the inner products travels along: a rule inside a rule inside a rule costs one Gram matrix.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cedarjax.core.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """`K` rows, `sum_p matrices[p] @ parts[p]`, standing in the place of a whole tree of updates."""

    matrices: tuple[jax.Array, ...]
    """`[K, C_p]` each, finite; rows of a part that no row reads have a column of zeros and may hold anything."""
    parts: tuple[PyTree, ...]
    """Trees of one structure with leaves `[C_p, ...]`."""
    sums: jax.Array
    """`[K]`, what the coefficients of each row add up to: how much of a common offset of all updates the row has."""
    inner: jax.Array | None = None
    """`[B + 1, B + 1]` inner products of all `B` rows of the parts about a centre, and of the centre last; `None` until
    somebody needs them. Rows that are not read have zeros."""

    @classmethod
    def of(cls, matrix: jax.Array, updates: "PyTree | Mixture", *, means: bool = False) -> "Mixture":
        """The rows `matrix @ updates`.

        Args:
          matrix: `[K, C]`.
          updates: tree with leaves `[C, ...]`, or a `Mixture` of `C` rows.
          means: whether every row of `matrix` that is not zero adds up to 1, so that rounding is not taken for an
            offset.

        Returns:
          A `Mixture` of `K` rows of the parts of `updates`.

        Example:
          >>> import jax.numpy as jnp
          >>> from cedarjax.core import weighted_sum
          >>> pairs = Mixture.of(jnp.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), {"a": jnp.array([2.0, 4.0, 9.0])})
          >>> weighted_sum(jnp.array([1.0, 1.0]), pairs)
          {'a': Array(12., dtype=float32)}
        """
        used = (matrix != 0).any(axis=1).astype(matrix.dtype)
        if not isinstance(updates, Mixture):
            return cls((matrix,), (updates,), used if means else matrix.sum(axis=1))

        def through(x: jax.Array) -> jax.Array:
            return jnp.matmul(matrix.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)

        sums = used.astype(updates.sums.dtype) + through(updates.sums - 1) if means else through(updates.sums)
        return cls(tuple(map(through, updates.matrices)), updates.parts, sums, updates.inner)

    @classmethod
    def kept(cls, updates: PyTree, present: jax.Array, inner: jax.Array | None = None) -> "Mixture":
        """The updates themselves, and zeros for clients that are absent.

        Args:
          updates: tree with leaves `[C, ...]`.
          present: `[C]`, 1 for the clients whose updates are read and 0 for the others, floating.
          inner: inner products, if they are known.

        Returns:
          A `Mixture` of `C` rows.
        """
        return cls((jnp.diag(present),), (updates,), present, inner)

    def beside(self, vector: PyTree) -> "Mixture":
        """The same rows and one more behind them.

        Args:
          vector: tree with leaves `[...]`, finite.

        Returns:
          A `Mixture` of `K + 1` rows whose inner products are not known.
        """
        own = tuple(jnp.pad(m, ((0, 1), (0, 0))) for m in self.matrices)
        last = jnp.zeros((self.num_rows + 1, 1), self.matrices[0].dtype).at[-1, 0].set(1)
        part = jax.tree.map(lambda x: x[None], vector)
        return Mixture((*own, last), (*self.parts, part), jnp.pad(self.sums, (0, 1), constant_values=1))

    @property
    def num_rows(self) -> int:
        """`K`."""
        return self.matrices[0].shape[0]

    @property
    def coordinates(self) -> jax.Array:
        """`[K, B + 1]`: the rows in terms of the parts' rows about the centre, and of the centre."""
        return jnp.concatenate([*self.matrices, self.sums[:, None]], axis=1)

    def read(self) -> tuple[jax.Array, ...]:
        """`[C_p]` bool for each part, the rows that some row of the mixture reads."""
        return tuple((matrix != 0).any(axis=0) for matrix in self.matrices)

    def written(self) -> PyTree:
        """The rows themselves, a tree with leaves `[K, ...]`; as large as they are."""

        def of_leaf(*leaves: jax.Array) -> jax.Array:
            total = jnp.zeros((self.num_rows, *leaves[0].shape[1:]), self.matrices[0].dtype)
            for matrix, read, x in zip(self.matrices, self.read(), leaves, strict=True):
                kept = jnp.where(read.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
                total += jnp.tensordot(matrix, kept.astype(matrix.dtype), axes=1, precision=jax.lax.Precision.HIGHEST)
            return total.astype(leaves[0].dtype)

        return jax.tree.map(of_leaf, *self.parts)
