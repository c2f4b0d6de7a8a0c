"""Rules that hand other rows to a rule: what pre-aggregators share.

A pre-aggregator maps `C` rows to `K` rows that are linear combinations of them. They travel as a `Mixture`, so that
nothing is written out and a Gram matrix that is known stays known. Only where layers are masked are the new rows
written, since each layer has coefficients of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.axis import by_layer, claimed_weights, num_clients, tree_structure
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.told import take_info
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.gram import seen
from cedarjax.robust.layers import layered_gram, layered_sq_norms, renormalised
from cedarjax.robust.norms import read_norms
from cedarjax.robust.presence import Presence, read_presence
from cedarjax.robust.rule import RuleInfo


class WrapState(NamedTuple):
    """State of a pre-aggregator."""

    num_nonfinite: jax.Array
    """int32 scalar, uploads left out so far because they were not finite, summed over rounds."""
    rule: PyTree
    """State of the rule inside."""
    info: RuleInfo | None = None
    """What the last round tells of the clients, the rule inside included; `None` after `init`."""


class Mixing(NamedTuple):
    """What a pre-aggregator makes of the rows."""

    matrix: jax.Array
    """`[K, C]`, 0 for rows and columns of absent clients."""
    weights: jax.Array
    """`[K]` weights of the new rows, 0 = absent."""
    ok: jax.Array
    """bool scalar."""


def wrap(
    rule: optax.GradientTransformation,
    mix_fn: Callable[[Presence, jax.Array, jax.Array | None], Mixing],
    *,
    reads: str,
    means: bool,
    check: Callable[[int], None] = lambda num_clients: None,
) -> Aggregator:
    """Lifts a function of inner products or norms to a pre-aggregator.

    Args:
      rule: any aggregator, a chain or another pre-aggregator included.
      mix_fn: `mix_fn(presence, seen, key) -> Mixing`; `seen` is the Gram matrix about a common centre if `reads` is
        `"gram"`, squared lengths if it is `"norms"`, and the weights if it is `"weights"`.
      reads: what `mix_fn` is given.
      means: whether the rows of the matrix add up to 1.
      check: called with `C` when `update` is traced.

    Returns:
      An `Aggregator` with a `WrapState`. It reads `weights=`, `key=` and `mesh=`; further arguments go to `rule`.

    Raises:
      TypeError: if `rule` is not an optax transformation.
    """
    if not isinstance(rule, optax.GradientTransformation):
        raise TypeError(f"rule must be an aggregator such as robust.krum(f), got {type(rule).__name__}.")
    inside = optax.with_extra_args_support(rule)

    def init(params: PyTree) -> WrapState:
        return WrapState(jnp.zeros((), jnp.int32), inside.init(params))

    def update(
        updates: PyTree,
        state: WrapState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        byzantine: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, WrapState]:
        count = num_clients(updates)
        check(count)
        layered = by_layer(updates, weights)
        own_key, rule_key = (None, None) if key is None else jax.random.split(key)
        if layered:
            updates = dense(updates)
            presence = read_presence(updates, weights, squared=True)
            found = {"gram": layered_gram, "norms": layered_sq_norms}.get(reads, lambda *_: presence.clients)
            mixing = mix_fn(presence, found(updates, presence.weights), own_key)
            mixed, new_weights = _layer_by_layer(updates, presence, mixing, means=means)
        else:
            presence, known, rows = _read(updates, claimed_weights(updates, weights), reads, mesh)
            mixing = mix_fn(presence, known, own_key)
            mixed, new_weights = Mixture.of(mixing.matrix, rows, means=means), mixing.weights
        if mixing.matrix.shape[0] == count and byzantine is not None:
            extra_args["byzantine"] = byzantine
        extra_args["mixed"] = True  # no row is one client's own now, which a private mechanism must refuse
        out, rule_state = inside.update(
            mixed, state.rule, params, weights=new_weights, key=rule_key, mesh=mesh, **extra_args
        )
        rule_state, told = take_info(rule_state)
        info = RuleInfo(_of_clients(told, mixing.matrix), presence.nonfinite, mixing.ok & _all_ok(told))
        num_nonfinite = state.num_nonfinite + presence.nonfinite.sum(dtype=jnp.int32)
        return out, WrapState(num_nonfinite, rule_state, info)

    return optax.GradientTransformationExtraArgs(init, update)


def _read(
    updates: PyTree, weights: jax.Array, reads: str, mesh: Mesh | None
) -> tuple[Presence, jax.Array, PyTree | Mixture]:
    """Who is there, what the pre-aggregator asked for, and the rows, with their inner products where they are known."""
    if reads == "gram":
        return seen(updates, weights, mesh)
    if reads == "weights" and isinstance(updates, Mixture):
        presence = read_presence(updates, weights)
        return presence, presence.clients, updates
    presence, squares, rows, _ = read_norms(updates, weights, mesh)
    return presence, presence.clients if reads == "weights" else squares, rows


def _layer_by_layer(updates: PyTree, presence: Presence, mixing: Mixing, *, means: bool) -> tuple[PyTree, PyTree]:
    """The new rows written out, each layer from the clients that uploaded it, and their weights by layer."""

    def of_leaf(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        sent = w > 0
        matrix = jnp.where(sent[None, :], mixing.matrix, 0)
        if means:
            matrix = jax.vmap(lambda row: renormalised(row, w))(mixing.matrix)
        kept = jnp.where(sent.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype)).astype(matrix.dtype)
        rows = jnp.tensordot(matrix, kept, axes=1, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)
        return rows, jnp.where((matrix != 0).any(axis=1), mixing.weights, 0)

    pairs = [of_leaf(*pair) for pair in zip(*map(jax.tree.leaves, (updates, presence.weights)), strict=True)]
    structure = tree_structure(updates)
    rows, weights = zip(*pairs, strict=True)
    return jax.tree.unflatten(structure, rows), jax.tree.unflatten(structure, weights)


def _of_clients(told: tuple[PyTree, ...], matrix: jax.Array) -> jax.Array | None:
    """The coefficients that the rule inside tells, in terms of the clients; `None` if it tells none."""
    for info in told:
        found = getattr(info, "coefficients", None)
        if found is not None and found.shape == matrix.shape[:1]:
            dtype = matrix.dtype
            return jnp.matmul(found.astype(dtype), matrix, precision=jax.lax.Precision.HIGHEST)
    return None


def _all_ok(told: tuple[PyTree, ...]) -> jax.Array:
    flags = [info.ok for info in told if hasattr(info, "ok")]
    return jnp.stack([*flags, jnp.ones((), bool)]).all()
