"""Mimic: attackers copy an honest client, so that what is particular to it is counted many times over.

Reference: Karimireddy et al., `Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing
<https://arxiv.org/abs/2006.09365>`_, 2022. What they send is honest to look at, and yet a rule that leaves out
what is rare leaves out other honest updates for it.

The paper learns the direction in which honest clients differ most by an online power iteration during a warm-up, and
then copies one client for good. This file keeps learning and chooses in every round, because a place on the client axis
is another client in the next round. The published code starts from a random direction; here it is the offset of the
honest update farthest from the mean, so that no key is needed. As in that code, each round's term is scaled to length 1
before it is averaged in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.attacks.collusion import Knowledge, collude, honest_mean, know, send
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.trees import weighted_sum
from cedarjax.core.types import Aggregator, PyTree


class MimicState(NamedTuple):
    """State of `mimic` without a fixed client."""

    direction: PyTree
    """`z`, shaped like the parameters, of length 1; zeros until honest clients have differed."""
    mean: PyTree
    """`mu`, running mean of the honest means."""
    num_rounds: jax.Array
    """int32 scalar, rounds done that had an honest client."""


def _copy_row(known: Knowledge, index: jax.Array) -> PyTree:
    """The honest update in a row, or zeros if the row is not honest."""
    chosen = (jnp.arange(known.honest.shape[0], dtype=jnp.int32) == index) & known.honest
    return weighted_sum(chosen.astype(jnp.float32), known.updates, mesh=known.mesh)


def _dots(known: Knowledge, centre: PyTree | None, vector: PyTree | None) -> jax.Array:
    """`<x_i - centre, vector>` for every honest client, 0 for others; without a vector, `|x_i - centre|^2`."""

    def rows(x: jax.Array, m: jax.Array | None) -> jax.Array:
        return (x if m is None else x - m[None]).reshape(x.shape[0], -1)

    leaves = jax.tree.leaves(known.updates)
    dtype = accumulator(*leaves)
    centres = [None] * len(leaves) if centre is None else jax.tree.leaves(centre)
    if vector is None:
        terms = [jnp.square(rows(x, m)).sum(axis=1) for x, m in zip(leaves, centres, strict=True)]
    else:
        vectors = jax.tree.leaves(vector)
        terms = [(rows(x, m) * v.reshape(1, -1)).sum(axis=1) for x, m, v in zip(leaves, centres, vectors, strict=True)]
    return jnp.where(known.honest, jnp.stack([t.astype(dtype) for t in terms]).sum(axis=0), 0)


def _unit(vector: PyTree) -> PyTree:
    """The vector at length 1, or zeros."""
    leaves = jax.tree.leaves(vector)
    largest = jnp.stack([jnp.abs(x).max(initial=0).astype(accumulator(*leaves)) for x in leaves]).max()
    # Divided by its largest number first, so that no square overflows.
    scaled = jax.tree.map(lambda x: x / jnp.where(largest > 0, largest, 1).astype(x.dtype), vector)
    norm = jnp.sqrt(jnp.stack([jnp.square(x).sum().astype(largest.dtype) for x in jax.tree.leaves(scaled)]).sum())
    return jax.tree.map(lambda x: x / jnp.where(norm > 0, norm, 1).astype(x.dtype), scaled)


def power_step(known: Knowledge, state: MimicState) -> MimicState:
    """One round of the online power iteration for the direction in which honest clients differ most.

    With `t` rounds done, `mu <- (t mu + mean_i x_i) / (t + 1)`, then `v = sum_i (x_i - mu) <x_i - mu, z>` over the
    honest clients, and `z <- t z + v / |v|`, scaled to length 1. As long as `z` is 0, the offset of the honest
    update that is farthest from the mean takes its place.

    Args:
      known: what attackers know.
      state: after the last round.

    Returns:
      The next state; the same one with nobody honest.
    """
    rounds = state.num_rounds
    mean = jax.tree.map(
        lambda mu, x: mu + (x - mu) / (rounds + 1).astype(x.dtype),
        jax.tree.map(lambda mu, x: mu.astype(x.dtype), state.mean, known.updates),
        honest_mean(known),
    )

    def start() -> PyTree:
        # -1 keeps the rows that are not honest from being chosen.
        farthest = jnp.argmax(jnp.where(known.honest, _dots(known, mean, None), -1)).astype(jnp.int32)
        return _unit(jax.tree.map(lambda x, mu: x - mu, _copy_row(known, farthest), mean))

    previous = jax.tree.map(lambda z, x: z.astype(x.dtype), state.direction, known.updates)
    nowhere = jnp.stack([(x == 0).all() for x in jax.tree.leaves(previous)]).all()
    z = jax.lax.cond(nowhere, start, lambda: previous)
    along = _dots(known, mean, z)
    rows = weighted_sum(along, known.updates, mesh=known.mesh)
    v = _unit(jax.tree.map(lambda x, mu: x - along.sum().astype(mu.dtype) * mu, rows, mean))
    z = _unit(jax.tree.map(lambda z, v: rounds.astype(z.dtype) * z + v, z, v))
    new = MimicState(z, mean, rounds + 1)
    return jax.tree.map(lambda a, b: jnp.where(known.honest.any(), a.astype(b.dtype), b), new, state)


def _fixed(client: int) -> Aggregator:
    def plan(known: Knowledge) -> PyTree:
        count = known.honest.shape[0]
        if client >= count:
            raise ValueError(f"client must be smaller than C = {count}, the client axis of updates, got {client}.")
        first = jnp.argmax(known.honest).astype(jnp.int32)
        return _copy_row(known, jnp.where(known.honest[client], client, first))

    return collude(plan)


def mimic(client: int | None = None) -> Aggregator:
    """All attackers send a copy of one honest update.

    Without `client` they copy, in every round, the honest update that goes farthest along `z`, `argmax_i <x_i, z>`,
    where `z` estimates the direction in which honest updates have differed most so far (`power_step`).

    With nobody honest they send zeros.

    Args:
      client: place on the client axis of the client that is copied. Where it is not honest, the first honest one is.
        Default: the choice by `z`.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool), `weights=` and `mesh=`, and
      leaves other rows untouched. Same dtype out as in. Absent and non-finite rows are never read. Its state is a
      `MimicState` of two trees like the parameters, and empty with a fixed client.

    Raises:
      ValueError: if `client` is negative (here), not below `C`, or `byzantine` is missing or client axes disagree (when
        `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = mimic()
      >>> updates = {"a": jnp.array([0.0, 1.0, 5.0, 9.0])}
      >>> state = attack.init({"a": jnp.array(0.0)})
      >>> poisoned, state = attack.update(updates, state, byzantine=jnp.array([False, False, False, True]))
      >>> print(poisoned, state.direction)
      {'a': Array([0., 1., 5., 5.], dtype=float32)} {'a': Array(1., dtype=float32)}
    """
    if client is not None:
        if client < 0:
            raise ValueError(f"client must be at least 0, or None for the direction's choice, got {client}.")
        return _fixed(client)

    def init(params: PyTree) -> MimicState:
        direction, mean = (jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), accumulator(p)), params) for _ in range(2))
        return MimicState(direction, mean, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: MimicState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        byzantine: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, MimicState]:
        del params, extra_args
        updates = dense(updates)
        known = know(updates, weights, byzantine, mesh)
        state = power_step(known, state)
        along = jnp.where(known.honest, _dots(known, None, state.direction), -jnp.inf)
        return send(updates, known.byzantine, _copy_row(known, jnp.argmax(along).astype(jnp.int32))), state

    return optax.GradientTransformationExtraArgs(init, update)
