"""What the tables of laws share: running a table, poisoning rows, counting traces."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp

from cedarjax.core import PyTree

Case = TypeVar("Case")
Law = Callable[[Case], None]


def check_laws(laws: Mapping[str, Law], case: Case, names: Iterable[str] | None = None) -> None:
    """Runs laws one after another.

    Args:
      laws: name to a function that raises `AssertionError` when the case breaks the law.
      case: what the laws are checked on.
      names: laws to run; default: all.

    Raises:
      AssertionError: from the first law that is broken; the message begins with its name.
      ValueError: for a name that is not in the table.
    """
    for name in laws if names is None else names:
        if name not in laws:
            raise ValueError(f"laws must be among {tuple(laws)}, got {name!r}.")
        try:
            laws[name](case)
        except AssertionError as error:
            raise AssertionError(f"law {name!r} is broken: {error}") from error
        except Exception as error:
            error.add_note(f"while checking the law {name!r}")
            raise


def close(case: Any, what: str, got: PyTree, want: PyTree) -> None:
    """Asserts that two trees agree to the tolerance of a case.

    Args:
      case: has `rtol` and `atol`.
      what: what is compared with what.
      got: one tree.
      want: the other.
    """
    chex.assert_trees_all_close(got, want, rtol=case.rtol, atol=case.atol, custom_message=what)


def finite(what: str, tree: PyTree) -> None:
    """Asserts that no leaf holds NaN or Inf.

    Args:
      what: what the tree is.
      tree: any tree of arrays.
    """
    chex.assert_tree_all_finite(tree, custom_message=what)


def filled(tree: PyTree, value: float) -> PyTree:
    """The same tree holding nonsense.

    Args:
      tree: any tree of arrays.
      value: what floats become; integers become the largest of their dtype.

    Returns:
      A tree of the same shapes and dtypes.
    """

    def fill(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.full_like(x, value)
        return jnp.full_like(x, jnp.iinfo(x.dtype).max) if jnp.issubdtype(x.dtype, jnp.integer) else x

    return jax.tree.map(fill, tree)


def take(tree: PyTree, rows: Sequence[int] | jax.Array) -> PyTree:
    """Rows of every leaf.

    Args:
      tree: leaves `[C, ...]`.
      rows: indices.

    Returns:
      Leaves `[len(rows), ...]`.
    """
    index = jnp.asarray(rows, jnp.int32)
    return jax.tree.map(lambda x: x[index], tree)


def where_rows(chosen: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Rows of `a` where chosen, of `b` elsewhere.

    Args:
      chosen: bool, over the leading axes of the leaves.
      a: leaves `[C, ...]`.
      b: leaves `[C, ...]`.

    Returns:
      Leaves `[C, ...]`.
    """

    def select(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim)), x, y)

    return jax.tree.map(select, a, b)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating leaves in another dtype.

    Args:
      tree: any tree of arrays.
      dtype: a floating dtype.

    Returns:
      A tree of the same structure.
    """
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


def widths(dtype: Any) -> contextlib.AbstractContextManager:
    """Context in which arrays of a dtype can exist.

    Args:
      dtype: a dtype.

    Returns:
      64-bit mode for 64-bit dtypes, else nothing.
    """
    return jax.enable_x64(True) if jnp.dtype(dtype).itemsize == 8 else contextlib.nullcontext()


def count_traces(fun: Callable) -> tuple[jax.stages.Wrapped, list[int]]:
    """Jits a function and counts how often it is traced.

    Args:
      fun: function of positional arguments.

    Returns:
      The jitted function, and a list that grows by one entry a trace.
    """
    traces: list[int] = []

    def counted(*args: PyTree) -> PyTree:
        traces.append(1)
        return fun(*args)

    return jax.jit(counted), traces
