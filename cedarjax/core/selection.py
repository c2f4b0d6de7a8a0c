"""Who takes part in a round: the contract of `cedarjax.select`, and the cohort that a selection names.

A selector is a pair of pure functions with a state, as an optimiser is. Its cohorts have a static size; a place that
nobody fills has weight 0. It sees neither data nor parameters: what it learns from a round is what the round tells.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dataset import FederatedDataset, take_clients
from cedarjax.core.types import Cohort, PyTree


class Selection(NamedTuple):
    """The clients of one round; those present are distinct."""

    client_id: jax.Array
    """`[C]` int32 with static `C`. In a place that nobody fills any id is allowed, and nothing reads it; the selectors
    of `cedarjax.select` write `ABSENT_ID`, which a scatter with `mode="drop"` skips."""
    weights: jax.Array
    """`[C]` float32, at least 0, multiplies the client's weight in the round; 0 = nobody in this place."""


class PoissonSampling(NamedTuple):
    """Every client takes part with one probability, independently of all others and of everything else."""

    probability: float
    """Between 0 and 1."""
    max_selected: int
    """Places `C`; where more are drawn than these, a uniformly random subset of them takes part."""


class FixedSizeSampling(NamedTuple):
    """Every set of so many clients is equally likely, independently of everything else."""

    size: int
    """Clients in a cohort, `C`."""


class Selector(NamedTuple):
    """Client selection as pure functions: jit them, scan them over rounds, vmap them over seeds."""

    init: Callable[[int], PyTree]
    """`init(num_clients) -> state` before the first round, `()` when nothing is kept."""
    select: Callable[[PyTree, jax.Array, jax.Array], tuple[Selection, PyTree]]
    """`select(state, key, available) -> (Selection, state)`; `available` is `[N]` bool, those who may be chosen. Where
    they are too few, places stay empty."""
    observe: Callable[[PyTree, Selection, PyTree], PyTree] = lambda state, selection, info: state
    """`observe(state, selection, info) -> state` after the round; `info` is what `FederatedAlgorithm.step` told, so
    `info.local` for the clients, `[C, ...]`, and `info.server` for what a rule thought of them."""
    sampling: PoissonSampling | FixedSizeSampling | None = None
    """The law of the cohorts where everybody is available, known before the first round: what privacy accounting reads.
    `None` for every other law, and where a part of it is traced; a wrapper that changes the law must not pass it on."""


def take_selection(
    dataset: FederatedDataset,
    selection: Selection,
    *,
    weighting: str = "examples",
    byzantine: jax.Array | None = None,
) -> Cohort:
    """Gathers the selected clients; works inside jit and vmap.

    A client's weight is that of `take_clients` times `selection.weights`. Empty places are absent rows: zeros for data,
    weight 0 and the id `ABSENT_ID`, whatever id the selection had there.

    Args:
      dataset: the federation.
      selection: `C` places.
      weighting: as in `take_clients`.
      byzantine: as in `take_clients`.

    Returns:
      A `Cohort` of `C` rows.

    Raises:
      ValueError: if a shape or `weighting` does not fit.
      TypeError: if the ids are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.data import federated_dataset
      >>> dataset = federated_dataset({"x": jnp.array([1.0, 2.0, 3.0])}, client_id=[0, 0, 1])
      >>> cohort = take_selection(dataset, Selection(jnp.array([1, 0]), jnp.array([0.0, 0.5])))
      >>> cohort.data.examples["x"].tolist(), cohort.weights.tolist()
      ([[0.0, 0.0], [1.0, 2.0]], [0.0, 1.0])
    """
    if jnp.shape(selection.weights) != jnp.shape(selection.client_id):
        raise ValueError(
            f"selection.weights must have the shape of selection.client_id, {jnp.shape(selection.client_id)}, "
            f"got {jnp.shape(selection.weights)}."
        )
    factors = jnp.asarray(selection.weights, jnp.float32)
    present = factors > 0
    cohort = take_clients(dataset, selection.client_id, weighting=weighting, byzantine=byzantine, present=present)
    return cohort._replace(weights=jnp.where(present, cohort.weights * factors, 0.0))
