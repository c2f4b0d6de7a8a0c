"""The contracts that every kernel keeps.

Shape letters, here and in every docstring: `C` clients in the cohort, `N` clients in the federation, `M` examples that
a client is padded to, `T` local steps, `B` examples per batch, `L` layers, `S` stimuli, `E` pairs of stimuli, `D`
parameters. The client axis is always axis 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import optax

PyTree: TypeAlias = Any
"""Any nest of containers with arrays at its leaves."""

Params: TypeAlias = PyTree
"""Parameters of a model."""


Shared: TypeAlias = PyTree
"""What the server broadcasts."""


class LossFn(Protocol):
    """All that a kernel knows of a model: `loss_fn(params, batch, key) -> scalar`.

    `batch` has the structure of the client's examples with `B` rows on axis 0; the loss is their mean. `key` feeds
    dropout and other noise; a deterministic loss ignores it. A batch never contains padding.
    """

    def __call__(self, params: Params, batch: PyTree, key: jax.Array, /) -> jax.Array:
        """Mean loss of the batch, a scalar."""
        ...


class ClientData(NamedTuple):
    """One client's examples, padded to a static length; with a leading client axis inside a `Cohort`.

    Rows `[0, num_support)` are the support set, rows `[num_support, num_examples)` the query set, the rest is padding
    that no kernel reads. Plain training uses all `num_examples` rows, so that every local update takes the same data.
    """

    examples: PyTree
    """Leaves `[M, ...]`, for example `{"x": [M, ...], "y": [M]}`."""
    num_examples: jax.Array
    """int32 scalar, at least 1 for a client that takes part."""
    num_support: jax.Array
    """int32 scalar between 0 and `num_examples`."""


class Upload(NamedTuple):
    """What one client sends."""

    delta: Shared
    """Pseudo-gradient `shared - shared_after`: any optax optimiser can be the server's; `optax.sgd(1.0)` is FedAvg."""
    mask: PyTree | None = None
    """`None`, or a tree of float32 scalars in [0, 1] shaped like `delta`: 0 where the leaf was left out, 1 where it was
    uploaded, and a fraction where it is to count for that share of the client's weight."""


class LocalUpdate(NamedTuple):
    """One client's work in one round, written for ONE client; `cohort_map` lifts it to the client axis.

    What is broadcast are the model's parameters for most algorithms. Others broadcast more (a control variate, learning
    rates) or less (a part of the model), and some keep a model of its own on each client: `share` and `model` say so.
    """

    init: Callable[[Params], PyTree]
    """`init(params) -> client_state`: what the client keeps between rounds, `()` when nothing."""
    update: Callable[[Shared, PyTree, PyTree, jax.Array], tuple[Upload, PyTree, PyTree]]
    """`update(shared, client_state, data, key) -> (Upload, client_state, info)`; `info` is diagnostics of scalars."""
    share: Callable[[Params], Shared] = lambda params: params
    """`share(params) -> shared`: what the server broadcasts first, made of the model's parameters."""
    model: Callable[[Shared, PyTree], Params] = lambda shared, client_state: shared
    """`model(shared, client_state) -> params`: the model that a client deploys."""


class Cohort(NamedTuple):
    """The clients of one round, leaves `[C, ...]`."""

    data: PyTree
    """Usually a `ClientData` with a leading client axis."""
    weights: jax.Array
    """`[C]` float32, at least 0; 0 marks an absent client (padding)."""
    client_id: jax.Array
    """`[C]` int32; a client's random draws come from `fold_in(key, client_id)`, so order and shards change nothing."""
    state: PyTree = ()
    """The clients' persistent states, stacked."""
    byzantine: jax.Array | None = None
    """`[C]` bool, read by simulated attacks only."""


class ServerState(NamedTuple):
    """What the server needs to go on."""

    params: Shared
    """What is broadcast next: the model's parameters for most algorithms."""
    opt_state: PyTree
    """State of the server's chain of optax transformations."""
    round: jax.Array
    """int32 scalar, rounds done."""


class RoundInfo(NamedTuple):
    """What a round tells; nothing needs it to go on. Scalars and `[C]` vectors, never `[C, D]`."""

    local: PyTree
    """The local update's info, leaves `[C, ...]`."""
    server: tuple[PyTree, ...]
    """The infos of the server's transformations, in the order of the chain."""


class FederatedAlgorithm(NamedTuple):
    """A whole federated algorithm as pure functions: jit it, donate it, scan it over rounds, vmap it over seeds."""

    init: Callable[[Params], ServerState]
    """`init(params) -> ServerState`."""
    step: Callable[[ServerState, Cohort, jax.Array], tuple[ServerState, PyTree, PyTree]]
    """`step(state, cohort, key) -> (state, client_state, info)`, client states and infos stacked `[C, ...]`."""
    init_client: Callable[[Params], PyTree] = lambda params: ()
    """`init_client(params) -> client_state` of one client that never took part."""
    model: Callable[[Shared, PyTree], Params] = lambda shared, client_state: shared
    """`model(state.params, client_state) -> params`: the model that a client deploys."""


Aggregator: TypeAlias = optax.GradientTransformationExtraArgs
"""An optax transformation whose input leaves have the client axis and whose output leaves have not.

`update(updates, state, params=None, *, weights=None, key=None, byzantine=None, mesh=None)`: `weights` is `[C]`, or a
tree shaped like `updates` with `[C]` leaves when layers are masked; 0 means absent. `mesh` is given when the client
axis lies on one. Attacks have the same face but keep the client axis. As all of optax's extra arguments, those that a
transformation does not read must be let through by `**extra_args`.
"""
