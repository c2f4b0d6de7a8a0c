"""The mean of updates that are clipped to a length.

Reference: Sun et al., `Can You Really Backdoor Federated Learning? <https://arxiv.org/abs/1911.07963>`_, 2019.
"""

import jax

from cedarjax.core.trees import weighted_sum
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.clip import clip_factors
from cedarjax.robust.norms import read_norms
from cedarjax.robust.rule import Round, RuleInfo, from_round
from cedarjax.robust.selection import mean_over


def norm_clip(max_norm: float) -> Aggregator:
    """The weighted mean of `x_i min(1, max_norm / |x_i|)`, with Euclidean lengths over the whole tree.

    Guarantee: a client of share `w_i / sum_j w_j` moves the result by no more than that share of `2 max_norm`; nobody
    is left out. Updates of zeros stay what they are. Where layers are masked, lengths are those over the uploaded ones,
    scaled to all parameters, and each layer is averaged over those who uploaded it. It neither moves nor scales along
    with the updates.

    Args:
      max_norm: the greatest length, above 0, in units of the updates.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None` for equal weights) and `mesh=`.
      Its state is a `RuleState`. It is differentiable, at updates of zeros too.

    Raises:
      ValueError: if `max_norm` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = norm_clip(1.0)
      >>> updates = {"a": jnp.array([[0.5, 0.0], [0.0, 4.0]])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(2)}))
      >>> print(update, state.info.coefficients)
      {'a': Array([0.25, 0.5 ], dtype=float32)} [0.5   0.125]
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}.")

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        presence, squares, rows, _ = read_norms(told.updates, told.weights, told.mesh)
        factors = clip_factors(squares, float(max_norm) ** 2)

        def clipped(w: jax.Array) -> jax.Array:
            return mean_over(presence.present, w.astype(factors.dtype)) * factors

        out = weighted_sum(jax.tree.map(clipped, presence.weights), rows, mesh=told.mesh)
        return out, RuleInfo(clipped(presence.clients), presence.nonfinite, presence.present.any())

    return from_round(answer)
