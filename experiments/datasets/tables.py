"""`redwine`, `california`, `bike`, `olscancer`: the tabular sets of the Cedar paper in its own non-IID client splits.

Fifty training clients (eight of them become validation clients) and ten test clients, which are the new clients here.
The files hold the rows of a client sorted by label, so that the halves that the published code takes as support and
query hold different labels; here rows are shuffled within a client first. The published stimuli of these sets are rows
of test clients; here stimuli are drawn from a standard normal distribution in the standardised feature space.
"""

import os
from pathlib import Path

import numpy as np

from experiments.datasets import sources
from experiments.datasets.federation import (
    CLIP,
    TRAIN,
    Federation,
    assemble,
    draw_validation,
    shuffled_halves,
    standardise,
)

ALPHAS = (0.1, 0.5, 1.0, 5.0, 10.0)
NUM_CLIENTS, NUM_TRAIN_FILES = 60, 50
NUM_FEATURES = {"redwine": 11, "california": 8, "bike": 15, "olscancer": 31}
LOWEST_QUALITY, NUM_QUALITIES = 3, 5


def table(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    alpha: float = 0.5,
    num_validation: int = 8,
    num_stimuli: int = 20,
    drop_shared_rows: bool = True,
) -> Federation:
    """Loads one of the four sets.

    Args:
      name: `"redwine"` (classification), `"california"`, `"bike"` or `"olscancer"` (regression).
      data_dir: see `sources.data_directory`.
      seed: draws the validation clients, the shuffle within clients and the stimuli.
      alpha: concentration of the Dirichlet split of the training clients: 0.1, 0.5, 1.0, 5.0 or 10.0.
      num_validation: how many of the 50 training clients become validation clients.
      num_stimuli: rows drawn from a standard normal distribution.
      drop_shared_rows: take rows (features and label) that a new client also has away from the other clients.
    """
    if alpha not in ALPHAS:
        raise ValueError(f"alpha must be one of {', '.join(map(str, ALPHAS))} for {name}, got {alpha}.")
    if not 1 <= num_validation < NUM_TRAIN_FILES:
        raise ValueError(f"num_validation must satisfy 1 <= num_validation < {NUM_TRAIN_FILES}, got {num_validation}.")
    path = sources.find(name, data_dir, alpha=float(alpha))
    source = sources.read(path, ("x", "y", "client_id", "split"))
    _check(path, name, source)
    x, y, owner = source["x"], source["y"], source["client_id"]
    notes = [
        f"Dirichlet split of the training clients with alpha = {alpha}; the new clients are the same for every alpha."
    ]

    is_new = np.arange(NUM_CLIENTS) >= NUM_TRAIN_FILES
    is_shared = _shared_rows(x, y, is_new[owner])
    if is_shared.any():
        if drop_shared_rows:
            x, y, owner = x[~is_shared], y[~is_shared], owner[~is_shared]
        what = "taken away from the training side" if drop_shared_rows else "kept on both sides"
        notes.append(f"{is_shared.sum()} rows of the 50 training clients also belong to new clients: {what}.")

    rng = np.random.default_rng(seed)
    role = draw_validation(rng, is_new, num_validation)
    seen = role[owner] == TRAIN
    x = standardise(x, seen)
    notes.append(f"Features standardised with the training clients, cut off at {CLIP:g} deviations.")
    notes.append("Rows shuffled within a client, then halved.")
    is_labels = name == "redwine"
    target_mean, target_std = (0.0, 1.0) if is_labels else (float(y[seen].mean()), float(y[seen].std()))
    if not is_labels:
        notes.append("Target standardised with the training clients.")
    y = y - LOWEST_QUALITY if is_labels else (y - target_mean) / target_std
    notes.append("Stimuli: standard normal draws in the standardised feature space.")
    return assemble(
        name,
        task="classification" if is_labels else "regression",
        x=x,
        y=y,
        clients=[shuffled_halves(rng, np.flatnonzero(owner == client)) for client in range(NUM_CLIENTS)],
        role=role,
        num_outputs=NUM_QUALITIES if is_labels else 1,
        stimuli=rng.normal(size=(num_stimuli, x.shape[1])),
        class_names=tuple(f"quality {LOWEST_QUALITY + k}" for k in range(NUM_QUALITIES)) if is_labels else None,
        target_mean=target_mean,
        target_std=target_std,
        notes=tuple(notes),
    )


def _check(path: Path, name: str, source: dict[str, np.ndarray]) -> None:
    sources.check_lengths(path, source, ("x", "y", "client_id", "split"))
    sources.check_shape(path, "x", source["x"], (None, NUM_FEATURES[name]))
    sources.check_shape(path, "y", source["y"], (None,))
    for key in ("x", "y"):
        sources.check_finite(path, key, source[key])
    sources.check_range(path, "client_id", source["client_id"], 0, NUM_CLIENTS - 1)
    if name == "redwine":
        sources.check_range(path, "y", source["y"], LOWEST_QUALITY, LOWEST_QUALITY + NUM_QUALITIES - 1)
    if not np.array_equal(source["split"] == 1, source["client_id"] >= NUM_TRAIN_FILES):
        raise sources.DataError(
            f"{path}: split must be 1 for the clients {NUM_TRAIN_FILES}..{NUM_CLIENTS - 1} and 0 for all others."
        )


def _shared_rows(x: np.ndarray, y: np.ndarray, is_new: np.ndarray) -> np.ndarray:
    """`[n]` bool: rows of the training side whose features and label occur at a new client too."""
    rows = np.concatenate([x.astype(np.float64), y[:, None].astype(np.float64)], axis=1)
    _, key = np.unique(rows, axis=0, return_inverse=True)
    key = key.reshape(-1)
    return ~is_new & np.isin(key, key[is_new])
