"""The algorithms, with what FedCache's authors published of their settings where it has the same meaning.

All optimise by the same SGD, on batches of the same size, one pass over a client's rows in a round.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from cedarjax import distill, nn
from cedarjax.core import FederatedAlgorithm, LocalUpdate, MapFn
from experiments.fedcache.problem import Problem, accuracy, clients_of
from experiments.seeds import side_by_side

BATCH_SIZE = 8
ALPHA, TEMPERATURE = 1.5, 3.0
COMMON = "medium"
"""Architecture of those algorithms that need one for all."""

SeedArrays = tuple[Any, Any, Any, distill.Relations, jax.Array]
"""Parameters, training rows, test rows, relations and key of one seed, as `Problem` has them."""


class Told(NamedTuple):
    """What one seed tells."""

    accuracy: jax.Array
    """`[P, N]` of every client's model on its own rows, after each part of the run."""
    exchanged: jax.Array
    """`[N]` int32, rows or class means that each client exchanged in a round; 0 where it exchanges parameters."""


class Contender(NamedTuple):
    """One row of the table."""

    label: str
    """Name in tables and figures."""
    run: Callable[[Problem, SeedArrays, int, int], Told]
    """`run(problem, one, num_parts, rounds_a_part)`."""
    num_bytes: Callable[[Problem, int], distill.KnowledgeBytes]
    """Bytes of one client, from what it exchanged (`Told.exchanged`)."""


def optimiser() -> optax.GradientTransformation:
    """SGD of the published demonstration."""
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))


def _group(model: nn.Model) -> distill.Group:
    return distill.Group(lambda params, x, key: model.apply(params, x), optimiser())


def _layout() -> MapFn:
    return cj.cohort_map(side_by_side())


def exchange(
    make: Callable[[Problem, dict[str, distill.Group], distill.Relations], FederatedAlgorithm], count: str
) -> Callable[[Problem, SeedArrays, int, int], Told]:
    """A run of an algorithm of groups, in which all clients take part in every round.

    Args:
      make: `(problem, groups, relations) -> algorithm`, whose cohorts are a dict by architecture.
      count: field of the algorithm's info that says what was exchanged.

    Returns:
      `Contender.run`.
    """

    def run(p: Problem, one: SeedArrays, parts: int, rounds: int) -> Told:
        params, train, test, relations, key = one
        names = sorted(p.fleet)
        algorithm = make(p, {name: _group(p.models[name]) for name in names}, relations)
        ids = {name: p.members(name) for name in names}
        cohorts = {name: clients_of(train, ids[name]) for name in names}
        tests = {name: clients_of(test, ids[name]).data for name in names}
        example = {name: jax.tree.map(lambda x: x[0], params[name]) for name in names}

        def begin(name: str) -> Any:
            mine = jax.tree.map(lambda x: x[ids[name]], params[name])
            return jax.vmap(lambda w: algorithm.init_client({**example, name: w})[name])(mine)

        def by_client(values: dict[str, jax.Array]) -> jax.Array:
            found = jnp.zeros(p.num_clients, values[names[0]].dtype)
            for name in names:
                found = found.at[ids[name]].set(values[name])
            return found

        def one_round(carry: Any, round_key: jax.Array) -> tuple[Any, Any]:
            server, clients = carry
            full: Any = {name: cohorts[name]._replace(state=clients[name]) for name in names}
            server, clients, info = algorithm.step(server, full, round_key)
            return (server, clients), {name: getattr(info[name], count) for name in names}

        def one_part(carry: Any, keys: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            carry, exchanged = jax.lax.scan(one_round, carry, keys)
            models = algorithm.model(carry[0].params, carry[1])
            right = {
                name: _layout()(lambda _, w, data, name=name: accuracy(p.models[name].apply, w, data), (), *pair)
                for name, pair in ((name, (models[name], tests[name])) for name in names)
            }
            return carry, (by_client(right), by_client({name: rows[-1] for name, rows in exchanged.items()}))

        start = algorithm.init(example), {name: begin(name) for name in names}
        _, (scores, exchanged) = jax.lax.scan(one_part, start, jax.random.split(key, (parts, rounds)))
        return Told(scores, exchanged[-1])

    return run


def parameters(
    make: Callable[[Problem, Callable], LocalUpdate], *, is_tuned: bool = False
) -> Callable[[Problem, SeedArrays, int, int], Told]:
    """A run of an algorithm that exchanges parameters of one architecture.

    Args:
      make: `(problem, loss_fn) -> local_update`.
      is_tuned: whether a client is tested with the shared model after one more round of its own work.

    Returns:
      `Contender.run`.
    """

    def run(p: Problem, one: SeedArrays, parts: int, rounds: int) -> Told:
        params, train, test, _, key = one
        model = p.models[COMMON]
        local = make(p, nn.cross_entropy(model.apply))
        algorithm = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)), _layout())
        everybody = clients_of(train, np.arange(p.num_clients))
        tests = clients_of(test, np.arange(p.num_clients)).data

        def score(shared: Any, state: Any, rows: Any, data: Any, client_key: jax.Array) -> jax.Array:
            if is_tuned:
                upload, state, _ = local.update(shared, state, rows, client_key)
                shared = jax.tree.map(jnp.subtract, shared, upload.delta)
            return accuracy(model.apply, local.model(shared, state), data)

        def one_part(state: cj.RunState, _: None) -> tuple[cj.RunState, jax.Array]:
            state = cj.run_rounds(algorithm, train, state, key, num_rounds=rounds)[0]
            keys = jax.random.split(jax.random.fold_in(key, state.server.round), p.num_clients)
            return state, _layout()(score, state.server.params, state.clients, everybody.data, tests, keys)

        start = cj.init_run(algorithm, train, jax.tree.map(lambda x: x[0], params[COMMON]))
        _, scores = jax.lax.scan(one_part, start, None, length=parts)
        return Told(scores, jnp.zeros(p.num_clients, jnp.int32))

    return run


