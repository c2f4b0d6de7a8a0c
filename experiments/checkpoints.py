"""Checkpoints of a run's state, written by orbax: complete or absent, never half."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint is there but cannot be read."""


def save(folder: Path, rounds: int, state: Any) -> None:
    """Writes the state after so many rounds and removes all but the last two checkpoints.

    Args:
      folder: folder of this run's checkpoints.
      rounds: rounds done.
      state: tree of arrays.
    """
    path = folder.absolute() / f"{rounds:08d}"
    if path.exists():
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, jax.tree.leaves(state))
    for old in _complete(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path, like: Any) -> tuple[int, Any]:
    """Reads the last complete checkpoint.

    Args:
      folder: folder of this run's checkpoints.
      like: tree of arrays with the shapes and dtypes that are expected.

    Returns:
      Rounds done and the state; `(0, like)` when there is no checkpoint.

    Raises:
      CheckpointError: if the last checkpoint cannot be read or holds another state; earlier ones are left alone.
    """
    complete = _complete(folder)
    if not complete:
        return 0, like
    last = complete[-1].absolute()
    leaves, structure = jax.tree.flatten(like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(last, [np.empty(x.shape, x.dtype) for x in leaves])
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        before = f"round {int(complete[-2].name)}" if len(complete) > 1 else "the first round"
        raise CheckpointError(
            f"checkpoint {last} must hold a whole state of this run, but cannot be read ({why}). Nothing was changed; "
            f"remove that folder to go on from {before}."
        ) from error
    # Back as host arrays and then uncommitted, so that the program may place them on any devices.
    return int(last.name), jax.tree.unflatten(structure, [jnp.asarray(x) for x in restored])


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that orbax has renamed into place, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
