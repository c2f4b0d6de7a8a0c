"""The auto-weighted geometric median: clients that lie far from the median lose their say in it.

Reference: Li et al., `Byzantine-Robust Aggregation in Federated Learning Empowered Industrial IoT
<https://doi.org/10.1109/TII.2021.3128164>`_, 2022. The authors' code takes the number of clients for the penalty or 2;
both are lengths, so that what suits depends on the scale of the updates.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.types import Aggregator
from cedarjax.robust.geometric_median import sq_distances_to, weiszfeld
from cedarjax.robust.gram import from_gram
from cedarjax.robust.selection import mean_over, num_present


def shares_by_distance(distances: jax.Array, weights: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """How much say clients at some distances have: `argmin_s sum_i w_i (s_i d_i + penalty s_i^2 / 2)`.

    Subject to `s_i >= 0` and `sum_i w_i s_i = 1`. The solution is `s_i = max(level - d_i, 0) / penalty`, where `level`
    is such that the shares add up to 1.

    Args:
      distances: `[C]`; those of absent clients may be anything.
      weights: `[C]`, how many clients each stands for; 0 = absent.
      penalty: above 0, in units of the distances.

    Returns:
      `[C]`, `w_i s_i`, adding up to 1; zeros if nobody is present.

    Example:
      >>> import jax.numpy as jnp
      >>> print(shares_by_distance(jnp.array([1.0, 2.0, 9.0]), jnp.ones(3), 2.0))
      [0.75 0.25 0.  ]
    """
    present = weights > 0
    weights = jnp.where(present, weights, 0).astype(distances.dtype)
    nearest = jnp.where(present, distances, jnp.inf).min()
    distances = jnp.where(present, distances - jnp.where(present.any(), nearest, 0), 0)  # only differences matter
    order = jnp.argsort(jnp.where(present, distances, jnp.inf))
    sorted_weights = weights[order]
    sorted_distances = distances[order]
    mass, reach = jnp.cumsum(sorted_weights), jnp.cumsum(sorted_weights * sorted_distances)
    levels = (reach + penalty) / jnp.where(mass > 0, mass, 1)
    # The level falls as long as the next client lies below it.
    inside = (levels > sorted_distances) & (sorted_weights > 0)
    level = jnp.where(present.any(), jnp.where(inside, levels, jnp.inf).min(), 0)
    shares = weights * jnp.maximum(level - distances, 0)
    total = shares.sum()
    return shares / jnp.where(total > 0, total, 1)


def autogm(
    penalty: float | None = None, smoothing: float = 1e-6, num_iters: int = 100, num_rounds: int = 10
) -> Aggregator:
    """The auto-weighted geometric median, `argmin_{z, s} sum_i w_i (s_i |x_i - z| + penalty s_i^2 / 2)`.

    Subject to `s_i >= 0` and `sum_i w_i s_i = 1`, with the weights of the clients scaled to a mean of 1. From equal
    shares, `num_rounds` times: `z` is the geometric median with weights `w_i s_i` (see `weiszfeld`), and `s` follows
    from the distances to it (see `shares_by_distance`); last the median with those shares. A penalty much larger than
    the distances gives the geometric median, a small one few clients in the middle.

    It moves along with the updates, and scales along if `penalty` and `smoothing` do.

    Args:
      penalty: how even the shares are, above 0, in units of the updates; default: the number of present clients.
      smoothing: the least distance that counts, above 0, in units of the updates.
      num_iters: steps of Weiszfeld's iteration in each round, at least 1.
      num_rounds: how often the shares are renewed, at least 1.

    Returns:
      An `Aggregator`, see `from_gram` for what it reads and how absent and non-finite clients and masked layers are
      treated. It is defined for any number of clients.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = autogm(penalty=2.0)
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 2.0, 900.0])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(())}))
      >>> print(update["a"].round(3), state.info.coefficients[4])
      2.0 0.0
    """
    for name, value in (("penalty", penalty), ("smoothing", smoothing)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}.")
    for name, value in (("num_iters", num_iters), ("num_rounds", num_rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        n = num_present(weights).astype(gram.dtype)
        even = mean_over(weights > 0, weights).astype(gram.dtype)
        scale = n if penalty is None else jnp.asarray(penalty, gram.dtype)

        def renew(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            shares, coefficients = state
            sq_distances = sq_distances_to(gram, coefficients)
            away = sq_distances > 0
            distances = jnp.where(away, jnp.sqrt(jnp.where(away, sq_distances, 1)), 0)
            shares = shares_by_distance(distances, even * n, scale)
            return shares, weiszfeld(gram, shares, coefficients, smoothing, num_iters)

        start = weiszfeld(gram, even, even, smoothing, num_iters)
        return lax.fori_loop(0, num_rounds, renew, (even, start))[1]

    return from_gram(rule)
