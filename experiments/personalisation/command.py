"""Compares algorithms for meta-learning and personalisation on clients that trained and on clients that are new.

Every algorithm has one learning rate; it and the way to adapt are chosen on validation clients, from grids of the same
size for all. The same command again goes on with an interrupted run, and with other algorithms it adds to what is
there.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from experiments import datasets, files, page, plots
from experiments.cedar import use_all_cores
from experiments.comparison import told_steps
from experiments.datasets import Federation
from experiments.evaluation import metric_name
from experiments.options import asked_for, check_names, exit_status, open_run
from experiments.personalisation.contenders import CLIENT_RATES, CONTENDERS
from experiments.personalisation.figures import plot_standing
from experiments.personalisation.problem import Problem, make_problem
from experiments.personalisation.tournament import SCRATCH, Tournament
from experiments.report import print_report
from experiments.setting import DEFAULT, PRESETS, ModelName

NAMES = (SCRATCH, *CONTENDERS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Algorithms x learning rates x seeds on one data set."""

    dataset: str = "digits"
    """Data set, see `experiments.datasets`."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    algorithms: tuple[str, ...] | None = None
    """Algorithms by name; default: all that are defined for the data set."""
    seeds: int = 3
    """Seeds; each draws the roles of the clients, the model and the batches."""
    rounds: int | None = None
    """Rounds of training; default: chosen for the data set."""
    steps: int = 20
    """Adaptation steps."""
    participation: float | None = None
    """Share of the training clients in a round; default: chosen for the data set."""
    model: ModelName | None = None
    """Kind of model; default: what fits the inputs."""
    inner_rate: float | None = None
    """Rate of the inner steps of meta-gradients; default: chosen for the data set."""
    alpha: float | None = None
    """Concentration of the Dirichlet draw that splits the rows (digits, mnist, tabular sets)."""
    ways: int | None = None
    """Classes of a client (digits, omniglot)."""
    shots: int | None = None
    """Labelled examples of a new client (per class in classification)."""
    max_per_client: int | None = None
    """Examples kept of a client (beijing-air, mnist)."""
    out: Path | None = None
    """Run directory; default: runs/personalisation-DATASET."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        kind = (f"-{self.ways}way" if self.ways else "") + (f"-alpha{self.alpha:g}" if self.alpha else "")
        return self.out or Path("runs") / f"personalisation-{self.dataset}{kind}"

    def load(self, seed: int) -> Federation:
        """The federation of a seed."""
        options: dict[str, Any] = {
            "alpha": self.alpha,
            "num_ways": self.ways,
            "num_shots": self.shots,
            "max_per_client": self.max_per_client,
        }
        return datasets.load(self.dataset, data_dir=self.data_dir, seed=seed, **options)

    def check(self) -> None:
        """Raises a ValueError that says which option is out of range."""
        for name, least in (("seeds", 1), ("steps", 1), ("rounds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if self.participation is not None and not 0 < self.participation <= 1:
            raise ValueError(f"participation must be above 0 and at most 1, got {self.participation}.")
        if self.inner_rate is not None and not self.inner_rate > 0:
            raise ValueError(f"inner_rate must be above 0, got {self.inner_rate}.")
        if self.algorithms is not None:
            check_names("algorithms", self.algorithms, NAMES)


def results_of(config: Config, problem: Problem, records: list[dict[str, Any]], info: dict[str, Any]) -> dict[str, Any]:
    """The results as they are stored, see `experiments.report`.

    Args:
      config: what was asked for.
      problem: what was given.
      records: one a contender.
      info: summary of the data.

    Returns:
      The results, without plots.
    """
    metric = metric_name(problem.setting)
    own = sorted(((float(np.mean(r["own_curve"], axis=0)[0]), r["name"]) for r in records), reverse=True)
    tuned = [r for r in records if r["key"] != SCRATCH]
    adapted = sorted(((float(np.mean(r["own_curve"], axis=0)[-1]), r["name"]) for r in records), reverse=True)
    notes = [
        f"Clients that trained, on rows held back: best as they are {own[0][1]} ({metric} {own[0][0]:.3f}), then "
        f"{', '.join(f'{name} {score:.3f}' for score, name in own[1:3])}.",
        f"After {config.steps} steps on their own rows: {', '.join(f'{n} {s:.3f}' for s, n in adapted[:3])}.",
        f"{len(tuned)} algorithms, each with {len(next(iter(CONTENDERS.values())).rates)} learning rates and the same "
        "ways to adapt, chosen on validation clients.",
    ]
    return {
        "title": f"{config.dataset}: meta-learning and personalisation, {problem.rounds} rounds",
        "metric": metric,
        "steps": told_steps(config.steps),
        "runs": records,
        "dataset": info,
        "config": run_config(config, problem),
        "notes": notes,
        "plots": {},
    }


def draw(results: dict[str, Any], places: files.RunDir, num_steps: int) -> dict[str, str]:
    """Draws the figures: new clients, the clients that trained, and how both are spread."""
    records = sorted(results["runs"], key=lambda r: -float(np.mean(r["scores"], axis=0)[-1]))
    names = [r["name"] for r in results["runs"]]
    shown = {r["name"] for r in records[:8]}
    steps = np.arange(num_steps + 1)
    drawn: dict[str, str] = {}
    plot_standing(places.plots / "standing.png", results["runs"], results["steps"], metric=results["metric"])
    drawn["All algorithms"] = "plots/standing.png"
    curves = {r["name"]: np.asarray(r["curve"]) for r in results["runs"] if r["name"] in shown}
    plots.plot_adaptation(places.plots / "new.png", steps, curves, metric=results["metric"], order=names)
    drawn["New clients as they adapt, the best eight"] = "plots/new.png"

    def before_and_after(record: dict[str, Any], which: str) -> tuple[np.ndarray, np.ndarray]:
        values = np.asarray(record[which])
        return values[..., 0].ravel(), values[..., 1].ravel()

    spread = {r["name"]: before_and_after(r, "clients") for r in records[:8]}
    plots.plot_spread(places.plots / "clients.png", spread, metric=results["metric"], order=names)
    drawn["Each new client before and after"] = "plots/clients.png"
    best = sorted(results["runs"], key=lambda r: -float(np.mean(r["own_curve"], axis=0)[0]))[:8]
    own = {r["name"]: before_and_after(r, "own_clients") for r in best}
    plots.plot_spread(places.plots / "own.png", own, metric=results["metric"], order=names)
    drawn["Clients that trained, on rows held back, the best eight"] = "plots/own.png"
    return drawn


def run_config(config: Config, problem: Problem) -> dict[str, Any]:
    """What makes a run what it is, as it is stored."""
    given = {name: getattr(problem, name) for name in ("rounds", "cohort", "batch_size", "inner_rate")}
    return {**asked_for(config), **files.plain(given)}


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs what the options describe and prints the report.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.report`.

    Raises:
      ValueError: if an option is out of range.
      Interrupted: after Ctrl-C; what was done is stored.
    """
    config.check()
    asked_for = {name: getattr(config, name) for name in ("participation", "inner_rate", "model")}
    preset = PRESETS.get(config.dataset, DEFAULT)._replace(**{k: v for k, v in asked_for.items() if v is not None})
    problem = make_problem(config.load, range(config.seeds), preset, config.rounds)
    names = config.algorithms or tuple(
        name for name in NAMES if name == SCRATCH or problem.suits(CONTENDERS[name].needs_classes)
    )
    asked = run_config(config, problem)
    places = open_run(config.folder, asked, may_differ=("algorithms",))
    records = Tournament(problem, names, config.steps, places, console).run()
    results = results_of(config, problem, records, datasets.summary(config.load(0)))
    results["plots"] = draw(results, places, config.steps)
    files.write_json(places.results, results)
    page.write_reports(results, places.root)
    print_report(results, console, report=places.root / "report.html")
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, prog="python -m experiments.personalisation", args=arguments, description=__doc__)

    def work() -> None:
        use_all_cores(len(CLIENT_RATES) * config.seeds)
        run(config, Console())

    return exit_status(work)
