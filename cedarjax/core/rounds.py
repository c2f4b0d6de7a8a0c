"""One federated round: the one place where local updates, the client axis and the server meet."""

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.cohort import MapFn, cohort_map
from cedarjax.core.names import leaf_names
from cedarjax.core.told import take_info
from cedarjax.core.types import Cohort, FederatedAlgorithm, LocalUpdate, Params, PyTree, RoundInfo, ServerState


def check_cohort(cohort: Cohort) -> int:
    """Checks that all parts of a cohort agree on the client axis.

    Args:
      cohort: the cohort.

    Returns:
      `C`, the number of clients.

    Raises:
      ValueError: naming the part that disagrees, its shape and what was expected.
    """
    if jnp.ndim(cohort.weights) != 1 or cohort.weights.shape[0] < 1:
        raise ValueError(f"cohort.weights must be [C] with C >= 1, got the shape {jnp.shape(cohort.weights)}.")
    count = cohort.weights.shape[0]
    for name, leaf in zip(leaf_names(cohort._asdict()), jax.tree.leaves(cohort._asdict()), strict=True):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != count:
            raise ValueError(
                f"cohort.{name.replace('/', '.')} must have the client axis of cohort.weights, {count}, on axis 0, "
                f"got the shape {jnp.shape(leaf)}."
            )
    return count


def client_keys(key: jax.Array, client_id: jax.Array) -> jax.Array:
    """One key per client, `fold_in(key, client_id)`: order, chunks and shards never change a client's draws.

    Args:
      key: PRNG key of the round.
      client_id: `[C]` int32.

    Returns:
      `[C]` keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(client_id)


def keep_absent(weights: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new rows of present clients, the old rows of clients of weight 0.

    Args:
      weights: `[C]`.
      new: leaves `[C, ...]`.
      old: leaves `[C, ...]`.

    Returns:
      Leaves `[C, ...]`.
    """

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(weights.reshape(weights.shape + (1,) * (a.ndim - 1)) > 0, a, b)

    return jax.tree.map(select, new, old)


def upload_weights(weights: jax.Array, mask: PyTree | None) -> PyTree:
    """Weights that a server reads: `[C]`, or layer by layer when clients left layers out.

    Args:
      weights: `[C]`.
      mask: `None`, or a tree of `[C]` leaves in [0, 1].

    Returns:
      `[C]`, or a tree of `[C]` leaves.
    """
    return weights if mask is None else jax.tree.map(lambda m: weights * m.astype(weights.dtype), mask)


def apply_server(
    server_tx: optax.GradientTransformationExtraArgs, state: ServerState, updates: PyTree, **extra: PyTree
) -> tuple[ServerState, tuple[PyTree, ...]]:
    """Runs the server's chain on the round's pseudo-gradient and takes what it tells.

    Args:
      server_tx: chain of attacks, aggregator and server optimiser.
      state: the server's state.
      updates: pseudo-gradients, `[C, ...]` leaves unless they are aggregated already.
      **extra: optax's extra arguments: `weights`, `key`, `byzantine`, `mesh`.

    Returns:
      The next state and the infos of the chain.

    Raises:
      ValueError: if the chain leaves the client axis in place.
    """
    step, opt_state = server_tx.update(updates, state.opt_state, state.params, **extra)
    for name, got, want in zip(
        leaf_names(state.params), jax.tree.leaves(step), jax.tree.leaves(state.params), strict=True
    ):
        if got.shape != jnp.shape(want):
            raise ValueError(
                f"server_tx must contain an aggregator, such as robust.mean(): it returned the shape {got.shape} for "
                f"{name!r}, expected {jnp.shape(want)}."
            )
    opt_state, infos = take_info(opt_state)
    return ServerState(optax.apply_updates(state.params, step), opt_state, state.round + 1), infos


def init_server(server_tx: optax.GradientTransformation, params: Params) -> ServerState:
    """Initial server state, in buffers of its own so that it can be donated.

    Args:
      server_tx: the server's chain.
      params: initial parameters.

    Returns:
      A `ServerState` of round 0.
    """
    opt_state, _ = take_info(server_tx.init(params))

    def own(x: jax.Array) -> jax.Array:
        # The explicit dtype makes a weak type strong, so that the second step does not retrace.
        return jnp.array(x, dtype=jnp.result_type(x), copy=True)

    params, opt_state = jax.tree.map(own, (params, opt_state))
    return ServerState(params, opt_state, jnp.zeros((), jnp.int32))


def federated_round(
    local_update: LocalUpdate, server_tx: optax.GradientTransformation, map_fn: MapFn | None = None
) -> FederatedAlgorithm:
    """Composes a federated algorithm from one client's work and the server's chain.

    Each step: every client of the cohort runs `local_update` from the broadcast parameters with the key `fold_in(key,
    client_id)`; their pseudo-gradients, stacked `[C, ...]`, run through `server_tx`, which must hold an aggregator and
    usually ends in an optimiser: `optax.chain(robust.mean(), optax.sgd(1.0))` is FedAvg. The result is added to the
    parameters.

    Args:
      local_update: one client's work.
      server_tx: chain of attacks, an aggregator and a server optimiser.
      map_fn: how the client axis is laid out, from `cohort_map`; default: one vmap.

    Returns:
      A `FederatedAlgorithm` whose info is a `RoundInfo`. Clients of weight 0 change nothing, whatever their data hold.

    Raises:
      ValueError: at trace time, if the parts of a cohort disagree on the client axis or the chain has no aggregator.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, batch, key: 0.5 * jnp.mean((w - batch) ** 2)
      >>> local = cj.local.sgd(loss_fn, optax.sgd(1.0), batch_size=1)
      >>> algorithm = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
      >>> one = jnp.ones(2, jnp.int32)
      >>> data = cj.ClientData(jnp.array([[1.0], [3.0]]), num_examples=one, num_support=one)
      >>> cohort = cj.Cohort(data, weights=jnp.array([3.0, 1.0]), client_id=jnp.arange(2))
      >>> state, _, info = jax.jit(algorithm.step)(algorithm.init(jnp.float32(0.0)), cohort, jax.random.key(0))
      >>> print(state.params, info.local.loss)
      1.5 [0.5 4.5]
    """
    server_tx = optax.with_extra_args_support(server_tx)
    map_fn = cohort_map() if map_fn is None else map_fn

    def step(state: ServerState, cohort: Cohort, key: jax.Array) -> tuple[ServerState, PyTree, RoundInfo]:
        check_cohort(cohort)
        local_key, server_key = jax.random.split(key)
        keys = client_keys(local_key, cohort.client_id)
        upload, client_state, info = map_fn(local_update.update, state.params, cohort.state, cohort.data, keys)
        mesh = getattr(map_fn, "mesh", None)
        state, told = apply_server(
            server_tx,
            state,
            upload.delta,
            weights=upload_weights(cohort.weights, upload.mask),
            key=server_key,
            byzantine=cohort.byzantine,
            **({} if mesh is None else {"mesh": mesh}),
        )
        return state, keep_absent(cohort.weights, client_state, cohort.state), RoundInfo(info, told)

    return FederatedAlgorithm(
        lambda params: init_server(server_tx, local_update.share(params)), step, local_update.init, local_update.model
    )
