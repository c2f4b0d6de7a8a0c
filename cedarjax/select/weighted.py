"""Weighted sampling without replacement, all places at once, by the Gumbel top-k trick.

References:
  Efraimidis, Spirakis, `Weighted random sampling with a reservoir <https://doi.org/10.1016/j.ipl.2005.11.003>`_, 2006:
  the largest of `u_i^(1 / w_i)` are a successive sample.

  Kool, van Hoof, Welling, `Stochastic Beams and Where to Find Them <https://arxiv.org/abs/1903.06059>`_, 2019: the same
  as the largest of `log w_i` plus Gumbel noise.

The noise of the chosen lies in the upper tail, where float32 noise from 23 random bits has gaps: among 100,000 clients
many of the best would tie. Here it is made of 32 bits in such a way that the tail is the finest part.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cedarjax.core.batches import check_positive
from cedarjax.core.selection import Selection, Selector
from cedarjax.select.places import check_per_client, highest


def open_uniform(key: jax.Array, num_draws: int) -> jax.Array:
    """Numbers strictly between 0 and 1, finest near 0.

    Args:
      key: PRNG key.
      num_draws: how many.

    Returns:
      `[num_draws]` float32: multiples of 2^-32 near 0, of 2^-24 near 1.

    Example:
      >>> import jax
      >>> draws = open_uniform(jax.random.key(0), 1000)
      >>> bool((0 < draws.min()) & (draws.max() < 1))
      True
    """
    bits = jax.random.bits(key, (num_draws,), jnp.uint32).astype(jnp.float32)
    return jnp.minimum((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)


def gumbel_scores(key: jax.Array, weights: jax.Array) -> jax.Array:
    """`log w_i + G_i` with independent standard Gumbel noise: in falling order, a successive sample.

    That is: the client of highest score is `i` with probability `w_i / sum_j w_j`, the next one is drawn like this from
    the others, and so on.

    Args:
      key: PRNG key.
      weights: `[N]`, finite; a client whose weight is not positive scores minus infinity.

    Returns:
      `[N]` float32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(jnp.isfinite(gumbel_scores(jax.random.key(0), jnp.array([2.0, 0.0, 1.0]))))
      [ True False  True]
    """
    possible = weights > 0
    # Minus the logarithm of an exponential variable is a Gumbel variable; `log1p` keeps the digits of small draws.
    noise = -jnp.log(-jnp.log1p(-open_uniform(key, weights.shape[0])))
    return jnp.where(possible, jnp.log(jnp.where(possible, weights, 1).astype(jnp.float32)) + noise, -jnp.inf)


def weighted(num_selected: int, weights: ArrayLike) -> Selector:
    """Successive sampling without replacement, each draw in proportion to `weights`.

    `P(i first) = w_i / sum_j w_j`; then from those left in the same way. The chance to be in the cohort at all is *not*
    proportional to the weight unless `num_selected` is 1. Drawn by data size, clients are usually averaged with
    `weighting="uniform"`: by examples, size would count twice.

    Args:
      num_selected: static size `C` of the cohort, between 1 and `N`.
      weights: `[N]`, finite, of any scale; may be traced. A client whose weight is not positive is never chosen.

    Returns:
      A `Selector` without state, with weights 1; the last places are empty where too few can be chosen.

    Raises:
      ValueError: if `num_selected` is out of range or `weights` has not the shape `[N]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> selector = weighted(2, jnp.array([1.0, 0.0, 3.0]))
      >>> selection, _ = selector.select((), jax.random.key(0), jnp.ones(3, bool))
      >>> print(jnp.sort(selection.client_id))
      [0 2]
    """
    check_positive(num_selected=num_selected)

    def select(state: tuple[()], key: jax.Array, available: jax.Array) -> tuple[Selection, tuple[()]]:
        w = jnp.asarray(weights, jnp.float32)
        check_per_client("weights", w, available.shape[0])
        return highest(gumbel_scores(key, w), available, num_selected), state

    return Selector(lambda num_clients: (), select)
