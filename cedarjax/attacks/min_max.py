"""Min-max and min-sum: attackers go as far along a direction as distances between honest updates allow.

Reference: Shejwalkar and Houmansadr, `Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
Federated Learning <https://doi.org/10.14722/ndss.2021.24498>`_, 2021. What the paper searches by halving has closed
forms. For min-sum the paper bounds the attackers' sum of squared distances by the largest of the honest clients'; its
code takes the smallest, and so does this file, as the results that are published come from there.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cedarjax.attacks.collusion import Knowledge, collude, honest_mean, honest_std, step
from cedarjax.core.dtypes import accumulator
from cedarjax.core.inner import centered_gram
from cedarjax.core.types import Aggregator, PyTree

Direction = Literal["unit", "sign", "std"]


def _dot(a: PyTree, b: PyTree, dtype: jnp.dtype) -> jax.Array:
    terms = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST).astype(dtype), a, b)
    return jnp.stack(jax.tree.leaves(terms)).sum()


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b` where `b` is positive and the ratio finite, else 0."""
    ratio = jnp.where(b > 0, a, 0) / jnp.where(b > 0, b, 1)
    return jnp.where(jnp.isfinite(ratio), ratio, 0)


def perturbation(known: Knowledge, mean: PyTree, direction: Direction) -> PyTree:
    """Direction in which attackers leave the honest mean, against it: `-mean / |mean|`, `-sign(mean)` or `-std`.

    Args:
      known: what attackers know.
      mean: the honest mean, leaves `[...]`.
      direction: `"unit"`, `"sign"` or `"std"`.

    Returns:
      Leaves `[...]`; zeros where `mean` is, for the first two.
    """
    if direction == "sign":
        return jax.tree.map(lambda x: -jnp.sign(x), mean)
    if direction == "std":
        return jax.tree.map(lambda x: -x, honest_std(known))
    norm = jnp.sqrt(_dot(mean, mean, accumulator(*jax.tree.leaves(mean))))
    return jax.tree.map(lambda x: x * -_ratio(jnp.ones_like(norm), norm).astype(x.dtype), mean)


