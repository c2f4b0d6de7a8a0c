"""Two kinds of programs: one trains an algorithm for all rates and seeds, one adapts and scores clients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import cedarjax as cj
from cedarjax.core import FederatedDataset
from experiments.evaluation import OPTIMISERS, metric_name, query_counts
from experiments.personalisation.contenders import Contender
from experiments.personalisation.problem import Problem, largest_support, repeated
from experiments.seeds import OverSeeds, side_by_side
from experiments.setting import Setting


class Trained(NamedTuple):
    """What training leaves, `[rates, seeds, ...]`."""

    newcomer: Any
    """Parameters with which a client that never took part begins."""
    own: Any
    """Models of the training clients, `[rates, seeds, N, ...]`."""
    loss: jax.Array
    """`[rates, seeds, rounds]`, mean over the clients of a round; NaN where an algorithm tells none."""


def untrained(problem: Problem) -> Trained:
    """Initial parameters in the place of trained ones."""
    newcomer = jax.tree.map(lambda x: x[None], problem.setting.params)
    count = problem.setting.num_train
    own = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape[:2], count, *x.shape[2:])), newcomer)
    return Trained(newcomer, own, jnp.full((1, problem.setting.num_seeds, problem.rounds), jnp.nan))


def train(problem: Problem, contender: Contender) -> Trained:
    """Trains with every rate from every seed, one compiled program.

    Args:
      problem: what is given.
      contender: the algorithm.

    Returns:
      What training leaves.
    """
    setting, rates = problem.setting, contender.rates
    map_fn = cj.cohort_map(side_by_side())

    def one_run(one: tuple, _: Any) -> tuple[Any, Any, jax.Array]:
        params, dataset, key, rate = one
        recipe = contender.make(problem, rate)
        algorithm = cj.federated_round(recipe.local, recipe.server, map_fn)
        state, history, _ = cj.run_rounds(
            algorithm,
            dataset,
            cj.init_run(algorithm, dataset, params),
            key,
            num_rounds=problem.rounds,
            num_clients=problem.cohort,
            weighting=contender.weighting,
        )
        shared = state.server.params
        newcomer = shared
        if contender.newcomer == "model":
            newcomer = recipe.local.model(shared, recipe.local.init(params))
        model = jax.vmap(recipe.local.model, in_axes=(None, 0), axis_size=dataset.num_clients)
        own = model(shared, state.clients)
        loss = getattr(history.info.local, "loss", jnp.full(history.weights.shape, jnp.nan))
        return newcomer, own, loss.mean(axis=1)

    count = len(rates)
    arguments = (
        repeated(setting.params, count),
        repeated(setting.train, count),
        jnp.concatenate([setting.keys] * count),
        jnp.repeat(jnp.array(rates, jnp.float32), setting.num_seeds),
    )
    found = OverSeeds(one_run, count * setting.num_seeds)(arguments)
    return Trained(*jax.tree.map(lambda x: x.reshape(count, setting.num_seeds, *x.shape[1:]), found))


def shared_bytes(problem: Problem, contender: Contender) -> int:
    """Bytes that a client receives in a round, and uploads if it leaves nothing out."""
    one = jax.tree.map(lambda x: x[0], problem.setting.params)
    shapes = jax.eval_shape(lambda p: contender.make(problem, jnp.float32(0.1)).local.share(p), one)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


class Scorer:
    """Adapts clients that begin with models of their own, and scores them on their query rows.

    Args:
      setting: the setting.
    """

    def __init__(self, setting: Setting):
        """Remembers the setting; nothing is compiled yet."""
        self.setting = setting

    @functools.cache  # noqa: B019 - one scorer a program
    def _program(self, optimiser: str, num_steps: int, max_support: int, told: tuple[int, ...], runs: int) -> OverSeeds:
        name = metric_name(self.setting)

        def one_run(one: tuple[Any, FederatedDataset, jax.Array], rate: jax.Array) -> tuple[jax.Array, jax.Array]:
            models, dataset, key = one
            adapt = cj.meta.adapt(
                self.setting.loss_fn,
                OPTIMISERS[optimiser](rate),
                num_steps,
                max_support=max_support,
                eval_fn=functools.partial(query_counts, self.setting),
                eval_steps=told,
            )
            clients = cj.core.take_clients(dataset, jnp.arange(dataset.num_clients)).data
            keys = jax.random.split(key, dataset.num_clients)
            map_fn = cj.cohort_map(side_by_side())
            counts = map_fn(lambda _, *client: adapt(*client)[1], (), models, clients, keys)
            pooled = jax.vmap(lambda c: c.pool().summarise(), in_axes=1)(counts)
            return getattr(pooled, name), getattr(jax.vmap(jax.vmap(lambda c: c.summarise()))(counts), name)

        return OverSeeds(one_run, runs)

    def __call__(
        self,
        models: Any,
        dataset: FederatedDataset,
        optimiser: str,
        rate: float,
        num_steps: int,
        told: tuple[int, ...],
        *,
        one_for_all: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Scores after some numbers of steps.

        Args:
          models: `[rates, seeds, ...]` parameters for all clients, or `[rates, seeds, clients, ...]`.
          dataset: `[seeds, ...]` the clients.
          optimiser: key of `OPTIMISERS`.
          rate: its rate.
          num_steps: adaptation steps.
          told: steps after which clients are scored.
          one_for_all: which of the two `models` are.

        Returns:
          `[rates, seeds, told]` over all query rows together, and `[rates, seeds, clients, told]`.
        """
        first = jax.tree.leaves(models)[0]
        rates, seeds = first.shape[:2]
        count = dataset.offsets.shape[1] - 1

        def flat(x: jax.Array) -> jax.Array:
            x = x.reshape(rates * seeds, *x.shape[2:])
            return jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:])) if one_for_all else x

        program = self._program(optimiser, num_steps, largest_support(dataset), told, rates * seeds)
        keys = jnp.concatenate([self.setting.keys] * rates)
        arguments = (jax.tree.map(flat, models), repeated(dataset, rates), keys)
        pooled, single = jax.device_get(program(arguments, jnp.float32(rate)))
        return tuple(x.reshape(rates, seeds, *x.shape[1:]) for x in (pooled, single))
