"""Laws of a `LocalUpdate`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core import (
    Aggregator,
    ClientData,
    Cohort,
    FederatedAlgorithm,
    LocalUpdate,
    Params,
    PyTree,
    cohort_map,
    federated_round,
    leaf_names,
    num_clients,
    weighted_mean,
)
from cedarjax.core.rounds import client_keys
from cedarjax.testing.cases import cast, check_laws, close, count_traces, filled, finite, take, where_rows, widths


class LocalUpdateCase(NamedTuple):
    """A local update and what its laws are checked on."""

    local_update: LocalUpdate
    """The kernel."""
    params: Params
    """Parameters of the model."""
    data: ClientData
    """Clients, best of unequal sizes, leaves `[C, M, ...]`."""
    mesh: Mesh | None = None
    """Devices for the laws about layout; without them the mesh is left out."""
    dtypes: tuple[Any, ...] = ()
    """Further dtypes of parameters and examples in which the kernel is to work."""
    seed: int = 0
    """Seed of all keys."""
    rtol: float = 1e-4
    """Relative tolerance."""
    atol: float = 1e-5
    """Absolute tolerance."""


Layout = tuple[int | None, Mesh | None]
"""Arguments of `cohort_map`."""


def _mapped(
    update: Callable, layout: Layout, params: Params, state: PyTree, data: ClientData, keys: jax.Array
) -> tuple:
    return cohort_map(*layout)(update, params, state, data, keys)


def _work(case: LocalUpdateCase, cohort: Cohort, layout: Layout = (None, None), *, jit: bool = True) -> tuple:
    """Upload, client state and info of every client, `[C, ...]`; laws share the compilation."""
    keys = client_keys(jax.random.key(case.seed), cohort.client_id)
    run = jax.jit(_mapped, static_argnums=(0, 1)) if jit else _mapped
    shared = case.local_update.share(case.params)
    return run(case.local_update.update, layout, shared, cohort.state, cohort.data, keys)


def _new_cohort(case: LocalUpdateCase) -> Cohort:
    """The clients of the case before their first round."""
    count = num_clients(case.data)
    one = case.local_update.init(case.params)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), one)
    return Cohort(case.data, jnp.arange(1, count + 1, dtype=jnp.float32), jnp.arange(count, dtype=jnp.int32), state)


def _cohort(case: LocalUpdateCase) -> Cohort:
    """The clients of the case; those that keep a state have one round behind them."""
    cohort = _new_cohort(case)
    if not jax.tree.leaves(cohort.state):
        return cohort
    return cohort._replace(state=_work(case._replace(seed=case.seed + 1), cohort)[1])


def _mean() -> Aggregator:
    def update(
        updates: PyTree, state: tuple, params: Params | None = None, *, weights: PyTree, **extra: PyTree
    ) -> tuple[PyTree, tuple]:
        return weighted_mean(updates, weights), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def _algorithm(case: LocalUpdateCase) -> FederatedAlgorithm:
    """Federated averaging of the case's kernel, over the map that the other laws have compiled already."""

    def map_fn(fun: Callable[..., PyTree], shared: PyTree, *per_client: PyTree) -> PyTree:
        return jax.jit(_mapped, static_argnums=(0, 1))(fun, (None, None), shared, *per_client)

    return federated_round(case.local_update, optax.chain(_mean(), optax.sgd(1.0)), map_fn)


def _wider(tree: PyTree, extra: int) -> PyTree:
    """Examples `[C, M, ...]` with `extra` more rows for each client."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)), tree)


def keeps_shapes(case: LocalUpdateCase) -> None:
    """Deltas are shaped like what is shared, models like the parameters; states keep theirs; masks and infos fit."""
    data = jax.tree.map(lambda x: x[0], case.data)
    for dtype in (None, *case.dtypes):
        with widths(jnp.float32 if dtype is None else dtype):
            params, one = (case.params, data) if dtype is None else (cast(case.params, dtype), cast(data, dtype))
            state, shared = jax.eval_shape(lambda p: (case.local_update.init(p), case.local_update.share(p)), params)
            upload, after, info = jax.eval_shape(case.local_update.update, shared, state, one, jax.random.key(0))
            chex.assert_trees_all_equal_shapes_and_dtypes(upload.delta, shared)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            deployed = jax.eval_shape(case.local_update.model, shared, after)
            chex.assert_trees_all_equal_shapes_and_dtypes(deployed, params)
    size = sum(x.size for x in jax.tree.leaves(case.params))
    for leaf in jax.tree.leaves(info):
        assert leaf.ndim <= 1 and leaf.size < size, (
            f"info must hold scalars and short vectors, got the shape {leaf.shape}"
        )
    if upload.mask is not None:
        chex.assert_trees_all_equal_structs(upload.mask, shared)
        cohort = _cohort(case)
        mask = jax.tree.leaves(_work(case, cohort)[0].mask)
        chex.assert_shape(mask, cohort.weights.shape)
        assert all(bool(((m >= 0) & (m <= 1)).all()) for m in mask), f"a mask must lie in [0, 1], got {mask}"


def agrees_without_jit(case: LocalUpdateCase) -> None:
    """Jitted and not jitted, every client's results are the same."""
    cohort = _cohort(case)
    close(case, "jit against no jit", _work(case, cohort), _work(case, cohort, jit=False))


