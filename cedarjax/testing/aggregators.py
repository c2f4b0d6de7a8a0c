"""Laws of an `Aggregator`."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cedarjax.core import Aggregator, Params, PyTree, num_clients, take_info
from cedarjax.testing.cases import cast, check_laws, close, count_traces, filled, finite, take, where_rows, widths


class AggregatorCase(NamedTuple):
    """An aggregator and what its laws are checked on."""

    aggregator: Aggregator
    """The kernel."""
    updates: PyTree
    """Finite updates of at least three clients, leaves `[C, ...]`."""
    params: Params
    """The broadcast parameters, leaves `[...]`."""
    weights: jax.Array
    """`[C]` float32, all positive."""
    mesh: Mesh | None = None
    """Devices for the law about sharding, which says nothing without them."""
    dtypes: tuple[Any, ...] = ()
    """Further dtypes of updates and parameters in which the kernel is to work."""
    seed: int = 0
    """Seed of the key."""
    rtol: float = 1e-4
    """Relative tolerance."""
    atol: float = 1e-5
    """Absolute tolerance."""


def _aggregated(
    aggregator: Aggregator, updates: PyTree, weights: PyTree, params: Params, key: jax.Array
) -> tuple[PyTree, tuple]:
    nobody = jnp.zeros(num_clients(updates), bool)
    state = aggregator.init(params)
    out, state = aggregator.update(updates, state, params, weights=weights, key=key, byzantine=nobody)
    return out, take_info(state)[1]


def _aggregate(case: AggregatorCase, updates: PyTree, weights: PyTree, *, jit: bool = True) -> tuple[PyTree, tuple]:
    """The aggregate and what the aggregator tells; laws that ask for the same shapes share a compilation."""
    run = jax.jit(_aggregated, static_argnums=0) if jit else _aggregated
    return run(case.aggregator, updates, weights, case.params, jax.random.key(case.seed))


def _told(infos: PyTree, count: int, rows: Any) -> PyTree:
    """Infos with the client axis of their `[C]` vectors taken at `rows`."""
    return jax.tree.map(lambda x: take(x, rows) if x.shape[:1] == (count,) else x, infos)


def removes_client_axis(case: AggregatorCase) -> None:
    """The result has the shapes and dtypes of one client's update; infos hold scalars and `[C]` vectors."""
    for dtype in (None, *case.dtypes):
        with widths(jnp.float32 if dtype is None else dtype):
            given = (case.updates, case.params)
            updates, params = given if dtype is None else cast(given, dtype)
            out, infos = jax.eval_shape(
                lambda u, w, p: _aggregate(case._replace(params=p), u, w), updates, case.weights, params
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(out, jax.tree.map(lambda x: x[0], updates))
    for leaf in jax.tree.leaves(infos):
        assert leaf.shape in ((), case.weights.shape), (
            f"infos must hold scalars and [C] vectors, got the shape {leaf.shape}"
        )


def agrees_without_jit(case: AggregatorCase) -> None:
    """Jitted and not jitted, the result is the same."""
    want = _aggregate(case, case.updates, case.weights)
    close(case, "no jit against jit", _aggregate(case, case.updates, case.weights, jit=False), want)


def ignores_order(case: AggregatorCase) -> None:
    """The order of the clients does not matter."""
    count = num_clients(case.updates)
    order = range(count)[::-1]
    out, infos = _aggregate(case, case.updates, case.weights)
    got, told = _aggregate(case, take(case.updates, order), take(case.weights, order))
    close(case, "permuted clients", got, out)
    close(case, "infos of permuted clients", told, _told(infos, count, order))


def _with_strangers(case: AggregatorCase) -> tuple[PyTree, jax.Array, jax.Array]:
    """Updates with a row of NaN in front and a row of Inf behind, their weights, and which rows are strangers."""
    count = num_clients(case.updates)
    place = jnp.arange(count + 2)
    mixed, weights = take((case.updates, case.weights), [0, *range(count), count - 1])
    mixed = where_rows(place == 0, filled(mixed, jnp.nan), mixed)
    mixed = where_rows(place == count + 1, filled(mixed, jnp.inf), mixed)
    return mixed, weights, (place == 0) | (place == count + 1)


def ignores_absent_clients(case: AggregatorCase) -> None:
    """Rows of weight 0 change nothing, whatever they hold."""
    count = num_clients(case.updates)
    mixed, weights, strangers = _with_strangers(case)
    out, infos = _aggregate(case, case.updates, case.weights)
    got, told = _aggregate(case, mixed, jnp.where(strangers, 0, weights))
    close(case, "with absent clients against without", got, out)
    close(case, "infos with absent clients against without", _told(told, count + 2, range(1, count + 1)), infos)


def ignores_nonfinite_clients(case: AggregatorCase) -> None:
    """A present row that is not finite, even in one entry, counts as absent."""
    out, _ = _aggregate(case, case.updates, case.weights)
    mixed, weights, _ = _with_strangers(case)
    close(case, "with non-finite clients against without", _aggregate(case, mixed, weights)[0], out)
    count = num_clients(case.updates)
    leaves, structure = jax.tree.flatten(take(case.updates, [0, *range(count), count - 1]))
    for place, value in ((0, jnp.nan), (-1, jnp.inf)):
        leaves[place] = leaves[place].at[(place,) * leaves[place].ndim].set(value)
    close(
        case,
        "one NaN in one leaf, one Inf in another",
        _aggregate(case, jax.tree.unflatten(structure, leaves), weights)[0],
        out,
    )


def traces_once(case: AggregatorCase) -> None:
    """Three steps are one trace when `take_info` strips what the aggregator tells."""

    def update(updates: PyTree, state: PyTree, params: Params, weights: jax.Array, key: jax.Array) -> PyTree:
        nobody = jnp.zeros(num_clients(updates), bool)
        return case.aggregator.update(updates, state, params, weights=weights, key=key, byzantine=nobody)[1]

    step, traces = count_traces(update)
    state = take_info(case.aggregator.init(case.params))[0]
    for i in range(3):
        state = take_info(step.trace(case.updates, state, case.params, case.weights, jax.random.key(i)).out_info)[0]
    assert len(traces) == 1, f"three steps were traced {len(traces)} times"


def reads_weights_by_layer(case: AggregatorCase) -> None:
    """Equal weights on every leaf are the `[C]` weights; a leaf that nobody uploaded gets 0, unread."""
    per_leaf = jax.tree.map(lambda _: case.weights, case.updates)
    close(
        case,
        "a tree of weights against [C]",
        _aggregate(case, case.updates, per_leaf),
        _aggregate(case, case.updates, case.weights),
    )
    weights, structure = jax.tree.flatten(per_leaf)
    leaves = jax.tree.leaves(case.updates)
    for i in range(len(weights)):
        masked = jax.tree.unflatten(structure, [jnp.zeros_like(w) if i == j else w for j, w in enumerate(weights)])
        unread = jax.tree.unflatten(structure, [filled(x, jnp.nan) if i == j else x for j, x in enumerate(leaves)])
        out = _aggregate(case, unread, masked)[0]
        finite("result where nobody uploaded a leaf", out)
        assert not jax.tree.leaves(out)[i].any(), f"leaf {i}, which nobody uploaded, must get 0"


def survives_few_clients(case: AggregatorCase) -> None:
    """One client, and nobody at all, give a finite result; a rule that needs more may raise `ValueError` for one."""
    nobody = _aggregate(case, case.updates, jnp.zeros_like(case.weights))[0]
    assert not any(bool(x.any()) for x in jax.tree.leaves(nobody)), "nobody present must give 0"
    try:
        alone = _aggregate(case, take(case.updates, [0]), case.weights[:1])
    except ValueError:
        return
    finite("result of one client", alone)


def stays_finite(case: AggregatorCase) -> None:
    """Equal rows and rows of zeros give finite results: the rows themselves, or 0."""
    for what, updates in {
        "zeros": jax.tree.map(jnp.zeros_like, case.updates),
        "equal rows": jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), case.updates),
    }.items():
        finite(f"result of {what}", _aggregate(case, updates, case.weights))


