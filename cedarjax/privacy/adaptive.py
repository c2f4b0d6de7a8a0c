"""A clip norm that follows a quantile of the clients' lengths, privately.

Reference: Andrew, Thakkar, McMahan, Ramaswamy, `Differentially Private Learning with Adaptive Clipping
<https://arxiv.org/abs/1905.03871>`_, 2021. Their count is divided by the number of clients that are present; here by
the fixed expected one, of counts about one half, so that it is unbiased under Poisson sampling, and one client moves it
by one half whether it is added, removed or absent.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.types import Aggregator, Params, PyTree
from cedarjax.privacy.accounting import check_probability
from cedarjax.privacy.clip import check_above_zero
from cedarjax.privacy.mechanism import (
    NOISE_STREAM,
    MechanismInfo,
    check_limits,
    check_noise,
    gaussian_noise,
    release,
    told,
)
from cedarjax.privacy.rows import check_cohort_size, check_rows, clipped_sum

_COUNT_STREAM = 0x636F756E


class AdaptiveState(NamedTuple):
    """State of `adaptive_clipping`."""

    max_norm: jax.Array
    """float32 scalar, the length that the next round clips to. It is private: noised counts made it."""
    num_releases: jax.Array
    """int32 scalar, updates that were told so far: the rounds to account for."""
    info: MechanismInfo | None = None
    """What the last round tells; `None` after `init`."""


def split_noise(noise_multiplier: jax.Array | float, count_std: jax.Array | float) -> jax.Array | float:
    """Noise multiplier of the updates that, with that of the counts, costs as much as one mechanism.

    `z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)`: two Gaussian mechanisms on one cohort are one with the inverse squares
    of the multipliers added up, and a count about one half has the multiplier `sigma_b / (1/2)`.

    Args:
      noise_multiplier: `z`, what is accounted for, at least 0.
      count_std: `sigma_b`, standard deviation of the noise on the sum of counts; `2 sigma_b > z`.

    Returns:
      `z_delta`, at least `z`.

    Raises:
      ValueError: if both are Python numbers that do not fit.

    Example:
      >>> print(f"{split_noise(1.0, 1.0):.4f}")
      1.1547
    """
    if isinstance(noise_multiplier, int | float) and isinstance(count_std, int | float):
        if not 2 * count_std > noise_multiplier:
            raise ValueError(
                "count_std must satisfy 2 * count_std > noise_multiplier, else the counts alone cost more than is "
                f"accounted for, got {count_std} and {noise_multiplier}."
            )
        return noise_multiplier / math.sqrt(1 - (noise_multiplier / (2 * count_std)) ** 2)
    z, sigma = jnp.asarray(noise_multiplier, jnp.float32), jnp.asarray(count_std, jnp.float32)
    return z / jnp.sqrt(1 - jnp.square(jnp.where(z > 0, z / (2 * sigma), 0)))


def next_norm(
    max_norm: jax.Array, share: jax.Array, target_quantile: jax.Array | float, learning_rate: jax.Array | float
) -> jax.Array:
    """`C exp(-eta (b - gamma))`: a step towards the norm that a share `gamma` of the clients does not exceed.

    Args:
      max_norm: `C`.
      share: `b`, noised share of the clients that were no longer than `C`.
      target_quantile: `gamma`.
      learning_rate: `eta`.

    Returns:
      The next `C`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(next_norm(jnp.float32(2.0), jnp.float32(0.5), 0.5, 0.2))
      2.0
    """
    dtype = max_norm.dtype
    step = jnp.asarray(learning_rate, dtype) * (share.astype(dtype) - jnp.asarray(target_quantile, dtype))
    return max_norm * jnp.exp(-step)


def adaptive_clipping(
    noise_multiplier: jax.Array | float,
    expected_cohort: jax.Array | float,
    *,
    initial_norm: jax.Array | float = 0.1,
    target_quantile: jax.Array | float = 0.5,
    learning_rate: jax.Array | float = 0.2,
    count_std: jax.Array | float | None = None,
    num_rounds: int | None = None,
    cohort_size: int | None = None,
) -> Aggregator:
    """`gaussian_mechanism` with a clip norm that adapts, at the same price in privacy.

    With `b_i = 1` for a client that is no longer than `C_t` and 0 for one that is, each round tells the noised mean of
    clipped updates with the multiplier `z_delta` of `split_noise`, and

    `b = 1/2 + (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / m`,    `C_{t+1} = C_t exp(-eta (b - gamma))`.

    Together they cost what one mechanism with `noise_multiplier` costs: that is the number to account for. The fixed
    point is the `gamma` quantile of the lengths. A clip before this one (`clip_upload`) hides what is longer.

    Args:
      noise_multiplier: `z`, of both together, at least 0; may be traced.
      expected_cohort: `m`, the fixed denominator, above 0; may be traced.
      initial_norm: `C_0`, above 0 and finite; may be traced. A factor of ten takes 23 rounds at most to make good at
        the default rate.
      target_quantile: `gamma`, between 0 and 1; may be traced.
      learning_rate: `eta`, above 0 and finite; may be traced.
      count_std: `sigma_b`, with `2 sigma_b > z`; default: the paper's `m / 20`, but no less than `2 z`, which costs the
        updates 3 % more noise. May be traced; then nobody checks it against `z`.
      num_rounds: as in `gaussian_mechanism`.
      cohort_size: as in `gaussian_mechanism`.

    Returns:
      An `Aggregator` as `gaussian_mechanism`, with an `AdaptiveState`.

    Raises:
      ValueError: as in `gaussian_mechanism`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = adaptive_clipping(0.0, 4.0, initial_norm=1.0, target_quantile=0.5, learning_rate=0.2, count_std=1e-6)
      >>> updates, key = jnp.array([[2.0], [4.0], [6.0], [8.0]]), jax.random.key(0)
      >>> out, state = rule.update(updates, rule.init(None), weights=jnp.ones(4), key=key)
      >>> print(out, f"{state.max_norm:.4f}")  # all were too long: exp(0.1)
      [1.] 1.1052
    """
    check_noise(noise_multiplier)
    check_above_zero("expected_cohort", expected_cohort)
    check_above_zero("initial_norm", initial_norm)
    check_above_zero("learning_rate", learning_rate)
    check_limits(num_rounds, cohort_size)
    if isinstance(target_quantile, int | float):
        check_probability("target_quantile", target_quantile)
    if count_std is None:
        known = isinstance(noise_multiplier, int | float) and isinstance(expected_cohort, int | float)
        count_std = (max if known else jnp.maximum)(expected_cohort / 20, 2.0 * noise_multiplier)
    else:
        check_above_zero("count_std", count_std)
    update_noise = split_noise(noise_multiplier, count_std)

    def init(params: PyTree) -> AdaptiveState:
        del params
        return AdaptiveState(jnp.asarray(initial_norm, jnp.float32), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: AdaptiveState,
        params: Params | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, AdaptiveState]:
        check_rows(updates, weights, key, params, **extra_args)
        assert key is not None
        check_cohort_size(updates, cohort_size)
        total, clipped = clipped_sum(updates, weights, state.max_norm, mesh)
        ok = jnp.ones((), bool) if num_rounds is None else state.num_releases < num_rounds
        noise = gaussian_noise(jax.random.fold_in(key, NOISE_STREAM), total)
        std = jnp.asarray(update_noise, jnp.float32) * state.max_norm
        out = release(total, noise, std, expected_cohort, ok, updates)
        above = jnp.where(clipped.counted, 0.5 - clipped.clipped.astype(jnp.float32), 0).sum()
        above += jnp.asarray(count_std, jnp.float32) * jax.random.normal(jax.random.fold_in(key, _COUNT_STREAM))
        m = jnp.asarray(expected_cohort, jnp.float32)
        after = next_norm(state.max_norm, 0.5 + above / m, target_quantile, learning_rate)
        info = told(clipped, state.max_norm, std / m, ok)
        return out, AdaptiveState(jnp.where(ok, after, state.max_norm), state.num_releases + ok.astype(jnp.int32), info)

    return optax.GradientTransformationExtraArgs(init, update)