def agrees_across_layouts(case: LocalUpdateCase) -> None:
    """One vmap, chunks, a loop, a mesh, and a loop on each device of a mesh give every client the same results."""
    cohort = _cohort(case)
    work = _work(case, cohort)
    layouts: dict[str, Layout] = {"chunks of 2": (2, None), "a loop": (1, None)}
    if case.mesh is not None:
        layouts |= {"a mesh": (None, case.mesh), "a loop on a mesh": (1, case.mesh)}
    for name, layout in layouts.items():
        close(case, f"{name} against one vmap", _work(case, cohort, layout), work)


# The next two laws pad clients and rows to one shape, so that they share a compilation.
MORE_CLIENTS = 2
MORE_ROWS = 3


def ignores_padding(case: LocalUpdateCase) -> None:
    """Padding rows are never read, whatever they hold and however many they are."""
    cohort = _cohort(case)
    examples, counts, _ = case.data
    count = num_clients(case.data)
    work = _work(case, cohort)

    def nonsense(examples: PyTree, value: float) -> Cohort:
        columns = jnp.arange(jax.tree.leaves(examples)[0].shape[1])
        examples = where_rows(columns[None, :] < counts[:, None], examples, filled(examples, value))
        return cohort._replace(data=case.data._replace(examples=examples))

    close(case, "padding of NaN against the given padding", _work(case, nonsense(examples, jnp.nan)), work)
    wide = take(nonsense(_wider(examples, MORE_ROWS), jnp.inf), [*range(count), *[0] * MORE_CLIENTS])
    close(case, f"{MORE_ROWS} more rows of padding", take(_work(case, wide), range(count)), work)


def ignores_absent_clients(case: LocalUpdateCase) -> None:
    """A cohort with rows of weight 0 is the cohort without them, whatever they hold; their states stay."""
    cohort = _cohort(case)
    count = num_clients(case.data)
    mixed = take(cohort, [0, *range(count), *[count - 1] * (MORE_CLIENTS - 1)])
    place = jnp.arange(count + MORE_CLIENTS)
    present = (place > 0) & (place <= count)
    examples = _wider(mixed.data.examples, MORE_ROWS)
    examples = where_rows(place == 0, filled(examples, jnp.nan), examples)
    examples = where_rows(place > count, filled(examples, jnp.inf), examples)
    mixed = mixed._replace(
        data=mixed.data._replace(examples=examples),
        weights=jnp.where(present, mixed.weights, 0),
        state=where_rows(present, mixed.state, filled(mixed.state, jnp.nan)),
    )
    algorithm, key = _algorithm(case), jax.random.key(case.seed)
    state = algorithm.init(case.params)
    want, want_state, _ = algorithm.step(state, cohort, key)
    got, got_state, _ = algorithm.step(state, mixed, key)
    close(case, "a round with absent clients against one without", got.params, want.params)
    present_rows, absent_rows = range(1, count + 1), [0, *range(count + 1, count + MORE_CLIENTS)]
    close(case, "client states with absent clients against without", take(got_state, present_rows), want_state)
    chex.assert_trees_all_equal(take(got_state, absent_rows), take(mixed.state, absent_rows))


def ignores_order(case: LocalUpdateCase) -> None:
    """A client's results do not depend on its place in the cohort: its random draws follow its id."""
    cohort = _cohort(case)
    backwards = range(num_clients(case.data))[::-1]
    close(case, "reversed cohort", take(_work(case, take(cohort, backwards)), backwards), _work(case, cohort))


def traces_once(case: LocalUpdateCase) -> None:
    """Three rounds are one trace."""
    algorithm, cohort = _algorithm(case), _new_cohort(case)
    step, traces = count_traces(algorithm.step)
    state = algorithm.init(case.params)
    for i in range(3):
        state, client_state, _ = step.trace(state, cohort, jax.random.key(i)).out_info
        cohort = cohort._replace(state=client_state)
    assert len(traces) == 1, f"three rounds were traced {len(traces)} times"


def repeats_with_its_key(case: LocalUpdateCase) -> None:
    """Equal keys give equal bits."""
    cohort = _cohort(case)
    chex.assert_trees_all_equal(_work(case, cohort), _work(case, cohort))


