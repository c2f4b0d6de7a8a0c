"""One's own data: an `.npz` file with `x`, `y`, `client_id` and, if wanted, `split`."""

import os
from pathlib import Path

import numpy as np

from experiments.datasets import sources
from experiments.datasets.federation import (
    CLIP,
    TRAIN,
    VALIDATION,
    Federation,
    assemble,
    draw_roles,
    draw_validation,
    shuffled_halves,
    standardise,
)

TASKS = ("classification", "regression")


def load_npz(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    seed: int = 0,
    standardize: bool = True,
    num_stimuli: int = 20,
) -> Federation:
    """Reads a federation from a file.

    | array | meaning |
    |---|---|
    | `x` `[n, ...]` | inputs, numbers |
    | `y` `[n]` | integers: classes (any values); floats: targets of a regression |
    | `client_id` `[n]` | integers or text: whose example it is |
    | `split` `[n]` | 1 = the client is held out, 0 = it is not; optional |

    Without `split`, a fifth of the clients, drawn by the seed, are held out. A tenth of the others, and at least one,
    become validation clients. Rows are shuffled within a client, then halved into support and query set.

    Args:
      path: the file.
      task: `"classification"` or `"regression"`; told by the dtype of `y` when None.
      seed: draws the held-out and validation clients, the halves and the stimuli.
      standardize: bring each feature (last axis of `x`), and a regression target, to mean 0 and deviation 1 of the
        training clients.
      num_stimuli: inputs of validation clients, without labels, that the server uses as stimuli; fewer if they have
        fewer rows.

    Raises:
      DatasetNotFoundError: when there is no such file.
      DataError: naming the file, the key and what was expected.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "mine.npz"
      >>> np.savez(path, x=np.eye(12), y=np.arange(12) % 2, client_id=np.arange(12) // 3)
      >>> federation = load_npz(path)
      >>> federation.task, federation.num_clients, federation.x.shape
      ('classification', 4, (12, 12))
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    path = Path(path)
    source = sources.read(path, ("x", "y", "client_id"), optional=("split",))
    sources.check_lengths(path, source, tuple(source))
    x = _inputs(path, source["x"])
    y, task, class_names = _targets(path, source["y"], task)
    owner, names = _owners(path, source["client_id"])

    rng = np.random.default_rng(seed)
    role = _roles(path, rng, source.get("split"), owner, len(names))
    notes = ["Own data. Rows shuffled within a client, then halved."]
    target_mean, target_std = 0.0, 1.0
    seen = role[owner] == TRAIN
    if standardize:
        x = standardise(x, seen)
        notes.append(
            f"Each feature (last axis of x) standardised with the training clients, cut off at {CLIP:g} deviations."
        )
        if task == "regression":
            target_mean, target_std = float(y[seen].mean()), float(y[seen].std()) or 1.0
            y = (y - target_mean) / target_std
    if class_names is not None and (unseen := np.setdiff1d(y, y[seen])).size:
        notes.append(f"Classes that no training client has: {', '.join(class_names[k] for k in unseen)}.")
    pool = np.flatnonzero(role[owner] == VALIDATION)
    notes.append("Stimuli: inputs of validation clients, without labels.")
    return assemble(
        path.stem,
        task=task,
        x=x,
        y=y,
        clients=[shuffled_halves(rng, np.flatnonzero(owner == client)) for client in range(len(names))],
        role=role,
        num_outputs=1 if class_names is None else len(class_names),
        stimuli=x[rng.choice(pool, min(num_stimuli, len(pool)), replace=False)],
        class_names=class_names,
        client_names=names,
        target_mean=target_mean,
        target_std=target_std,
        notes=tuple(notes),
    )


def _inputs(path: Path, x: np.ndarray) -> np.ndarray:
    if x.ndim < 2 or 0 in x.shape:
        raise sources.DataError(
            f"{path}: x must have shape [n, ...] with at least one feature axis, got {list(x.shape)}."
        )
    if not (np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer) or x.dtype == bool):
        raise sources.DataError(f"{path}: x must hold real numbers, got dtype {x.dtype}.")
    sources.check_finite(path, "x", x)
    return x.astype(np.float64)


def _targets(path: Path, y: np.ndarray, task: str | None) -> tuple[np.ndarray, str, tuple[str, ...] | None]:
    is_discrete = np.issubdtype(y.dtype, np.integer) or y.dtype == bool
    if y.ndim != 1:
        raise sources.DataError(f"{path}: y must have shape [n], got {list(y.shape)}.")
    if not (is_discrete or np.issubdtype(y.dtype, np.floating)):
        raise sources.DataError(f"{path}: y must hold integers (classes) or floats (targets), got dtype {y.dtype}.")
    sources.check_finite(path, "y", y)
    task = task or ("classification" if is_discrete else "regression")
    if task == "regression":
        return y.astype(np.float64), task, None
    if not is_discrete:
        if not np.array_equal(y, np.round(y)):
            raise sources.DataError(
                f"{path}: y must hold whole numbers for classification, got floats such as {y[y != np.round(y)][0]}."
            )
        y = y.astype(np.int64)
    values, classes = np.unique(y, return_inverse=True)
    if len(values) < 2:
        raise sources.DataError(f"{path}: y must hold at least 2 classes, got only {values[0]}.")
    return classes.reshape(-1), task, tuple(str(value) for value in values)


def _owners(path: Path, client_id: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    if client_id.ndim != 1 or not (np.issubdtype(client_id.dtype, np.integer) or client_id.dtype.kind == "U"):
        raise sources.DataError(
            f"{path}: client_id must be [n] integers or text, got {client_id.dtype} of shape {list(client_id.shape)}."
        )
    values, owner, counts = np.unique(client_id, return_inverse=True, return_counts=True)
    if len(values) < 3:
        raise sources.DataError(
            f"{path}: client_id must name at least 3 clients (training, validation, held-out), got {len(values)}."
        )
    if counts.min() < 2:
        single = ", ".join(str(value) for value in values[counts < 2][:5])
        raise sources.DataError(
            f"{path}: client_id must give every client at least 2 examples (support and query), "
            f"got 1 for {np.sum(counts < 2)} clients ({single}, ...)."
        )
    return owner.reshape(-1), tuple(str(value) for value in values)


def _roles(
    path: Path, rng: np.random.Generator, split: np.ndarray | None, owner: np.ndarray, num_clients: int
) -> np.ndarray:
    if split is None:
        num_new = max(1, num_clients // 5)
        num_validation = max(1, (num_clients - num_new) // 10)
        return draw_roles(rng, num_clients - num_new - num_validation, num_validation, num_new)
    if split.ndim != 1 or not np.isin(split, (0, 1)).all():
        raise sources.DataError(
            f"{path}: split must be [n] of 0 and 1 (1 = held-out client), got {list(np.unique(split)[:5])}."
        )
    share = np.bincount(owner, weights=split.astype(np.float64)) / np.bincount(owner)
    mixed = np.flatnonzero((share > 0) & (share < 1))
    if mixed.size:
        raise sources.DataError(
            f"{path}: split must be the same for all rows of a client, since it holds out whole clients, "
            f"got {mixed.size} clients with both 0 and 1."
        )
    is_new = share == 1
    if not is_new.any() or np.sum(~is_new) < 2:
        raise sources.DataError(
            f"{path}: split must hold out at least 1 client and leave at least 2, "
            f"got {is_new.sum()} held out of {num_clients}."
        )
    return draw_validation(rng, is_new, max(1, int(np.sum(~is_new)) // 10))
