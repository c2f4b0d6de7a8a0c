"""FLTrust: clients are trusted as far as they point where the server's own update points.

Reference: Cao et al., `FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping
<https://arxiv.org/abs/2012.13995>`_, 2021.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.core.trees import inner_with
from cedarjax.core.types import Aggregator, Params, PyTree
from cedarjax.robust.norms import read_norms
from cedarjax.robust.rule import Round, RuleInfo, combine, from_round
from cedarjax.robust.selection import num_present


def trust_scores(products: jax.Array, sq_norms: jax.Array, own_sq_norm: jax.Array) -> jax.Array:
    """`max(0, cos(x_i, g))` from inner products; 0 for a vector of length 0.

    Args:
      products: `[C]` inner products with the server's update.
      sq_norms: `[C]` squared lengths.
      own_sq_norm: scalar, squared length of the server's update.

    Returns:
      `[C]` in `[0, 1]`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(trust_scores(jnp.array([3.0, -1.0, 0.0]), jnp.array([9.0, 1.0, 0.0]), jnp.array(4.0)))
      [0.5 0.  0. ]
    """
    lengths = jnp.sqrt(jnp.where(sq_norms > 0, sq_norms, 1)) * jnp.sqrt(jnp.where(own_sq_norm > 0, own_sq_norm, 1))
    cosines = jnp.where((sq_norms > 0) & (own_sq_norm > 0), products / lengths, 0)
    return jnp.clip(cosines, 0, 1)


def fltrust(server_update: Params | Callable[[Params], Params]) -> Aggregator:
    """The mean of the updates, rescaled to the length of the server's own and weighted by trust.

    `sum_i w_i t_i x_i |g| / |x_i| / sum_i w_i t_i` with `t_i = max(0, cos(x_i, g))`. If nobody is trusted the update is
    0 and `info.ok` is False.

    Guarantee: with a clean root data set the model stays within a bound of the optimum for any number of attackers (Cao
    et al. 2021). All rests on `g`: it must point where honest clients do. It turns neither into the mean for `f = 0`
    nor moves along with the updates.

    Args:
      server_update: the server's pseudo-gradient `g` on data of its own, a tree like the parameters, or a function
        `params -> g` that is called in every round.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None`) and `mesh=`, and `params` if
      `server_update` is a function. Its state is a `RuleState`. Where layers are masked, cosines and lengths are over
      the uploaded layers.

    Raises:
      ValueError: when `update` is traced, if `params` is missing for a function, or client axes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = fltrust({"a": jnp.array([1.0, 0.0])})
      >>> updates = {"a": jnp.array([[4.0, 0.0], [0.0, 9.0], [-9.0, 0.0]])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(2)}))
      >>> print(update, state.info.coefficients)
      {'a': Array([1., 0.], dtype=float32)} [0.25 0.   0.  ]
    """

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        own = server_update
        if callable(own):
            if told.params is None:
                raise ValueError("params must be given for a server_update that is a function; got None.")
            own = own(told.params)
        presence, squares, updates, layered = read_norms(told.updates, told.weights, told.mesh)
        if layered:
            pairs = zip(*map(jax.tree.leaves, (updates, own, presence.weights)), strict=True)
            products = functools.reduce(jnp.add, [jnp.where(w > 0, inner_with(x, g), 0) for x, g, w in pairs])
            sent = [(w > 0).astype(products.dtype) for w in jax.tree.leaves(presence.weights)]
            lengths = [jnp.square(g.astype(accumulator(g))).sum() for g in jax.tree.leaves(own)]
            own_square = sum(u * s for u, s in zip(sent, lengths, strict=True))
            sizes = [g.size for g in jax.tree.leaves(own)]
            squares = squares * (sum(u * size for u, size in zip(sent, sizes, strict=True)) / sum(sizes))
        else:
            products = inner_with(updates, own)
            own_square = sum(jnp.square(g.astype(accumulator(g))).sum() for g in jax.tree.leaves(own))
            own_square = jnp.broadcast_to(own_square, squares.shape)
        own_square = own_square.astype(squares.dtype)
        kept = jnp.where(presence.present, presence.clients, 0).astype(squares.dtype)
        trust = kept * trust_scores(jnp.where(presence.present, products, 0), squares, own_square)
        total = trust.sum()
        rescaled = jnp.sqrt(own_square / jnp.where(squares > 0, squares, 1))
        coefficients = jnp.where(total > 0, trust / jnp.where(total > 0, total, 1) * rescaled, 0)
        info = RuleInfo(coefficients, presence.nonfinite, (num_present(kept) > 0) & (total > 0))
        return combine(updates, presence, coefficients, layered=layered, mesh=told.mesh), info

    return from_round(answer)
