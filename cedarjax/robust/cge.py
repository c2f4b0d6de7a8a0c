"""Comparative gradient elimination: the shortest updates.

Reference: Gupta et al., `Byzantine Fault-Tolerant Distributed Machine Learning Using Stochastic Gradient Descent (SGD)
and Norm-Based Comparative Gradient Elimination (CGE) <https://arxiv.org/abs/2008.04699>`_, 2020.
"""

import jax.numpy as jnp

from cedarjax.core.axis import num_clients
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.columns import combine_or_median
from cedarjax.robust.norms import read_norms
from cedarjax.robust.rule import Round, RuleInfo, from_round
from cedarjax.robust.selection import check_enough, check_num_byzantine, lowest, mean_over


def cge(f: int) -> Aggregator:
    """The mean of the `n - f` shortest updates, by Euclidean length over the whole tree; of equal ones the first.

    It bounds what an attacker can send by what honest clients send and needs no distances between clients, but an
    attack that is as short as the others, such as a sign flip, passes. With `f = 0` it is the mean. It scales along
    with the updates but does not move along.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients. If only values tell that they are fewer,
        the result is the coordinate-wise median and `info.ok` is False.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None` for equal weights) and `mesh=`;
      the mean is weighted, the choice is not. Its state is a `RuleState`. Where layers are masked, lengths are those
      over the uploaded ones, scaled to all parameters.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = cge(f=1)
      >>> updates = {"a": jnp.array([[1.0, 0.0], [0.0, 3.0], [500.0, 1.0]])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(2)}))
      >>> print(update, state.info.coefficients)
      {'a': Array([0.5, 1.5], dtype=float32)} [0.5 0.5 0. ]
    """
    check_num_byzantine(f)

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        check_enough(f, num_clients(told.updates), 2 * f + 1, "2 * f < num_clients")
        presence, squares, rows, layered = read_norms(told.updates, told.weights, told.mesh)
        n = presence.present.sum(dtype=jnp.int32)
        chosen = lowest(jnp.where(presence.present, squares, jnp.inf), n - f)
        coefficients = mean_over(chosen & presence.present, presence.clients.astype(squares.dtype))
        return combine_or_median(rows, presence, coefficients, n >= 2 * f + 1, layered=layered, mesh=told.mesh)

    return from_round(answer)
