"""Divide and conquer: without the clients that are most aligned with the direction of most variance.

Reference: Shejwalkar and Houmansadr, `Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
Federated Learning <https://www.ndss-symposium.org/wp-content/uploads/2021-498-paper.pdf>`_, 2021, with the
fraction `c = 1` of their experiments: `f` clients go in each iteration.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.axis import by_layer, num_clients
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.columns import combine_or_median
from cedarjax.robust.gram import from_gram
from cedarjax.robust.presence import read_presence
from cedarjax.robust.rule import Round, RuleInfo, from_round
from cedarjax.robust.sampling import common_gram, distinct_indices, leaf_sizes, sampled_columns, uploaded_columns
from cedarjax.robust.selection import check_enough, check_num_byzantine, lowest, mean_over
from cedarjax.robust.spectral import about, top_eigenpair
from cedarjax.robust.ties import merge_ties


def alignment_scores(gram: jax.Array, present: jax.Array) -> jax.Array:
    """Squared components along the direction of most variance, `<x_i - mean, v>^2`.

    `v` is the first right singular vector of the rows about the mean of the present ones, so the scores are the squared
    entries of the first eigenvector of their inner products, times the eigenvalue.

    Args:
      gram: `[C, C]` inner products about any centre.
      present: `[C]` bool.

    Returns:
      `[C]`, infinite for absent clients.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 5.0])
      >>> print(alignment_scores(x[:, None] * x[None, :], jnp.ones(3, bool)).round(2))
      [4. 1. 9.]
    """
    mean = mean_over(present, present.astype(gram.dtype))
    inner = jnp.where(present[:, None] & present[None, :], about(gram, mean), 0)
    value, vector = top_eigenpair(inner)
    scores = value * jnp.square(vector)
    return jnp.where(present, merge_ties(scores, jnp.broadcast_to(scores.max(), scores.shape)), jnp.inf)


def dnc(f: int, num_iters: int = 1, subsample: int | None = None) -> Aggregator:
    """The mean of the updates that are not among the `f` most aligned with the direction of most variance.

    Each iteration draws `subsample` of the parameters, scores the clients (`alignment_scores`) and drops the `f`
    highest, of equal ones the last; the result is the mean of those whom no iteration dropped. With all parameters
    every iteration is the same. With `f = 0` it is the mean. It moves and scales along with the updates.

    Guarantee: if the attackers' shift along the honest clients' direction of most variance is large, they are the ones
    dropped (Shejwalkar and Houmansadr 2021); there is no bound for all attacks.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients. If only values tell that they are fewer,
        or nobody is left, the result is the coordinate-wise median and `info.ok` is False.
      num_iters: how often parameters are drawn, at least 1.
      subsample: how many are drawn without replacement, at least 1; all of them if `None` or if there are no more. Each
        draw costs `C subsample` numbers in memory and no pass over the updates.

    Returns:
      An `Aggregator`, see `from_gram` for how absent and non-finite clients and masked layers are treated; the mean is
      weighted, the choice is not. With `subsample` it reads `key=`.

    Raises:
      ValueError: if an argument is out of range (here), there are too few clients for `f`, or `key` is missing (when
        `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = dnc(f=1)
      >>> updates = {"a": jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 900.0]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([2., 0.], dtype=float32)}
    """
    check_num_byzantine(f)
    for name, value in (("num_iters", num_iters), ("subsample", subsample)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    needed, condition = 2 * f + 1, "2 * f < num_clients"

    def choice(gram: jax.Array, present: jax.Array) -> jax.Array:
        return lowest(alignment_scores(lax.stop_gradient(gram), present), present.sum(dtype=jnp.int32) - f)

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        return mean_over(choice(gram, weights > 0), weights)

    whole = from_gram(rule, min_clients=needed, condition=condition, f=f)

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        num_params = sum(leaf_sizes(told.updates))
        if subsample is None or subsample >= num_params:
            out, state = whole.update(told.updates, whole.init(None), weights=told.weights, mesh=told.mesh)
            return out, state.info
        if told.key is None:
            raise ValueError(f"key must be given to draw subsample = {subsample} of {num_params} parameters, got None.")
        check_enough(f, num_clients(told.updates), needed, condition)
        layered = by_layer(told.updates, told.weights)
        presence = read_presence(told.updates, told.weights, squared=True)
        good = presence.present
        for i in range(num_iters):
            indices = distinct_indices(jax.random.fold_in(told.key, i), subsample, num_params)
            uploaded = uploaded_columns(told.updates, presence.weights, indices)
            gram = common_gram(sampled_columns(told.updates, indices), uploaded)
            good = good & choice(gram, presence.present)
        coefficients = mean_over(good, presence.clients.astype(gram.dtype))
        defined = good.any() & (presence.present.sum(dtype=jnp.int32) >= needed)
        return combine_or_median(told.updates, presence, coefficients, defined, layered=layered, mesh=told.mesh)

    return from_round(answer)