def _fedcache(order: str, alpha: float = ALPHA) -> Callable[[Problem, SeedArrays, int, int], Told]:
    def make(p: Problem, groups: Any, relations: distill.Relations) -> FederatedAlgorithm:
        return distill.fedcache(
            groups,
            distill.init_cache(relations, p.num_classes),
            order=order,
            alpha=alpha,
            temperature=TEMPERATURE,
            batch_size=BATCH_SIZE,
            map_fn=_layout() if order == "synchronous" else None,
        )

    return exchange(make, "num_rows")


def _fd(p: Problem, groups: Any, relations: distill.Relations) -> FederatedAlgorithm:
    return distill.fd(
        groups,
        num_classes=p.num_classes,
        alpha=ALPHA,
        temperature=TEMPERATURE,
        batch_size=BATCH_SIZE,
        map_fn=_layout(),
    )


def _fedavg(p: Problem, loss_fn: Any) -> LocalUpdate:
    return cj.local.sgd(loss_fn, optimiser(), batch_size=BATCH_SIZE)


def _pfedme(p: Problem, loss_fn: Any) -> LocalUpdate:
    steps = max(1, math.ceil(p.mean_rows / BATCH_SIZE / 5))
    return cj.personal.pfedme(loss_fn, optax.sgd(0.05), 1.0, 0.5, num_rounds=steps, num_steps=5, batch_size=BATCH_SIZE)


def _cached(p: Problem, count: int) -> distill.KnowledgeBytes:
    return distill.fedcache_bytes(count, p.num_classes, p.relations.index.shape[-1], p.embedding_dim)


def _model(p: Problem, count: int) -> distill.KnowledgeBytes:
    size = p.num_bytes(COMMON)
    return distill.KnowledgeBytes(0, size, size, size)


CONTENDERS: dict[str, Contender] = {
    "alone": Contender(
        "alone", _fedcache("synchronous", alpha=0.0), lambda p, count: distill.KnowledgeBytes(0, 0, 0, 0)
    ),
    "fedcache": Contender("FedCache", _fedcache("synchronous"), _cached),
    "fedcache_sequential": Contender("FedCache, in turns", _fedcache("sequential"), _cached),
    "fd": Contender("FD", exchange(_fd, "num_held"), lambda p, count: distill.fd_bytes(count, p.num_classes)),
    "fedavg": Contender("FedAvg", parameters(_fedavg), _model),
    "fedavg_tuned": Contender("FedAvg, tuned", parameters(_fedavg, is_tuned=True), _model),
    "pfedme": Contender("pFedMe", parameters(_pfedme), _model),
}
