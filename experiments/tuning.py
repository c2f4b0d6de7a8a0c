"""Learning rates by validation clients: the same grid and the same budget for every algorithm."""

from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.comparison import Plan, default_adaptation
from experiments.evaluation import Evaluator, metric_name
from experiments.setting import Setting
from experiments.training import Trainer

GRID = (1e-3, 3e-3, 1e-2)


def tune(setting: Setting, plan: Plan, console: Console) -> dict[str, Any]:
    """Trains every variant with every rate and scores it on the validation clients only.

    Args:
      setting: data, model, seeds.
      plan: variants, rounds and adaptation steps.
      console: where the table is printed.

    Returns:
      Variant name to `{rate: score}`.
    """
    evaluator = Evaluator(setting)
    table = Table("variant", *(f"{rate:g}" for rate in GRID), title=f"{metric_name(setting)} of validation clients")
    scores: dict[str, dict[float, float]] = {}
    for variant in (v for v in plan.variants if v.algorithm != "scratch"):
        scores[variant.name] = {}
        for rate in GRID:
            trainer = Trainer(setting, plan.preset, variant, rate)
            state, _ = trainer.segment(trainer.init(), plan.rounds)
            own = default_adaptation(plan.preset, variant, rate)
            _, scores[variant.name][rate] = evaluator.choose(state.server.params, plan.steps, (own,))
            console.print(f"{variant.name} {rate:g}: {scores[variant.name][rate]:.3f}", highlight=False)
        table.add_row(variant.name, *(f"{score:.3f}" for score in scores[variant.name].values()))
    console.print(table)
    return scores
