"""The covariance-bound agnostic filter: clients lose weight by how far they lie along the direction of most variance.

Reference: Allouah et al., `Towards Trustworthy Federated Learning with Untrusted Participants
<https://arxiv.org/abs/2505.01874>`_, 2025. As in the authors' code (ByzFL), weights are measured against the largest
deviation of all clients. A client of weight 0 that lies far out then slows the others' loss of weight down without end;
`max_over="kept"` measures against the clients that have weight left, of which each step removes one. ByzFL estimates
the direction by one step of the power method from a random vector and answers `None` for equal updates; here
the direction is exact, from the `[C, C]` dual, and the answer the mean.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.types import Aggregator
from cedarjax.robust.gram import from_gram
from cedarjax.robust.selection import check_num_byzantine, mean_over, num_present
from cedarjax.robust.spectral import about, top_eigenpair

_HIGHEST = lax.Precision.HIGHEST
_WORK = 100_000  # steps times clients, at most


def caf_coefficients(
    gram: jax.Array, weights: jax.Array, f: int, *, max_over: Literal["all", "kept"] = "all"
) -> jax.Array:
    """Coefficients of the filtered mean.

    From `c_i = 1`, while `sum_i c_i > n - 2 f`: the mean `m` and the covariance with weights `c_i w_i`, its greatest
    eigenvalue and direction `v`, deviations `t_i = <x_i - m, v>^2`, and `c_i <- c_i (1 - t_i / max_j t_j)`. The answer
    is the mean whose covariance had the least greatest eigenvalue.

    Args:
      gram: `[C, C]` inner products about any centre.
      weights: `[C]`; clients of weight 0 are absent. The others count `c_i` in the condition whatever their weight.
      f: number of attackers.
      max_over: the clients `j`: `"all"`, or those `"kept"`, of which `c_j` is not 0 yet.

    Returns:
      `[C]` in the dtype of `gram`, adding up to 1; zeros if nobody is present. At most `100,000 / C` steps are taken.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 2.0, 1.0, 99.0])
      >>> print(caf_coefficients(x[:, None] * x[None, :], jnp.ones(5), 1).round(2))
      [0.19 0.31 0.19 0.31 0.  ]
    """
    present = weights > 0
    both = present[:, None] & present[None, :]
    largest = jnp.where(present, jnp.diagonal(gram), 0).max()
    gram = jnp.where(both, gram, 0) / jnp.where(largest > 0, largest, 1)
    shares = mean_over(present, weights).astype(gram.dtype)
    n = num_present(weights)
    # Two that lie equally far out leave with the same step, up to rounding.
    enough = (n - 2 * f).astype(gram.dtype) + 16 * jnp.finfo(gram.dtype).eps * n.astype(gram.dtype)

    def goes_on(state: tuple) -> jax.Array:
        kept, _, _, moving, num_steps = state
        return moving & (kept.sum() > enough) & (num_steps < _WORK // weights.size + 1)

    def step(state: tuple) -> tuple:
        kept, best, least, _, num_steps = state
        mean = kept * shares
        mean = mean / mean.sum()
        inner, roots = about(gram, mean), jnp.sqrt(mean)
        value, vector = top_eigenpair(inner * roots[:, None] * roots[None, :])
        better = value < least
        along = jnp.matmul(inner, roots * vector, precision=_HIGHEST)
        deviations = jnp.where(present if max_over == "all" else kept > 0, jnp.square(along), 0)
        farthest = deviations.max()
        left = kept * jnp.maximum(1 - deviations / jnp.where(farthest > 0, farthest, 1), 0)
        # Nobody stays by a rounding.
        left = jnp.where(deviations >= farthest * (1 - 16 * jnp.finfo(gram.dtype).eps), 0, left)
        moving = (farthest > 0) & (left.sum() < kept.sum())
        return left, jnp.where(better, mean, best), jnp.where(better, value, least), moving, num_steps + 1

    infinity = jnp.asarray(jnp.inf, gram.dtype)
    start = (present.astype(gram.dtype), shares, infinity, jnp.ones((), bool), jnp.zeros((), jnp.int32))
    return lax.while_loop(goes_on, step, start)[1]


def caf(f: int, *, max_over: Literal["all", "kept"] = "all") -> Aggregator:
    """The mean of the updates, weighted down along directions of large variance, see `caf_coefficients`.

    Guarantee: `(f, kappa)`-robust with `kappa` of order `f / n` with respect to the largest eigenvalue of the honest
    covariance, which need not be known, for `f` well below `n / 2` (Allouah et al. 2025). With `f = 0`, or equal
    updates, it is the mean. It moves and scales along with the updates. Gradients take the coefficients as given.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients.
      max_over: what a client's deviation is measured against: the largest of `"all"` clients, as published, or of those
        `"kept"`, which takes at most `n` steps however far out a removed client lies.

    Returns:
      An `Aggregator`, see `from_gram` for what it reads, how absent and non-finite clients and masked layers are
      treated, and what it falls back to. Weights of clients multiply those of the filter.

    Raises:
      ValueError: if `f` is negative or `max_over` is neither (here), or there are too few clients (when `update` is
        traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = caf(f=1)
      >>> updates = {"a": jnp.array([0.0, 1.0, 2.0, 1.0, 99.0])}
      >>> update, _ = rule.update(updates, rule.init({"a": jnp.zeros(())}))
      >>> print(update["a"].round(2))
      1.0
    """
    check_num_byzantine(f)
    if max_over not in ("all", "kept"):
        raise ValueError(f"max_over must be 'all' or 'kept', got {max_over!r}.")

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        gram, weights = lax.stop_gradient((gram, weights))
        return caf_coefficients(gram, weights, f, max_over=max_over)

    return from_gram(rule, min_clients=2 * f + 1, condition="2 * f < num_clients", f=f)
