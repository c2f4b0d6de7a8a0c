"""The Gaussian mechanism on the server: clip each client, add up, add noise, divide by a fixed number.

References:
  Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016.

  McMahan et al., `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_, 2018:
  of whole clients, with the fixed denominator `q N`.

Noise is drawn in float32. Attacks on the last bits of floating-point noise (Mironov, `On Significance of the Least
Significant Bits for Differential Privacy <https://doi.org/10.1145/2382196.2382264>`_, 2012) are not defended against.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.types import Aggregator, Params, PyTree
from cedarjax.privacy.clip import check_above_zero
from cedarjax.privacy.rows import Clipped, check_cohort_size, check_rows, clipped_sum

NOISE_STREAM = 0x6E6F6973
"""Keeps the noise apart from what others in the chain draw from the same key."""


class MechanismInfo(NamedTuple):
    """What a mechanism tells about one round. It is NOT private: nothing of it may leave the server."""

    clipped: Clipped
    """How each client was clipped."""
    fraction_clipped: jax.Array
    """float32 scalar, share of the clients that count whose upload was shortened."""
    mean_norm: jax.Array
    """Scalar, mean length of their uploads before."""
    max_norm: jax.Array
    """float32 scalar, the length that they were clipped to."""
    noise_std: jax.Array
    """float32 scalar, standard deviation of the noise on each number of the update (this one is no secret)."""
    ok: jax.Array
    """bool scalar. False once the rounds that were accounted for are over: then the update is 0."""


class MechanismState(NamedTuple):
    """State of a mechanism that needs nothing of earlier rounds."""

    num_releases: jax.Array
    """int32 scalar, updates that were told so far: the rounds to account for."""
    info: MechanismInfo | None = None
    """What the last round tells; `None` after `init`."""


def check_noise(noise_multiplier: jax.Array | float) -> None:
    """Raises unless a noise multiplier that is a Python number is in range.

    Args:
      noise_multiplier: at least 0 and finite.

    Raises:
      ValueError: naming its value.
    """
    if isinstance(noise_multiplier, int | float) and not 0 <= noise_multiplier < float("inf"):
        raise ValueError(f"noise_multiplier must be at least 0 and finite, got {noise_multiplier}.")


def check_limits(num_rounds: int | None, cohort_size: int | None) -> None:
    """Raises unless what is told of a plan is in range.

    Args:
      num_rounds: at least 0, or None.
      cohort_size: at least 1, or None.

    Raises:
      ValueError: naming the argument and its value.
    """
    if num_rounds is not None and num_rounds < 0:
        raise ValueError(f"num_rounds must be at least 0, got {num_rounds}.")
    if cohort_size is not None and cohort_size < 1:
        raise ValueError(f"cohort_size must be at least 1, got {cohort_size}.")


def gaussian_noise(key: jax.Array, like: PyTree) -> PyTree:
    """Standard normal numbers, leaf `i` from `fold_in(key, i)`.

    Args:
      key: PRNG key.
      like: tree of floats.

    Returns:
      Tree of the same shapes and dtypes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> gaussian_noise(jax.random.key(0), {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())})["a"].shape
      (2, 3)
    """
    leaves, structure = jax.tree.flatten(like)
    drawn = [jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def told(clipped: Clipped, max_norm: jax.Array | float, noise_std: jax.Array, ok: jax.Array) -> MechanismInfo:
    """The info of a round.

    Args:
      clipped: from `clipped_sum`.
      max_norm: length of the clip.
      noise_std: standard deviation of the noise on the update.
      ok: whether something was told.

    Returns:
      A `MechanismInfo`.
    """
    count = jnp.maximum(clipped.counted.sum(), 1)
    share = clipped.clipped.sum().astype(jnp.float32) / count.astype(jnp.float32)
    mean = clipped.norms.sum() / count.astype(clipped.norms.dtype)
    return MechanismInfo(
        clipped, share, mean, jnp.asarray(max_norm, jnp.float32), jnp.asarray(noise_std, jnp.float32), ok
    )


def release(
    total: PyTree,
    noise: PyTree,
    noise_std: jax.Array | float,
    expected_cohort: jax.Array | float,
    ok: jax.Array,
    like: PyTree,
) -> PyTree:
    """`(total + noise_std noise) / expected_cohort`, 0 where the budget is spent.

    Args:
      total: tree in float32 or wider.
      noise: tree of the same shapes.
      noise_std: standard deviation of the noise on the total.
      expected_cohort: the fixed denominator.
      ok: bool scalar, whether there is budget left.
      like: tree with the dtypes of the result.

    Returns:
      Tree in those dtypes: rounding comes last.
    """

    def of_leaf(x: jax.Array, z: jax.Array, y: jax.Array) -> jax.Array:
        noised = x + jnp.asarray(noise_std, x.dtype) * z.astype(x.dtype)
        return jnp.where(ok, noised / jnp.asarray(expected_cohort, x.dtype), 0).astype(y.dtype)

    # A LowRank among the updates is one node here: its dtype is read, not its factors.
    return jax.tree.map(of_leaf, total, noise, like)


def gaussian_mechanism(
    noise_multiplier: jax.Array | float,
    max_norm: jax.Array | float,
    expected_cohort: jax.Array | float,
    *,
    num_rounds: int | None = None,
    cohort_size: int | None = None,
) -> Aggregator:
    """The noised mean of clipped updates, private for whole clients.

    `update = (sum_i x_i min(1, C / |x_i|) + N(0, (z C)^2 I)) / m` with `z = noise_multiplier`, `C = max_norm`, and `m =
    expected_cohort`, the sum over all clients that are present.

    What makes it private, whatever came before:

    - each row is clipped here, over the whole tree, so that one client moves the sum by at most `C` (to rounding); a
      row that is not finite counts as zeros;
    - every client counts once. Weights only say who is present: a weight made of data, such as the number of examples,
      would let one client move the sum by as much more;
    - the denominator is fixed. The number of those present depends on who is in the federation, and is not told;
    - noise is added to every number of every layer. A layer that a client left out counts as zeros, and the denominator
      stays: what was left out depends on data. So masks cost signal and save no noise.

    With `m` the sampling rate times the number of clients, the update is an unbiased estimate of the mean over *all*
    clients of their clipped uploads. What it costs in privacy, `accounting.epsilon` tells for Poisson sampling, and for
    nothing else; make both from `poisson_plan`. The info, client states and what local updates tell are not private.

    It refuses what it can see to break the bound: a pre-aggregator around it, a rule before it. It cannot see
    everything: an attack whose rows are made of other clients' rows, for instance, breaks the promise to those.

    Args:
      noise_multiplier: `z`, at least 0; 0 gives no privacy. May be traced.
      max_norm: `C`, above 0 and finite, in units of the updates; may be traced. It must not be chosen by looking at the
        data of this federation, see `adaptive_clipping`.
      expected_cohort: `m`, above 0; may be traced.
      num_rounds: rounds that were accounted for. After these the update is 0 and nothing is read; default: no end.
      cohort_size: static number of rows that must come, `max_selected` of the selector that was accounted for.

    Returns:
      An `Aggregator` that needs `weights=` and `key=` and reads `mesh=`. Its state is a `MechanismState`. Sums and
      noise are float32 or wider, and rounded to the dtype of the updates last.

    Raises:
      ValueError: if a Python number is out of range (here); when `update` is traced, if `key` or `weights` is missing,
        the updates are a `Mixture` or have no client axis or not `cohort_size` rows, or shapes disagree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = gaussian_mechanism(0.5, max_norm=1.0, expected_cohort=4.0)
      >>> updates = {"a": jnp.array([[3.0, 4.0], [0.5, 0.0]])}
      >>> out, state = rule.update(updates, rule.init(None), weights=jnp.ones(2), key=jax.random.key(0))
      >>> print(out["a"].shape, state.info.noise_std, state.info.fraction_clipped)
      (2,) 0.125 0.5
    """
    check_noise(noise_multiplier)
    check_above_zero("max_norm", max_norm)
    check_above_zero("expected_cohort", expected_cohort)
    check_limits(num_rounds, cohort_size)

    def init(params: PyTree) -> MechanismState:
        del params
        return MechanismState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: MechanismState,
        params: Params | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, MechanismState]:
        check_rows(updates, weights, key, params, **extra_args)
        assert key is not None
        check_cohort_size(updates, cohort_size)
        total, clipped = clipped_sum(updates, weights, max_norm, mesh)
        ok = jnp.ones((), bool) if num_rounds is None else state.num_releases < num_rounds
        noise = gaussian_noise(jax.random.fold_in(key, NOISE_STREAM), total)
        std = jnp.asarray(noise_multiplier, jnp.float32) * jnp.asarray(max_norm, jnp.float32)
        out = release(total, noise, std, expected_cohort, ok, updates)
        info = told(clipped, max_norm, std / jnp.asarray(expected_cohort, jnp.float32), ok)
        return out, MechanismState(state.num_releases + ok.astype(jnp.int32), info)

    return optax.GradientTransformationExtraArgs(init, update)
