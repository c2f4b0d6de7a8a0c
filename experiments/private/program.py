"""Trains one algorithm under one budget for all seeds, and adapts clients that never trained."""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from cedarjax import privacy, robust, select
from cedarjax.core import Selector
from experiments.evaluation import Evaluator, metric_name
from experiments.private.contenders import Contender
from experiments.private.problem import Preset
from experiments.seeds import OverSeeds, side_by_side
from experiments.setting import Setting

NOT_PRIVATE, CLIPPED = "not private", "clipped, no noise"
ADAPTIVE = privacy.AdaptiveNorm(initial_norm=0.5, target_quantile=0.5, learning_rate=0.2)


class Budget(NamedTuple):
    """What may be given away."""

    label: str
    """Name in tables."""
    epsilon: float
    """Infinity where nothing is promised."""
    clips: bool
    """Whether uploads are clipped."""

    @property
    def key(self) -> str:
        """Name of its file."""
        return f"epsilon-{self.epsilon:g}" if math.isfinite(self.epsilon) else "clipped" if self.clips else "open"


def budgets(epsilons: tuple[float, ...]) -> tuple[Budget, ...]:
    """All budgets of a run: no privacy, clipping alone, and the epsilons from the largest on."""
    inf = math.inf
    private = [Budget(f"epsilon {e:g}", e, True) for e in sorted(epsilons, reverse=True)]
    return (Budget(NOT_PRIVATE, inf, False), Budget(CLIPPED, inf, True), *private)


def poisson_selector(num_clients: int, preset: Preset, delta: float) -> Selector:
    """Independent participation with places enough to spend a hundredth of delta on an overflow at most."""
    places = select.bernoulli_size(
        num_clients, preset.participation, failure_probability=delta / 100, num_rounds=max(1, preset.rounds)
    )
    return select.bernoulli(preset.participation, max_selected=places)


def make_plan(
    budget: Budget, num_clients: int, preset: Preset, delta: float, max_norm: float | None
) -> privacy.PrivatePlan:
    """The plan of a budget; without a `max_norm` the clip norm adapts."""
    finite = math.isfinite(budget.epsilon)
    return privacy.poisson_plan(
        poisson_selector(num_clients, preset, delta),
        num_clients=num_clients,
        num_rounds=preset.rounds,
        delta=delta,
        max_norm=ADAPTIVE if max_norm is None else max_norm,
        target_epsilon=budget.epsilon if finite else None,
        noise_multiplier=None if finite else 0.0,
    )


class Trained(NamedTuple):
    """What training leaves, `[seeds, ...]`."""

    params: Any
    """The model."""
    max_norm: jax.Array
    """`[seeds, rounds]` clip norm, NaN without one."""
    clipped: jax.Array
    """`[seeds, rounds]` share of the clients that were clipped."""


def train(setting: Setting, contender: Contender, preset: Preset, plan: privacy.PrivatePlan, clips: bool) -> Trained:
    """Trains from every seed.

    Args:
      setting: what is given.
      contender: the algorithm.
      preset: hyper-parameters.
      plan: selector and, if `clips`, aggregator.
      clips: whether the plan's aggregator is used, or else the mean of those who are present.
    """

    def one_seed(one: Any, _: Any) -> Trained:
        params, dataset, key, stimuli = one
        server = plan.aggregator if clips else robust.mean()
        algorithm = cj.federated_round(
            contender.make(setting, preset, stimuli),
            optax.chain(server, optax.sgd(1.0)),
            cj.cohort_map(side_by_side()),
        )
        state, history, _ = cj.run_rounds(
            algorithm,
            dataset,
            cj.init_run(algorithm, dataset, params, selector=plan.selector),
            key,
            num_rounds=preset.rounds,
            selector=plan.selector,
            weighting="uniform",
        )
        unknown = jnp.full(preset.rounds, jnp.nan)
        info = history.info.server[0] if clips else None
        return Trained(
            state.server.params,
            unknown if info is None else info.max_norm,
            unknown if info is None else info.fraction_clipped,
        )

    program = OverSeeds(one_seed, setting.num_seeds)
    return program((setting.params, setting.train, setting.keys, setting.stimuli))


def contend(
    setting: Setting,
    evaluator: Evaluator,
    contender: Contender,
    budget: Budget,
    preset: Preset,
    *,
    delta: float,
    max_norm: float | None,
    steps: int,
    told: tuple[int, ...],
) -> dict[str, Any]:
    """Runs one algorithm under one budget.

    Args:
      setting: what is given.
      evaluator: of the setting.
      contender: the algorithm.
      budget: what may be given away.
      preset: hyper-parameters.
      delta: of the promise.
      max_norm: fixed clip norm, or None.
      steps: adaptation steps of new clients.
      told: steps after which they are scored.

    Returns:
      The record, see `experiments.private.summary`.
    """
    started = time.perf_counter()
    plan = make_plan(budget, setting.num_train, preset, delta, max_norm)
    trained = jax.device_get(train(setting, contender, preset, plan, budget.clips))
    adaptation, _ = evaluator.choose(trained.params, steps)
    scores = evaluator.curve(trained.params, setting.new, adaptation, steps, told).pooled[metric_name(setting)]
    size = sum(x.size for x in jax.tree.leaves(setting.params)) // setting.num_seeds
    norm = float(np.mean(trained.max_norm[:, -10:]))
    noise = plan.noise_multiplier * math.sqrt(size) / plan.expected_cohort
    return {
        "algorithm": contender.label,
        "budget": budget.label,
        "epsilon": plan.epsilon if budget.clips and math.isfinite(plan.epsilon) else None,
        "noise_multiplier": plan.noise_multiplier,
        "overflow_probability": plan.overflow_probability,
        "expected_cohort": plan.expected_cohort,
        "max_norm": norm if budget.clips else None,
        "clipped": float(np.mean(trained.clipped)) if budget.clips else None,
        "noise_to_norm": noise,
        "scores": np.asarray(scores, np.float64).tolist(),
        "adaptation": str(adaptation),
        "seconds": round(time.perf_counter() - started, 1),
    }
