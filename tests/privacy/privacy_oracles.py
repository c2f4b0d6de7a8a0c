"""The mechanisms in plain numpy, client by client, from their formulas."""

import jax
import numpy as np


def rows(updates):
    """`[C, D]` float64."""
    leaves = jax.tree.leaves(updates)
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], axis=1)


def vector(tree):
    """`[D]` float64."""
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def widths(updates):
    """Numbers of each leaf in a row."""
    return [int(np.prod(x.shape[1:])) for x in jax.tree.leaves(updates)]


def sent(updates, weights):
    """`[C, D]` bool, which numbers count."""
    by_leaf = jax.tree.leaves(weights)
    sizes = widths(updates)
    if len(by_leaf) == 1:
        by_leaf = by_leaf * len(sizes)
    columns = [np.repeat(np.asarray(w)[:, None] > 0, n, axis=1) for w, n in zip(by_leaf, sizes, strict=True)]
    return np.concatenate(columns, axis=1)


def clipped_rows(updates, weights, limit):
    """`[C, D]` what each client adds to the sum."""
    out = []
    for row, counted in zip(rows(updates), sent(updates, weights), strict=True):
        row = np.where(counted, row, 0)
        if not np.isfinite(row).all():
            row = np.zeros_like(row)
        largest = np.abs(row).max()
        norm = largest * np.linalg.norm(row / largest) if largest > 0 else 0.0
        out.append(row if norm <= limit else row * (limit / norm))
    return np.array(out)
