"""Optimised attacks: ALIE and IPM at the strength that moves a known rule farthest from the honest mean.

Reference: Allouah et al., `Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity
<https://arxiv.org/abs/2302.01772>`_, 2023, where a line search finds the strength. Its objective has cliffs, at which a
rule begins to leave the attackers out, and a line search stops at the first one; a grid sees them all, and a second one
between the neighbours of the best strength finds the cliff's edge.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cedarjax.attacks.collusion import Knowledge, honest_mean, honest_std
from cedarjax.attacks.search import Objective, Plan, against, check_strengths
from cedarjax.core.chunks import ChunkSize
from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import Aggregator, PyTree

STRENGTHS = (0.0, *(2.0 ** (k / 2) for k in range(-6, 11)))
"""Strengths tried first: 0, and from 1/8 to 32 in steps of a factor of the square root of 2."""


def _grid(strengths: Sequence[float], mean: PyTree) -> jax.Array:
    return jnp.array(strengths, accumulator(*jax.tree.leaves(mean)))


def optimised_alie(
    rule: Aggregator,
    *,
    strengths: Sequence[float] = STRENGTHS,
    num_refinements: int = 1,
    chunk_size: ChunkSize = 1,
) -> Aggregator:
    """All attackers send `mean + z * std` of the honest updates with the `z` that does most harm.

    `z` maximises `|rule(rows) - mean|`, the distance of what the server will compute from the honest mean, over the
    candidates. The rule is run once for every candidate and once more on what is sent.

    Args:
      rule: the aggregator that follows in the server's chain.
      strengths: candidates for `z`, ascending; negative ones go the other way.
      num_refinements: how often as many candidates again are laid evenly between the neighbours of the best one.
      chunk_size: candidates that are tried at once, as in `cohort_map`: 1 tries one after another and holds one copy of
        the rows, `None` all at once.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool), `weights=`, `key=` and
      `mesh=`, and leaves other rows untouched. Same dtype out as in. Absent and non-finite rows are never read. Its
      state is a `SearchState`: the rule's own, which goes along with the server's, and an info of the strength and the
      distance.

    Raises:
      ValueError: if an option is out of range (here), or `rule` leaves the client axis in place, `byzantine` is missing
        or client axes disagree (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> attack = optimised_alie(cj.robust.mean(), strengths=(0.0, 1.0, 2.0))
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 9.0])}
      >>> poisoned, state = attack.update(
      ...     updates, attack.init({"a": jnp.array(0.0)}), byzantine=jnp.array([False, False, False, True])
      ... )
      >>> print(poisoned, *state.info)
      {'a': Array([1., 2., 3., 4.], dtype=float32)} 2.0 0.5
    """
    check_strengths(strengths, num_refinements)

    def plan(known: Knowledge) -> Plan:
        mean = honest_mean(known)
        return Plan(mean, honest_std(known), _grid(strengths, mean), Objective(mean))

    return against(rule, plan, num_refinements, chunk_size)


def optimised_ipm(
    rule: Aggregator,
    *,
    strengths: Sequence[float] = STRENGTHS,
    num_refinements: int = 1,
    chunk_size: ChunkSize = 1,
) -> Aggregator:
    """All attackers send `-tau * mean` of the honest updates with the `tau` that does most harm.

    `tau` maximises `|rule(rows) - mean|`, as in `optimised_alie`.

    Args:
      rule: the aggregator that follows in the server's chain.
      strengths: candidates for `tau`, ascending.
      num_refinements: as in `optimised_alie`.
      chunk_size: as in `optimised_alie`.

    Returns:
      As `optimised_alie`.

    Raises:
      ValueError: as `optimised_alie`.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> attack = optimised_ipm(cj.robust.mean(), strengths=(0.0, 1.0, 2.0))
      >>> updates = {"a": jnp.array([1.0, 3.0, 9.0])}
      >>> attack.update(updates, attack.init({"a": jnp.array(0.0)}), byzantine=jnp.array([False, False, True]))[0]
      {'a': Array([ 1.,  3., -4.], dtype=float32)}
    """
    check_strengths(strengths, num_refinements)

    def plan(known: Knowledge) -> Plan:
        mean = honest_mean(known)
        against_mean = jax.tree.map(lambda x: -x, mean)
        return Plan(jax.tree.map(jnp.zeros_like, mean), against_mean, _grid(strengths, mean), Objective(mean))

    return against(rule, plan, num_refinements, chunk_size)
