"""A whole training run as one `lax.scan`: cohorts are sampled, gathered, trained and scattered back on the device."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dataset import FederatedDataset, sample_cohort
from cedarjax.core.segments import check_segments, scan_segments
from cedarjax.core.selection import Selector, take_selection
from cedarjax.core.types import FederatedAlgorithm, Params, PyTree, ServerState


class RunState(NamedTuple):
    """All that a run needs to go on; save it and it resumes bit for bit."""

    server: ServerState
    """The server's state; `server.params` is the model."""
    clients: PyTree
    """States of all clients, leaves `[N, ...]`."""
    selection: PyTree = ()
    """State of the selector; `()` without one."""


class History(NamedTuple):
    """What happened in each round, leaves `[R, ...]`."""

    client_id: jax.Array
    """`[R, C]` int32, who took part."""
    weights: jax.Array
    """`[R, C]`, with what weight."""
    info: PyTree
    """The algorithm's info of each round."""


def init_run(
    algorithm: FederatedAlgorithm, dataset: FederatedDataset, params: Params, *, selector: Selector | None = None
) -> RunState:
    """State of a run before its first round.

    Args:
      algorithm: the algorithm.
      dataset: the clients that train, `N` of them.
      params: initial parameters.
      selector: the one that `run_rounds` gets.

    Returns:
      A `RunState`.
    """
    one = algorithm.init_client(params)
    clients = jax.tree.map(lambda x: jnp.broadcast_to(x, (dataset.num_clients, *jnp.shape(x))), one)
    selection = () if selector is None else selector.init(dataset.num_clients)
    return RunState(algorithm.init(params), *jax.tree.map(lambda x: jnp.array(x, copy=True), (clients, selection)))


def _check_selector(selector: Selector, state: PyTree, num_clients: int) -> None:
    """Raises unless the state is that of the selector, of which a scan would complain in words of its own."""

    def described(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)

    want, got = described(jax.eval_shape(lambda: selector.init(num_clients))), described(state)
    if jax.tree.structure(want) != jax.tree.structure(got) or want != got:
        raise ValueError(
            "state.selection must be the state of the selector, from init_run(..., selector=selector) with the same "
            f"dataset: expected {want}, got {got}."
        )


def run_rounds(
    algorithm: FederatedAlgorithm,
    dataset: FederatedDataset,
    state: RunState,
    key: jax.Array,
    *,
    num_rounds: int,
    num_clients: int | None = None,
    selector: Selector | None = None,
    byzantine: jax.Array | None = None,
    weighting: str = "examples",
    eval_fn: Callable[[Params, jax.Array], PyTree] | None = None,
    eval_every: int = 1,
) -> tuple[RunState, History, PyTree]:
    """Runs `num_rounds` rounds on the device.

    Round `r`, counted from the first round of the run, uses `fold_in(key, r)` for everything: two calls of 50 rounds
    are one call of 100, bit for bit. The function is pure: jit it once, donate `state`, vmap it over `key`, over
    initial states, or over hyper-parameters that the algorithm closes over.

    Args:
      algorithm: what a round does.
      dataset: the clients that train.
      state: from `init_run` or from an earlier call.
      key: PRNG key of the whole run.
      num_rounds: static number of rounds.
      num_clients: clients per round, drawn uniformly without replacement; default: all. Not together with `selector`.
      selector: chooses each round's clients, see `cedarjax.select`; its state lies in `state.selection`. A client's
        weight in the round is multiplied by that of its place, and in empty places nothing happens.
      byzantine: `[N]` bool, the clients that simulated attacks speak for.
      weighting: `"examples"` or `"uniform"`, see `take_clients`.
      eval_fn: `(params, key) -> metrics`, called after every `eval_every` rounds with a key that is the same each time.
      eval_every: rounds between evaluations; must divide `num_rounds`.

    Returns:
      The next state, the history `[R, ...]`, and the metrics `[R // eval_every, ...]` (`None` without `eval_fn`).

    Raises:
      ValueError: if `num_rounds` is negative, `eval_every` does not divide it, `num_clients` is out of range or given
        beside a `selector`, or `state.selection` is not the selector's.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import cedarjax as cj
      >>> values, owner = np.array([1.0, 3.0, 5.0], np.float32), np.array([0, 0, 1])
      >>> dataset = cj.data.federated_dataset(values, owner)
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(0.5), batch_size=2)
      >>> algorithm = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
      >>> state = cj.init_run(algorithm, dataset, jnp.float32(0.0))
      >>> state, history, _ = cj.run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=20)
      >>> print(f"{state.server.params:.3f}", history.client_id.shape)
      3.000 (20, 2)
    """
    check_segments("num_rounds", num_rounds, eval_every, has_eval=eval_fn is not None)
    if selector is not None:
        if num_clients is not None:
            raise ValueError(
                f"num_clients must be None beside a selector, which has a size of its own, got {num_clients}."
            )
        _check_selector(selector, state.selection, dataset.num_clients)
    cohort_size = dataset.num_clients if num_clients is None else num_clients

    def one_round(state: RunState) -> tuple[RunState, History]:
        sample_key, step_key = jax.random.split(jax.random.fold_in(key, state.server.round))
        selecting = state.selection
        if selector is None:
            cohort = sample_cohort(sample_key, dataset, cohort_size, weighting=weighting, byzantine=byzantine)
        else:
            selection, selecting = selector.select(selecting, sample_key, jnp.ones(dataset.num_clients, bool))
            cohort = take_selection(dataset, selection, weighting=weighting, byzantine=byzantine)
        cohort = cohort._replace(state=jax.tree.map(lambda x: x.at[cohort.client_id].get(mode="clip"), state.clients))
        server, client_state, info = algorithm.step(state.server, cohort, step_key)
        clients = jax.tree.map(
            lambda all_clients, new: all_clients.at[cohort.client_id].set(new, mode="drop"), state.clients, client_state
        )
        if selector is not None:
            selecting = selector.observe(selecting, selection, info)
        return RunState(server, clients, selecting), History(cohort.client_id, cohort.weights, info)

    return scan_segments(one_round, state, key, num_rounds, eval_fn, eval_every)
