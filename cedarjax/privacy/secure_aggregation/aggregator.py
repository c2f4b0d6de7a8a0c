"""The sum and the mean of the clients' updates by way of secure aggregation, as aggregators.

What is revealed is the sum; what the server may do above it is what needs no client's row. See `protocol` for the
reference, and for what this simulation leaves out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.axis import num_clients
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.privacy.secure_aggregation.contributions import (
    Contributions,
    Encoding,
    read_contributions,
    sum_contributions,
    uploads_of,
)
from cedarjax.privacy.secure_aggregation.protocol import check_threshold
from cedarjax.privacy.secure_aggregation.sums import Round, make_ring


class SecureInfo(NamedTuple):
    """What a round of secure aggregation tells; a real server would know only `ok` and who survived."""

    ok: jax.Array
    """bool scalar, False if the round was refused because a secret that was needed had too few shares."""
    survived: jax.Array
    """`[C]` bool, clients whose upload came."""
    nonfinite: jax.Array
    """`[C]` bool, clients that count as dropped out because a number of theirs was not finite."""
    num_clipped: jax.Array
    """`[C]` int32, numbers of a survivor beyond the clip."""


class SecureState(NamedTuple):
    """State of `secure_sum` and `secure_mean`."""

    num_refused: jax.Array
    """int32 scalar, rounds refused so far."""
    info: SecureInfo | None = None
    """What the last round tells; `None` after `init`."""


def secure_mean(
    clip: float | jax.Array,
    *,
    num_bits: int = 16,
    max_weight: int = 1,
    threshold: int | None = None,
    num_neighbors: int | None = None,
    stochastic: bool = False,
) -> Aggregator:
    """Mean of the clients' updates of which the server sees nothing but the sum.

    `update_l = sum_i w_il q(x_il) / sum_i w_il` over survivors, where `q` rounds to fixed point, within
    `step / 2 = clip / (2^num_bits - 2)` of each number. Every client masks its integers; the server adds the masked
    uploads and removes the masks that are left. Rows of weight 0 and rows that are not finite dropped out before they
    uploaded. The sum is exact, so who dropped out, the graph and the key (but for stochastic rounding) change no bit.

    The honest way is simulated, not short-cut: a round draws `C k / 2 + C` masks of `D` numbers, and up to as many
    again at the server. That is about a second for 100 clients, all of them neighbours, and 100,000 numbers on two
    cores; `robust.mean` takes a thousandth. To study learning alone, use `robust.mean` on clipped updates.

    Weights are not hidden: they are what the server was told (`Cohort.weights`), multiply the client's integers, and
    must be whole numbers to count exactly. With `max_weight=1` all survivors count the same. A layer that a client
    leaves out (`weights` as a tree) enters the sum as zeros, since masks have to cancel: here layer masks save no byte.

    Args:
      clip: largest size of a number of an update; what lies beyond is moved to it. `privacy.clip_upload(local_update,
        max_norm)` makes sure that nothing does.
      num_bits: `b`, from 2 to 24; `C max_weight (2^b - 1) < 2^32` is required.
      max_weight: `W`, largest weight; a weight is rounded to an integer from 1 to `W`.
      threshold: `t`, shares that tell a secret, and so survivors that are needed (among each client and its
        neighbours), from 2 to `k + 1`; default: a majority of these. Padding counts as dropped out.
      num_neighbors: `k`, clients that a client shares masks with (see `choose_graph`); default: all others.
      stochastic: whether to round at random, right in the mean. Row `i` of the cohort draws from its place, so that the
        order of clients then changes the result within the rounding.

    Returns:
      An `Aggregator` with a `SecureState`. It reads `key=` and `weights=` (`[C]`, a tree of `[C]` leaves, or `None`).
      Same dtype out as in. If too few survive the update is 0 and `info.ok` is False.

    Raises:
      ValueError: if an argument is out of range, there is no `key`, fewer than 2 clients, or the sum could overflow
        (as soon as it is known, at the latest when `update` is traced).
      TypeError: when `update` is traced, if it is given the rows of a pre-aggregator.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> server = optax.chain(secure_mean(clip=8.0), optax.sgd(1.0))
      >>> updates = {"a": jnp.array([[1.0, 2.0], [4.0, 5.0], [jnp.nan, 0.0]])}
      >>> params = {"a": jnp.zeros(2)}
      >>> update, state = jax.jit(server.update)(updates, server.init(params), params, key=jax.random.key(0))
      >>> print(update["a"], state[0].info.nonfinite)
      [-2.5000763 -3.4999847] [False False  True]
    """
    encoding = Encoding(clip, num_bits, max_weight, stochastic)
    return _aggregator(encoding, threshold, num_neighbors, lambda total, weight: total / jnp.maximum(weight, 1))


def secure_sum(
    clip: float | jax.Array,
    *,
    num_bits: int = 16,
    max_weight: int = 1,
    threshold: int | None = None,
    num_neighbors: int | None = None,
    stochastic: bool = False,
) -> Aggregator:
    """Sum of the clients' updates of which the server sees nothing but the sum: `secure_mean` without the division.

    Args:
      clip: as in `secure_mean`.
      num_bits: as in `secure_mean`.
      max_weight: as in `secure_mean`.
      threshold: as in `secure_mean`.
      num_neighbors: as in `secure_mean`.
      stochastic: as in `secure_mean`.

    Returns:
      An `Aggregator` as `secure_mean` is.

    Raises:
      ValueError: as in `secure_mean`.
      TypeError: as in `secure_mean`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = secure_sum(clip=8.0, max_weight=10)
      >>> updates = {"a": jnp.array([1.0, 2.0, 4.0])}
      >>> state, weights = rule.init({"a": jnp.zeros(())}), jnp.array([3.0, 1.0, 0.0])
      >>> update, _ = jax.jit(rule.update)(updates, state, weights=weights, key=jax.random.key(0))
      >>> print(update["a"].round(2))
      5.0
    """
    encoding = Encoding(clip, num_bits, max_weight, stochastic)
    return _aggregator(encoding, threshold, num_neighbors, lambda total, weight: total)


def _aggregator(
    encoding: Encoding,
    threshold: int | None,
    num_neighbors: int | None,
    finish: Callable[[jax.Array, jax.Array], jax.Array],
) -> Aggregator:
    """`finish(total, weight)` of every leaf's sum."""
    encoding.check(1)
    check_options(threshold, num_neighbors)

    def init(params: PyTree) -> SecureState:
        del params
        return SecureState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: SecureState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, SecureState]:
        del params, extra_args
        mask_key, rounding_key = split_key(key)
        updates = uploads_of(updates)
        contributions = read_contributions(updates, weights, encoding)
        count = num_clients(updates)
        encoding.check(count)
        ring = make_ring(count, num_neighbors)
        work = Round.of(ring, check_threshold(ring, threshold), contributions.survived, mask_key)
        sums = sum_contributions(contributions, work, encoding, rounding_key)
        leaves = [finish(t, w.astype(t.dtype)) for t, w in zip(sums.totals, sums.weights, strict=True)]
        refused = (~sums.ok).astype(jnp.int32)
        return in_shape(leaves, updates), SecureState(state.num_refused + refused, tell(contributions, sums.ok))

    return optax.GradientTransformationExtraArgs(init, update)


