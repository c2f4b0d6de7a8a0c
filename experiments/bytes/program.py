"""One contender for all rates and seeds, as one compiled program."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cedarjax as cj
from experiments.bytes.contenders import CONTENDERS, RATES, Contender
from experiments.bytes.problem import Problem
from experiments.evaluation import share_right
from experiments.seeds import OverSeeds, side_by_side

LAST = 3
"""Tests at the end whose mean decides which rate is best."""


class Told(NamedTuple):
    """What training tells, `[rates, seeds, ...]`."""

    validation: jax.Array
    """`[rates, seeds, P]` accuracy on clients on which the rate is chosen."""
    accuracy: jax.Array
    """`[rates, seeds, P]` accuracy on new clients."""
    sent: jax.Array
    """`[rates, seeds, R, C]` int32 bytes that each client uploaded."""


def train(problem: Problem, contender: Contender) -> Told:
    """Trains with every rate from every seed.

    Args:
      problem: what is given.
      contender: what clients send.

    Returns:
      What training tells.
    """
    setting = problem.setting
    map_fn = cj.cohort_map(side_by_side())

    def one_run(one: tuple, shared: tuple) -> Told:
        seed, rate = one
        params, train, validation, new, key = jax.tree.map(lambda x: x[seed], shared)
        recipe = contender.make(problem, rate)
        algorithm = cj.federated_round(recipe.local, recipe.server, map_fn)

        def test(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            del key
            return share_right(setting.model, params, validation), share_right(setting.model, params, new)

        state, history, scores = cj.run_rounds(
            algorithm,
            train,
            cj.init_run(algorithm, train, params),
            key,
            num_rounds=problem.rounds,
            num_clients=problem.cohort,
            eval_fn=test,
            eval_every=problem.rounds // problem.points,
        )
        sent = recipe.sent if isinstance(recipe.sent, int) else recipe.sent(history.info.local)
        chosen_by, reported = scores
        return Told(chosen_by, reported, jnp.broadcast_to(jnp.asarray(sent, jnp.int32), history.weights.shape))

    rates, seeds = len(RATES), setting.num_seeds
    each = (jnp.tile(jnp.arange(seeds), rates), jnp.repeat(jnp.array(RATES, jnp.float32), seeds))
    shared = (setting.params, setting.train, setting.validation, setting.new, setting.keys)
    told = OverSeeds(one_run, rates * seeds)(each, shared)
    return jax.tree.map(lambda x: x.reshape(rates, seeds, *x.shape[1:]), told)


def contend(name: str, problem: Problem) -> dict[str, Any]:
    """Trains a contender and chooses its rate.

    Args:
      name: key of `CONTENDERS`.
      problem: what is given.

    Returns:
      The record, see `experiments.bytes.summary`.
    """
    contender = CONTENDERS[name]
    started = time.perf_counter()
    told = jax.device_get(train(problem, contender))
    scores = np.nan_to_num(told.validation[..., -LAST:]).mean(axis=(1, 2))
    best = int(scores.argmax())
    sent = told.sent[best].astype(np.int64).sum(axis=2).cumsum(axis=1)
    every = problem.rounds // problem.points
    return {
        "name": contender.label,
        "key": name,
        "kind": contender.kind,
        "accuracy": np.asarray(told.accuracy[best], np.float64).tolist(),
        "uploaded": sent[:, every - 1 :: every].tolist(),
        "full_bytes": problem.full_bytes * problem.cohort * problem.rounds,
        "rate": RATES[best],
        "validation": scores.tolist(),
        "seconds": round(time.perf_counter() - started, 1),
    }
