"""Aggregation rules in plain numpy and float64, written from their definitions, one row a client.

Every function takes `x [n, D]`, rows that are all present, and `w [n]`, positive weights.
"""

import itertools

import numpy as np


def flat(tree):
    """`[C, D]` float64 of a tree with leaves `[C, ...]`, in the order of the leaves."""
    import jax

    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1)


def flat_one(tree):
    """`[D]` float64 of a tree with leaves `[...]`."""
    import jax

    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def mean(x, w):
    return w @ x / w.sum()


def median(x, w):
    def of_column(column):
        order = np.argsort(column, kind="stable")
        values, mass = column[order], np.cumsum(w[order])
        lower = np.searchsorted(mass, mass[-1] / 2 * (1 - 1e-9))
        upper = np.searchsorted(mass, mass[-1] / 2 * (1 + 1e-9), side="right")
        return (values[lower] + values[min(upper, len(values) - 1)]) / 2

    return np.array([of_column(column) for column in x.T])


def _tied(column, w):
    """Numbers that are equal have equal weights: which of them is taken does not matter."""
    return np.array([w[column == value].mean() for value in column])


def trimmed_mean(x, w, f):
    def of_column(column):
        order = np.argsort(column, kind="stable")[f : len(column) - f]
        return np.average(column[order], weights=_tied(column, w)[order])

    return np.array([of_column(column) for column in x.T])


def mean_of_nearest(x, w, centre, num_kept):
    """Of numbers equally far, those below the centre come first."""

    def of_column(column, middle):
        order = sorted(range(len(column)), key=lambda i: (abs(column[i] - middle), column[i]))[:num_kept]
        return np.average(column[order], weights=_tied(column, w)[order])

    return np.array([of_column(column, middle) for column, middle in zip(x.T, centre, strict=True)])


def meamed(x, w, f):
    return mean_of_nearest(x, w, median(x, w), len(x) - f)


def phocas(x, w, f):
    return mean_of_nearest(x, w, trimmed_mean(x, w, f), len(x) - f)


def sq_distances(x):
    return np.square(x[:, None] - x[None]).sum(axis=2)


def krum_scores(x, num_neighbors):
    """By brute force: the least sum over that many other rows."""
    d = sq_distances(x)
    others = [[d[i, j] for j in range(len(x)) if j != i] for i in range(len(x))]
    return np.array([sum(sorted(row)[:num_neighbors]) for row in others])


def krum(x, w, f, num_neighbors=None):
    return x[np.argmin(krum_scores(x, len(x) - f - 2 if num_neighbors is None else num_neighbors))]


def multi_krum_rows(x, f, num_selected=None, num_neighbors=None):
    scores = krum_scores(x, len(x) - f - 2 if num_neighbors is None else num_neighbors)
    return np.argsort(scores, kind="stable")[: len(x) - f if num_selected is None else num_selected]


def multi_krum(x, w, f, num_selected=None, num_neighbors=None):
    rows = multi_krum_rows(x, f, num_selected, num_neighbors)
    return mean(x[rows], w[rows])


def bulyan_rows(x, f):
    left, picked = list(range(len(x))), []
    while len(picked) < len(x) - 2 * f:
        best = int(np.argmin(krum_scores(x[left], max(1, len(left) - f - 2))))
        picked.append(left.pop(best))
    return sorted(picked)


def bulyan(x, w, f):
    rows = bulyan_rows(x, f)
    return mean_of_nearest(x[rows], w[rows], median(x[rows], w[rows]), len(rows) - 2 * f)


def nnm(x, w, f):
    """The mixed rows."""
    nearest = np.argsort(sq_distances(x), axis=1, kind="stable")[:, : len(x) - f]
    return np.stack([mean(x[rows], w[rows]) for rows in nearest])


def clip(x, max_norm):
    """The clipped rows."""
    lengths = np.linalg.norm(x, axis=1)
    return x * np.minimum(1, max_norm / np.where(lengths > 0, lengths, 1))[:, None]


def arc(x, f):
    """The clipped rows."""
    lengths = np.sort(np.linalg.norm(x, axis=1))
    num_clipped = int(2 * (f / len(x)) * (len(x) - f))
    return clip(x, lengths[len(x) - num_clipped - 1])


def centered_clipping(x, w, radius, num_iters=1, center=None):
    v = np.zeros(x.shape[1]) if center is None else np.array(center, np.float64)
    for _ in range(num_iters):
        v = v + mean(clip(x - v, radius), w)
    return v


def geometric_median(x, w, num_iters=10_000):
    """By Weiszfeld's iteration on vectors."""
    z = mean(x, w)
    for _ in range(num_iters):
        beta = w / np.maximum(1e-12, np.linalg.norm(x - z, axis=1))
        z = mean(x, beta)
    return z


def subsets(n, f):
    """Index arrays of all subsets of `n - f`."""
    return [np.array(rows) for rows in itertools.combinations(range(n), n - f)]
