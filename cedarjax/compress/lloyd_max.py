"""The best codebook of `2^b` numbers for a normal variable.

Reference: Max, `Quantizing for Minimum Distortion <https://doi.org/10.1109/TIT.1960.1057548>`_, 1960; Lloyd, `Least
Squares Quantization in PCM <https://doi.org/10.1109/TIT.1982.1056489>`_, 1982. Computed on the host, in Python's
double precision, when a compressor is made.
"""

import math

_MAX_BITS = 8


def _density(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _mass_above(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2))


def _quantile_above(mass: float) -> float:
    """The `x >= 0` above which a normal variable has that mass, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _mass_above(middle) > mass else (low, middle)
    return low


def _conditions(levels: list[float]) -> tuple[list[float], list[float], list[float], list[float]]:
    """How far each level is from the mean of its cell, and the derivatives by the level below, itself, that above."""
    bounds = [0.0, *(0.5 * (a + b) for a, b in zip(levels, levels[1:], strict=False)), math.inf]
    gaps, below, own, above = [], [], [], []
    for i, level in enumerate(levels):
        low, high = bounds[i], bounds[i + 1]
        last = math.isinf(high)
        at_low, at_high = _density(low), 0.0 if last else _density(high)
        mass = _mass_above(low) - (0.0 if last else _mass_above(high))
        mean = (at_low - at_high) / mass
        by_low = 0.5 * at_low * (mean - low) / mass if i else 0.0  # the lowest bound is 0 and stays
        by_high = 0.0 if last else 0.5 * at_high * (high - mean) / mass
        gaps.append(level - mean)
        below.append(-by_low)
        own.append(1 - by_low - by_high)
        above.append(-by_high)
    return gaps, below, own, above


def _solve_tridiagonal(below: list[float], own: list[float], above: list[float], right: list[float]) -> list[float]:
    own, right = list(own), list(right)
    for i in range(1, len(own)):
        factor = below[i] / own[i - 1]
        own[i] -= factor * above[i - 1]
        right[i] -= factor * right[i - 1]
    solution = [right[-1] / own[-1]]
    for i in reversed(range(len(own) - 1)):
        solution.append((right[i] - above[i] * solution[-1]) / own[i])
    return solution[::-1]


def normal_codebook(num_bits: int) -> tuple[float, ...]:
    """The upper half of the `2^num_bits` numbers that are nearest to a standard normal variable in the mean square.

    Each is the mean of the variable over the numbers that are nearest to it. The codebook is symmetric about 0.

    Args:
      num_bits: `b`, from 1 to 8.

    Returns:
      `2^(b - 1)` positive floats, in increasing order; exact to rounding.

    Raises:
      ValueError: if `num_bits` is out of range.

    Example:
      >>> print(*(round(level, 4) for level in normal_codebook(2)))
      0.4528 1.5104
    """
    if not 1 <= num_bits <= _MAX_BITS:
        raise ValueError(f"num_bits must be from 1 to {_MAX_BITS}, got {num_bits}.")
    half = 2 ** (num_bits - 1)
    # The best density of levels goes with the cube root of the variable's: a normal one, sqrt(3) times as wide.
    levels = [math.sqrt(3) * _quantile_above(0.5 - 0.5 * (i + 0.5) / half) for i in range(half)]
    for _ in range(12):  # Newton's steps; six are enough
        gaps, below, own, above = _conditions(levels)
        levels = [level - step for level, step in zip(levels, _solve_tridiagonal(below, own, above, gaps), strict=True)]
    return tuple(levels)