def leaves_inputs_alone(case: LocalUpdateCase) -> None:
    """The containers and the arrays that come in are not changed."""
    one = jax.tree.map(lambda x: x[0], case.data)
    inputs = (case.local_update.share(case.params), case.local_update.init(case.params), one)
    leaves, structure = jax.tree.flatten(inputs)
    before = [jnp.array(x, copy=True) for x in leaves]
    # The inputs are closed over: arguments would arrive in containers of their own.
    jax.eval_shape(lambda key: case.local_update.update(*inputs, key), jax.random.key(case.seed))
    assert jax.tree.structure(inputs) == structure, "the containers of the inputs were changed"
    for name, now, leaf, copy in zip(leaf_names(inputs), jax.tree.leaves(inputs), leaves, before, strict=True):
        assert now is leaf, f"input {name} was replaced"
        assert bool((leaf == copy).all()), f"input {name} was overwritten"


def stays_finite(case: LocalUpdateCase) -> None:
    """Finite data give finite results, also one example, no support, no query, zeros, and equal rows."""
    examples, counts, _ = case.data
    largest = jnp.argmax(counts)
    full, rows = counts[largest], jnp.arange(jax.tree.leaves(examples)[0].shape[1])
    one = jax.tree.map(lambda x: x[largest], examples)
    zeros, equal = jax.tree.map(jnp.zeros_like, one), jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), one)

    def client(x: PyTree, num_examples: jax.Array | int, num_support: jax.Array | int) -> ClientData:
        n, s = jnp.asarray(num_examples, jnp.int32), jnp.asarray(num_support, jnp.int32)
        return ClientData(where_rows(rows < n, x, filled(x, jnp.nan)), n, s)

    clients = [
        client(one, 1, 0),
        client(one, 1, 1),
        client(one, full, 0),
        client(one, full, full),
        client(zeros, full, full // 2),
        client(equal, full, full // 2),
    ]
    # No fewer rows than the case has: then nothing new is compiled.
    clients = [clients[i % len(clients)] for i in range(max(len(clients), num_clients(case.data)))]
    data = jax.tree.map(lambda *x: jnp.stack(x), *clients)
    finite("results of finite data", _work(case, _cohort(case._replace(data=data))))


LOCAL_UPDATE_LAWS = {
    law.__name__: law
    for law in (
        keeps_shapes,
        agrees_without_jit,
        agrees_across_layouts,
        ignores_padding,
        ignores_absent_clients,
        ignores_order,
        traces_once,
        repeats_with_its_key,
        leaves_inputs_alone,
        stays_finite,
    )
}
"""Name to law; each is a function of a `LocalUpdateCase`."""


def check_local_update(
    local_update: LocalUpdate,
    params: Params,
    data: ClientData,
    *,
    mesh: Mesh | None = None,
    dtypes: tuple[Any, ...] = (),
    seed: int = 0,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    laws: tuple[str, ...] | None = None,
) -> None:
    """Puts a local update through the laws of `LOCAL_UPDATE_LAWS`.

    Updates, client states and infos of every client must be the same with and without jit, on every layout of the
    client axis, for every padding, every order and beside every absent client; shapes and dtypes must fit; results must
    be finite and follow from the key; one trace must do for all rounds. A kernel that keeps a state is checked in its
    second round.

    Args:
      local_update: the kernel.
      params: parameters of the model.
      data: one `ClientData`, of which clients of several sizes are made, or clients stacked `[C, ...]`.
      mesh: devices over which to shard the clients; default: all devices, if there are several.
      dtypes: further dtypes of parameters and examples in which the kernel is to work, for instance `jnp.bfloat16`.
      seed: seed of all keys.
      rtol: relative tolerance.
      atol: absolute tolerance.
      laws: names of the laws to check; default: all.

    Raises:
      AssertionError: naming the law that is broken and what differed.
      TypeError: if `data` is not a `ClientData`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> from cedarjax.testing import check_local_update
      >>> local = cj.local.sgd(lambda w, x, key: jnp.mean((w - x) ** 2), optax.sgd(0.1), batch_size=2)
      >>> data = cj.ClientData(jnp.array([1.0, 3.0, 5.0]), num_examples=jnp.int32(3), num_support=jnp.int32(1))
      >>> check_local_update(local, jnp.float32(0.0), data, laws=("ignores_padding", "ignores_order"))
    """
    if not isinstance(data, ClientData):
        raise TypeError(f"data must be a ClientData, got {type(data).__name__}.")
    if jnp.ndim(data.num_examples) == 0:
        counts = jnp.stack(
            [jnp.asarray(data.num_examples, jnp.int32), jnp.maximum(data.num_examples // 2, 1), jnp.int32(1)]
        )
        examples = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), data.examples)
        data = ClientData(examples, counts, jnp.minimum(counts, data.num_support))
    if mesh is None and len(jax.devices()) > 1:
        mesh = jax.make_mesh((len(jax.devices()),), ("clients",))
    case = LocalUpdateCase(local_update, params, data, mesh, tuple(dtypes), seed, rtol, atol)
    check_laws(LOCAL_UPDATE_LAWS, case, laws)
