"""Checks that every host-side constructor makes on its input."""

import operator
from typing import SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

Seed: TypeAlias = int | np.random.Generator
"""An integer, or a generator that is advanced."""


def as_generator(seed: Seed | None) -> np.random.Generator:
    """The generator of a seed; an integer starts a fresh one, None is refused so that every draw can be repeated."""
    if seed is None or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer or a numpy.random.Generator, got {seed!r}.")
    return np.random.default_rng(seed)


def as_count(name: str, value: SupportsIndex, minimum: int = 1) -> int:
    """The argument as an int of at least `minimum`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
    if count < minimum:
        raise ValueError(f"{name} must satisfy {name} >= {minimum}, got {count}.")
    return count


def as_positive(name: str, value: float) -> float:
    """The argument as a finite float above 0."""
    number = float(value)
    if not (np.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and {name} > 0, got {value}.")
    return number


def as_column(name: str, values: ArrayLike) -> np.ndarray:
    """The argument as a one-dimensional array that is not empty."""
    column = np.asarray(values)
    if column.ndim != 1 or column.size == 0:
        raise ValueError(f"{name} must have shape [n] with n >= 1, got shape {column.shape}.")
    return column


def as_labels(name: str, values: ArrayLike) -> np.ndarray:
    """The argument as a column of discrete values."""
    column = as_column(name, values)
    if np.issubdtype(column.dtype, np.inexact):
        raise TypeError(f"{name} must be discrete, got {column.dtype}; bin a continuous target first.")
    return column


def as_indices(name: str, values: ArrayLike, size: int) -> np.ndarray:
    """The argument as `[k]` int64 indices between 0 and `size - 1`, with repeats allowed."""
    indices = np.asarray(values)
    if indices.ndim != 1:
        raise ValueError(f"{name} must have shape [k], got shape {indices.shape}.")
    if indices.size == 0:
        return indices.astype(np.int64)
    if not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(f"{name} must hold integer indices, got {indices.dtype}.")
    if indices.min() < 0 or indices.max() >= size:
        raise ValueError(
            f"{name} must hold indices between 0 and {size - 1}, got values from {indices.min()} to {indices.max()}."
        )
    return indices.astype(np.int64)
