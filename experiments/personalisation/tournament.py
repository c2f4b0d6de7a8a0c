"""Trains, tunes and scores the contenders one after another; what is done is kept in the run directory."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from cedarjax import metrics
from experiments import files
from experiments.comparison import told_steps
from experiments.evaluation import RATES, Adaptation, chosen_steps, metric_name
from experiments.one_by_one import one_by_one
from experiments.personalisation.contenders import CONTENDERS, Contender
from experiments.personalisation.problem import Problem
from experiments.personalisation.program import Scorer, Trained, shared_bytes, train, untrained

SCRATCH = "scratch"
"""The baseline without any training together."""


class Choice(NamedTuple):
    """What did best on the validation clients."""

    place: int
    """Of the training rate in the contender's grid."""
    adaptation: Adaptation
    """How clients adapt."""
    score: float
    """Mean metric over seeds and the steps that count."""


def choose(problem: Problem, scorer: Scorer, trained: Trained, num_steps: int) -> Choice:
    """Tries every training rate with every way to adapt on the validation clients.

    Args:
      problem: what is given.
      scorer: adapts and scores.
      trained: what training left.
      num_steps: adaptation steps.

    Returns:
      The best pair, the same for all seeds.
    """
    told = chosen_steps(num_steps)
    best = Choice(0, Adaptation("sgd", RATES["sgd"][0]), -np.inf)
    for optimiser, rates in RATES.items():
        for rate in rates:
            pooled, _ = scorer(
                trained.newcomer, problem.setting.validation, optimiser, rate, num_steps, told, one_for_all=True
            )
            scores = np.nan_to_num(pooled, nan=-1e9).mean(axis=(1, 2))
            place = int(scores.argmax())
            if scores[place] > best.score:
                best = Choice(place, Adaptation(optimiser, rate), float(scores[place]))
    return best


def _told(record: dict[str, Any]) -> str:
    """What the progress says of a contender: new clients before and after."""
    last = np.asarray(record["scores"], np.float64).mean(axis=0)
    return f"{record['name']} {last[0]:.3f} -> {last[-1]:.3f}"


class Tournament:
    """Fills the run directory with one file for each contender.

    Args:
      problem: what is given.
      names: keys of `CONTENDERS`, or `"scratch"`.
      num_steps: adaptation steps.
      places: the run directory.
      console: where progress is shown.
    """

    def __init__(self, problem: Problem, names: Sequence[str], num_steps: int, places: files.RunDir, console: Console):
        """Remembers the parts; nothing runs yet."""
        self.problem, self.names, self.num_steps = problem, tuple(names), num_steps
        self.places, self.console = places, console
        self.scorer = Scorer(problem.setting)

    def run(self) -> list[dict[str, Any]]:
        """Does what is missing.

        Returns:
          One record a contender, see `experiments.report`.

        Raises:
          Interrupted: after Ctrl-C, when the contender that was running has been stored.
        """
        labels = {n: CONTENDERS[n].label if n in CONTENDERS else "no training" for n in self.names}
        return one_by_one(labels, self._one, self.places.root / "contenders", self.console, told=_told)

    def _one(self, name: str) -> dict[str, Any]:
        problem, setting = self.problem, self.problem.setting
        contender: Contender | None = CONTENDERS.get(name)
        started = time.perf_counter()
        trained = untrained(problem) if contender is None else train(problem, contender)
        jax.block_until_ready(trained)
        train_seconds = time.perf_counter() - started
        best = choose(problem, self.scorer, trained, self.num_steps)
        chosen = jax.tree.map(lambda x: x[best.place : best.place + 1], trained)
        steps = tuple(range(self.num_steps + 1))
        how = (best.adaptation.optimiser, best.adaptation.learning_rate, self.num_steps, steps)
        pooled, single = (x[0] for x in self.scorer(chosen.newcomer, setting.new, *how, one_for_all=True))
        own, own_single = (x[0] for x in self.scorer(chosen.own, problem.own, *how, one_for_all=False))
        told = told_steps(self.num_steps)

        def worst(clients: Any) -> float:
            return float(np.mean([float(metrics.fairness(one).worst_decile) for one in clients]))

        runs = setting.num_seeds * (1 if contender is None else len(contender.rates))
        sent = None if contender is None else shared_bytes(problem, contender) * problem.cohort * problem.rounds
        rate = "" if contender is None else f"{contender.rates[best.place]:g}"
        return {
            "name": "no training" if contender is None else contender.label,
            "key": name,
            "scores": pooled[:, told].tolist(),
            "curve": pooled.tolist(),
            "clients": single[:, :, [0, -1]].tolist(),
            "own_curve": own.tolist(),
            "own_clients": own_single[:, :, [0, -1]].tolist(),
            "loss": np.asarray(chosen.loss[0], np.float64).tolist(),
            "rate": rate,
            "adaptation": str(best.adaptation),
            "validation": best.score,
            "uploaded_bytes": sent,
            "downloaded_bytes": sent,
            "saved_bytes": None,
            "poisoned_caught": None,
            "honest_dropped": None,
            "train_seconds": round(train_seconds / runs, 2),
            "details": {
                f"own, {metric_name(setting)}": f"{own[:, 0].mean():.3f}",
                "own, adapted": f"{own[:, -1].mean():.3f}",
                "worst 10 %": f"{worst(single[..., -1]):.3f}",
                "rate": rate,
                "adapts by": str(best.adaptation),
                "s a run": f"{train_seconds / runs:.1f}",
            },
        }