def check_options(threshold: int | None, num_neighbors: int | None) -> None:
    """Raises for options that no number of clients makes right.

    Args:
      threshold: as in `secure_mean`.
      num_neighbors: as in `secure_mean`.

    Raises:
      ValueError: naming the argument.
    """
    if threshold is not None and threshold < 2:
        raise ValueError(f"threshold must be at least 2, or one share tells a secret, got {threshold}.")
    if num_neighbors is not None and num_neighbors < 1:
        raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}.")


def split_key(key: jax.Array | None) -> jax.Array:
    """Keys of masks and of rounding.

    Args:
      key: the round's.

    Returns:
      `[2]` PRNG keys.

    Raises:
      ValueError: if there is none.
    """
    if key is None:
        raise ValueError("key must be given to draw masks; got None.")
    return jax.random.split(key)


def tell(contributions: Contributions, ok: jax.Array) -> SecureInfo:
    """What a round tells.

    Args:
      contributions: of its clients.
      ok: bool scalar.

    Returns:
      A `SecureInfo`.
    """
    return SecureInfo(ok, contributions.survived, contributions.nonfinite, contributions.num_clipped)


def in_shape(leaves: list[jax.Array], updates: PyTree) -> PyTree:
    """Flat leaves in the shapes and dtypes of the clients' updates.

    Args:
      leaves: `[..., d]` each.
      updates: tree with leaves `[C, ...]`.

    Returns:
      Tree with leaves `[..., ...]`: a client's shape, behind whatever axes the flat leaves have before their last.
    """
    likes, structure = jax.tree.flatten(updates)
    shaped = [
        x.reshape(*x.shape[:-1], *like.shape[1:]).astype(like.dtype) for x, like in zip(leaves, likes, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