def _projections(known: Knowledge, mean: PyTree, direction: PyTree, dtype: jnp.dtype) -> jax.Array:
    """`<mean - x_i, direction>` of every honest client, `[C]`."""

    def leaf(x: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
        # One fused pass over the rows: no centred copy of the updates.
        return ((m[None] - x) * d[None]).reshape(x.shape[0], -1).sum(axis=1).astype(dtype)

    terms = jax.tree.leaves(jax.tree.map(leaf, known.updates, mean, direction))
    return jnp.where(known.honest, jnp.stack(terms).sum(axis=0), 0)


def honest_distances(known: Knowledge) -> tuple[jax.Array, jax.Array]:
    """Squared distances of the honest updates from their mean and from each other.

    Args:
      known: what attackers know.

    Returns:
      `[C]` and `[C, C]`, 0 for rows that are not honest.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.attacks.collusion import know
      >>> known = know({"a": jnp.array([1.0, 3.0, 7.0])}, None, jnp.array([False, False, True]))
      >>> from_mean, between = honest_distances(known)
      >>> print(from_mean, between[0])
      [1. 1. 0.] [0. 4. 0.]
    """
    gram = centered_gram(known.updates, known.honest, mesh=known.mesh)
    pairs = known.honest[:, None] & known.honest[None, :]
    count = jnp.maximum(known.num_honest, 1).astype(gram.dtype)
    # The centre of the Gram matrix is near the mean, and the mean only where no client lies far out.
    to_mean = gram.sum(axis=1) / count
    squares = jnp.diagonal(gram)
    from_mean = jnp.where(known.honest, squares - 2 * to_mean + to_mean.sum() / count, 0)
    between = jnp.where(pairs, squares[:, None] + squares[None, :] - 2 * gram, 0)
    return jnp.maximum(from_mean, 0), jnp.maximum(between, 0)


def min_max_strength(length: jax.Array, projections: jax.Array, from_mean: jax.Array, bound: jax.Array) -> jax.Array:
    """Largest `gamma` for which `mean + gamma * p` is within the bound of every honest update.

    `min_i (-b_i + sqrt(b_i^2 - a (c_i - T))) / a`, the root of `a gamma^2 + 2 b_i gamma + c_i = T`.

    Args:
      length: `a = |p|^2`.
      projections: `[B]` `b_i = <p, mean - x_i>`.
      from_mean: `[B]` `c_i = |mean - x_i|^2`; `inf` for rows that do not count.
      bound: `T`, at least every `c_i` that counts.

    Returns:
      Scalar, 0 where `a` is 0 or nothing counts.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([-1.0, 0.0, 1.0])
      >>> print(min_max_strength(jnp.float32(1.0), 0.0 - x, x**2, jnp.float32(4.0)))
      1.0
    """
    counts = jnp.isfinite(from_mean)
    slack = jnp.where(counts, jnp.maximum(bound - from_mean, 0), 0)
    root = jnp.sqrt(jnp.square(projections) + length * slack)
    # Whichever of the two forms of the root does not cancel.
    far = _each(slack, root + projections, projections > 0)
    near = _each(root - projections, jnp.broadcast_to(length, root.shape), projections <= 0)
    reach = jnp.where(counts, jnp.where(projections > 0, far, near), jnp.inf).min()
    return jnp.where((length > 0) & jnp.isfinite(reach), reach, 0)


def _each(a: jax.Array, b: jax.Array, chosen: jax.Array) -> jax.Array:
    """`a / b` where chosen, with nothing divided by 0."""
    safe = chosen & (b > 0)
    return jnp.where(safe, a, 0) / jnp.where(safe, b, 1)


def min_sum_strength(length: jax.Array, from_mean: jax.Array) -> jax.Array:
    """Largest `gamma` for which the squared distances to all honest updates add up to no more than an honest client's.

    `sqrt(min_i c_i / a)`: with `N` honest updates the attackers' sum is `N a gamma^2 + sum_j c_j`, that of honest
    client `i` is `N c_i + sum_j c_j`, and the least of them is the bound.

    Args:
      length: `a = |p|^2`.
      from_mean: `[B]` `c_i = |mean - x_i|^2`; `inf` for rows that do not count.

    Returns:
      Scalar, 0 where `a` is 0 or nothing counts.

    Example:
      >>> import jax.numpy as jnp
      >>> print(min_sum_strength(jnp.float32(4.0), jnp.array([9.0, 1.0, jnp.inf])))
      0.5
    """
    return jnp.sqrt(_ratio(from_mean.min(), length))


def _check_direction(direction: str) -> None:
    if direction not in get_args(Direction):
        raise ValueError(f"direction must be one of {get_args(Direction)}, got {direction!r}.")


def min_max(direction: Direction) -> Aggregator:
    """All attackers send `mean + gamma p`, no farther from any honest update than two honest ones are from each other.

    `gamma` is the largest with `max_i |mean + gamma p - x_i|^2 <= max_ij |x_i - x_j|^2`. With fewer than two honest
    clients, or where `p` is 0, they send the honest mean; with none, zeros.

    Args:
      direction: `p`: `"unit"` for `-mean / |mean|`, `"sign"` for `-sign(mean)`, `"std"` for the negative standard
        deviation of every coordinate (`|B| - 1` in the denominator, as in the published code).

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool), `weights=` and `mesh=`, and
      leaves other rows untouched. Same dtype out as in. Absent and non-finite rows are never read.

    Raises:
      ValueError: if `direction` is none of these (here), or `byzantine` is missing or client axes disagree (when
        `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = min_max("unit")
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 9.0])}
      >>> attack.update(updates, attack.init(None), byzantine=jnp.array([False, False, False, True]))[0]
      {'a': Array([1., 2., 3., 1.], dtype=float32)}
    """
    _check_direction(direction)

    def plan(known: Knowledge) -> PyTree:
        mean = honest_mean(known)
        p = perturbation(known, mean, direction)
        from_mean, between = honest_distances(known)
        counted = jnp.where(known.honest, from_mean, jnp.inf)
        projections = _projections(known, mean, p, from_mean.dtype)
        gamma = min_max_strength(_dot(p, p, from_mean.dtype), projections, counted, between.max())
        return step(mean, gamma, p)

    return collude(plan)


def min_sum(direction: Direction) -> Aggregator:
    """All attackers send `mean + gamma p`, whose squared distances to the honest updates add up to no more than theirs.

    `gamma` is the largest with `sum_i |mean + gamma p - x_i|^2 <= min_i sum_j |x_i - x_j|^2`. Where `p` is 0, or an
    honest update is the mean itself, they send the honest mean; with nobody honest, zeros.

    Args:
      direction: as in `min_max`.

    Returns:
      As `min_max`.

    Raises:
      ValueError: as `min_max`.

    Example:
      >>> import jax.numpy as jnp
      >>> attack = min_sum("sign")
      >>> updates = {"a": jnp.array([1.0, 2.0, 6.0, 9.0])}
      >>> attack.update(updates, attack.init(None), byzantine=jnp.array([False, False, False, True]))[0]
      {'a': Array([1., 2., 6., 2.], dtype=float32)}
    """
    _check_direction(direction)

    def plan(known: Knowledge) -> PyTree:
        mean = honest_mean(known)
        p = perturbation(known, mean, direction)
        from_mean, _ = honest_distances(known)
        counted = jnp.where(known.honest, from_mean, jnp.inf)
        return step(mean, min_sum_strength(_dot(p, p, from_mean.dtype), counted), p)

    return collude(plan)