def repeats_with_its_key(case: AggregatorCase) -> None:
    """Equal keys give equal bits, and the inputs are not changed."""
    before = jax.tree.map(lambda x: jnp.array(x, copy=True), (case.updates, case.weights, case.params))
    once = _aggregate(case, case.updates, case.weights)
    chex.assert_trees_all_equal(_aggregate(case, case.updates, case.weights), once)
    chex.assert_trees_all_equal((case.updates, case.weights, case.params), before)


def agrees_when_sharded(case: AggregatorCase) -> None:
    """Clients sharded over devices give the same result."""
    if case.mesh is None:
        return
    count = num_clients(case.updates)
    rows = [i % count for i in range(-(-count // case.mesh.size) * case.mesh.size)]
    updates, weights = take((case.updates, case.weights), rows)
    weights = weights * (1 + jnp.arange(len(rows), dtype=weights.dtype))
    clients = NamedSharding(case.mesh, P(case.mesh.axis_names))
    want = _aggregate(case, updates, weights)
    sharded = _aggregate(case, *jax.device_put((updates, weights), clients))
    close(case, "sharded against one device", jax.device_get(sharded), jax.device_get(want))


AGGREGATOR_LAWS = {
    law.__name__: law
    for law in (
        removes_client_axis,
        agrees_without_jit,
        ignores_order,
        ignores_absent_clients,
        ignores_nonfinite_clients,
        traces_once,
        reads_weights_by_layer,
        survives_few_clients,
        stays_finite,
        repeats_with_its_key,
        agrees_when_sharded,
    )
}
"""Name to law; each is a function of an `AggregatorCase`."""


def _offset(case: AggregatorCase) -> PyTree:
    return jax.tree.map(
        lambda x: 1 + jnp.arange(x[0].size, dtype=x.dtype).reshape(x[0].shape) / x[0].size, case.updates
    )


def moves_along(case: AggregatorCase) -> None:
    """The same vector added to every update is added to the result."""
    offset, (out, _) = _offset(case), _aggregate(case, case.updates, case.weights)
    moved = jax.tree.map(lambda x, o: x + o[None], case.updates, offset)
    close(case, "translation", _aggregate(case, moved, case.weights)[0], jax.tree.map(jnp.add, out, offset))


def scales_along(case: AggregatorCase) -> None:
    """Every update times 4 gives 4 times the result."""
    out, _ = _aggregate(case, case.updates, case.weights)
    scaled = jax.tree.map(lambda x: 4 * x, case.updates)
    close(case, "scale", _aggregate(case, scaled, case.weights)[0], jax.tree.map(lambda x: 4 * x, out))


EQUIVARIANCES = {"translation": moves_along, "scale": scales_along}
"""Laws that hold where a rule's definition has them."""


def check_aggregator(
    aggregator: Aggregator,
    updates: PyTree,
    *,
    params: Params | None = None,
    weights: jax.Array | None = None,
    equivariances: tuple[str, ...] = (),
    mesh: Mesh | None = None,
    dtypes: tuple[Any, ...] = (),
    seed: int = 0,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    laws: tuple[str, ...] | None = None,
) -> None:
    """Puts an aggregator through the laws of `AGGREGATOR_LAWS`.

    The result must be one update, the same with and without jit, in every order and however the clients are sharded;
    absent and non-finite clients and layers that nobody uploaded must count for nothing; shapes and dtypes must fit;
    results must be finite and follow from the key; one trace must do for all rounds.

    Args:
      aggregator: the kernel.
      updates: finite updates of at least three clients, leaves `[C, ...]`.
      params: the broadcast parameters, leaves `[...]`; default: zeros.
      weights: `[C]`, all positive; default: 1, 2, ..., C.
      equivariances: the names of `EQUIVARIANCES` that the rule has besides, `"translation"` or `"scale"`.
      mesh: devices over which to shard the clients; default: all devices, if there are several.
      dtypes: further dtypes of updates and parameters in which the kernel is to work, for instance `jnp.bfloat16`.
      seed: seed of the key.
      rtol: relative tolerance.
      atol: absolute tolerance.
      laws: names of the laws to check; default: all.

    Raises:
      AssertionError: naming the law that is broken and what differed.
      ValueError: if there are fewer than three clients or the leaves disagree on their number.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> from cedarjax.testing import check_aggregator
      >>> updates = {"w": jnp.array([[1.0, 2.0], [3.0, 5.0], [4.0, 0.0]])}
      >>> check_aggregator(cj.robust.mean(), updates, equivariances=("translation",), laws=("ignores_order",))
    """
    count = num_clients(updates)
    if count < 3:
        raise ValueError(f"updates must hold at least 3 clients, got {count}.")
    if mesh is None and len(jax.devices()) > 1:
        mesh = jax.make_mesh((len(jax.devices()),), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates) if params is None else params
    weights = jnp.arange(1, count + 1, dtype=jnp.float32) if weights is None else weights
    case = AggregatorCase(aggregator, updates, params, weights, mesh, tuple(dtypes), seed, rtol, atol)
    check_laws(AGGREGATOR_LAWS, case, laws)
    check_laws(EQUIVARIANCES, case, equivariances)
