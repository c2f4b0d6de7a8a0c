"""Smallest-maximum-eigenvalue averaging: the `n - f` updates that vary least along any direction.

Reference: Allouah et al., `On the Privacy-Robustness-Utility Trilemma in Distributed Learning
<https://arxiv.org/abs/2302.04787>`_, 2023. ByzFL estimates eigenvalues by one step of the power method from a random
vector; here they are exact.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.types import Aggregator
from cedarjax.robust.gram import from_gram
from cedarjax.robust.selection import check_num_byzantine, mean_over
from cedarjax.robust.spectral import top_eigenpair

_HIGHEST = lax.Precision.HIGHEST
_MAX_SUBSETS = 100_000
_BLOCK = 2**18


def subset_without(rank: jax.Array, num_clients: int, f: int) -> jax.Array:
    """The subset of all but `f` clients that comes at some place in the order of `itertools.combinations`.

    Args:
      rank: int32 scalar, from 0.
      num_clients: `C`.
      f: how many are left out.

    Returns:
      `[C]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> [subset_without(jnp.int32(i), 3, 1).tolist() for i in range(3)]
      [[True, True, False], [True, False, True], [False, True, True]]
    """
    # Those left out, counted from behind, in the combinatorial number system.
    kept = jnp.ones(num_clients, bool)
    clients = jnp.arange(num_clients, dtype=jnp.int32)
    for size in range(f, 0, -1):
        below = jnp.array([min(math.comb(c, size), 2**31 - 1) for c in range(num_clients)], jnp.int32)
        place = (below <= rank).sum(dtype=jnp.int32) - 1
        rank = rank - below[place]
        kept = kept & (clients != num_clients - 1 - place)
    return kept


def least_eigenvalue(gram: jax.Array, present: jax.Array, f: int) -> jax.Array:
    """The subset of all but `f` present clients whose covariance has the least greatest eigenvalue.

    Args:
      gram: `[C, C]` inner products about any centre.
      present: `[C]` bool, of more than `f`.
      f: how many are left out.

    Returns:
      `[C]` bool; of subsets whose eigenvalues differ by no more than rounding the first in the order of
      `itertools.combinations`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 9.0, 1.0, 2.0])
      >>> least_eigenvalue(x[:, None] * x[None, :], jnp.ones(4, bool), 1).tolist()
      [True, False, True, True]
    """
    count = present.size
    num_subsets = math.comb(count, f)
    gram = jnp.where(present[:, None] & present[None, :], gram, 0)
    size = jnp.maximum(present.sum(dtype=jnp.int32) - f, 1)

    def spread(rank: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The greatest eigenvalue, infinite if somebody who is left out is not there, and what rounding may add."""
        kept = subset_without(rank, count, f)
        chosen = kept & present
        mean = chosen.astype(gram.dtype) / size.astype(gram.dtype)
        moved = gram - jnp.matmul(mean, gram, precision=_HIGHEST)[None, :]
        inner = moved - jnp.matmul(moved, mean, precision=_HIGHEST)[:, None]
        inner = jnp.where(chosen[:, None] & chosen[None, :], inner, 0)
        value, _ = top_eigenpair(inner)
        rounding = 16 * jnp.finfo(gram.dtype).eps * jnp.where(chosen, jnp.diagonal(gram), 0).max()
        return jnp.where((kept | present).all(), value, jnp.inf), rounding

    batch_size = min(num_subsets, max(1, _BLOCK // count**2))
    values, rounding = lax.map(spread, jnp.arange(num_subsets, dtype=jnp.int32), batch_size=batch_size)
    first = jnp.argmax(values - rounding <= values.min())
    return subset_without(first.astype(jnp.int32), count, f) & present


def smea(f: int) -> Aggregator:
    """The mean of the `n - f` updates whose covariance has the least greatest eigenvalue, exact over all subsets.

    Guarantee: `(f, kappa)`-robust with respect to the greatest eigenvalue of the honest covariance, with
    `kappa <= 4 f / (n - f) (1 + f / (n - 2 f))^2` (Allouah et al. 2023). With `f = 0` it is the mean. It moves and
    scales along with the updates. Each of the `C! / (f! (C - f)!)` subsets takes the greatest eigenvalue of a `[C, C]`
    matrix, so it is for small cohorts: 4,845 subsets for 20 clients and 4 attackers.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients.

    Returns:
      An `Aggregator`, see `from_gram` for what it reads, how absent and non-finite clients and masked layers are
      treated, and what it falls back to; the mean is weighted, the choice is not.

    Raises:
      ValueError: if `f` is negative (here), there are too few clients for it, or there are more than 100,000 subsets
        (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = smea(f=1)
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 900.0])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(())}))[0])
      {'a': Array(2., dtype=float32)}
    """
    check_num_byzantine(f)

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        num_subsets = math.comb(weights.size, f)
        if num_subsets > _MAX_SUBSETS:
            raise ValueError(
                f"f must leave at most {_MAX_SUBSETS} subsets of num_clients - f clients, got f = {f} and "
                f"num_clients = {weights.size}, which make {num_subsets}."
            )
        present = weights > 0
        return mean_over(least_eigenvalue(lax.stop_gradient(gram), present, f), weights)

    return from_gram(rule, min_clients=2 * f + 1, condition="2 * f < num_clients", f=f)
