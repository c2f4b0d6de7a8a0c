"""Differentially private federated learning: accuracy of new clients beside epsilon, for several budgets.

Every run is Poisson-sampled, clipped to an adaptive norm and noised by one plan, `cedarjax.privacy.poisson_plan`, from
which epsilon comes as well. The same command again goes on with an interrupted run, and with other algorithms or
budgets it adds to what is there.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments import datasets, files
from experiments.cedar import use_all_cores
from experiments.evaluation import Evaluator, metric_name
from experiments.one_by_one import one_by_one
from experiments.options import asked_for, check_names, exit_status, open_run
from experiments.private.contenders import CONTENDERS
from experiments.private.problem import PRESETS, Preset, load, make_problem
from experiments.private.program import budgets, contend
from experiments.private.summary import print_summary, write_figure, write_summary

STEPS = (0, 1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Config:
    """Algorithms x budgets x seeds on one federation."""

    dataset: str = "digits"
    """`digits`, as many small tasks; or another set of `experiments.datasets` with the clients that it has, `wisdm`."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    algorithms: tuple[str, ...] = tuple(CONTENDERS)
    """Algorithms by name: fedavg, per_fedavg, cedar (which uploads every layer), cedar_filtered."""
    epsilons: tuple[float, ...] = (10.0, 2.0)
    """Budgets, beside no privacy and clipping without noise."""
    num_clients: int = 1000
    """Training clients (digits)."""
    delta: float | None = None
    """Chance with which the promise may fail; default: the number of clients to the power of -1.1."""
    max_norm: float | None = None
    """Fixed clip norm; default: it follows the median length of the uploads."""
    rounds: int | None = None
    """Rounds of training; default: the preset's."""
    participation: float | None = None
    """Chance of each client to take part in a round; default: the preset's."""
    seeds: int = 3
    """Seeds; each draws the clients, the model, the cohorts and the noise."""
    out: Path | None = None
    """Run directory; default: runs/private-DATASET."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.out or Path("runs") / f"private-{self.dataset}"

    @property
    def preset(self) -> Preset:
        """Hyper-parameters, with what was overridden."""
        preset = PRESETS.get(self.dataset, PRESETS["wisdm"])
        given: dict[str, Any] = {"rounds": self.rounds, "participation": self.participation}
        return preset._replace(**{name: value for name, value in given.items() if value is not None})

    def check(self) -> None:
        """Raises a ValueError that says which option is out of range."""
        for name in ("seeds", "num_clients"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.preset.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.preset.rounds}.")
        if not 0 < self.preset.participation <= 1:
            raise ValueError(f"participation must satisfy 0 < participation <= 1, got {self.preset.participation}.")
        if any(not epsilon > 0 for epsilon in self.epsilons):
            raise ValueError(f"epsilons must be above 0, got {self.epsilons}.")
        check_names("algorithms", self.algorithms, CONTENDERS)


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs what the options describe and prints the report.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.private.summary`.

    Raises:
      ValueError: if an option is out of range.
      Interrupted: after Ctrl-C; what was done is stored.
    """
    config.check()
    preset = config.preset
    setting = make_problem(config.dataset, config.num_clients, range(config.seeds), preset, config.data_dir)
    delta = setting.num_train**-1.1 if config.delta is None else config.delta
    evaluator = Evaluator(setting)
    places = open_run(config.folder, asked_for(config), may_differ=("algorithms", "epsilons"))
    pairs = {
        f"{name}-{budget.key}": (CONTENDERS[name], budget)
        for name in config.algorithms
        for budget in budgets(config.epsilons)
    }

    def work(name: str) -> dict[str, Any]:
        contender, budget = pairs[name]
        return contend(
            setting,
            evaluator,
            contender,
            budget,
            preset,
            delta=delta,
            max_norm=config.max_norm,
            steps=STEPS[-1],
            told=STEPS,
        )

    records = one_by_one(
        {name: f"{contender.label}, {budget.label}" for name, (contender, budget) in pairs.items()},
        work,
        places.root / "contenders",
        console,
        told=lambda record: f"{record['algorithm']}, {record['budget']}",
    )
    share = f"{preset.participation:.0%}"
    results = {
        "title": f"{config.dataset}: {setting.num_train} clients, {share} in each of {preset.rounds} rounds",
        "metric": metric_name(setting),
        "steps": list(STEPS),
        "delta": delta,
        "num_clients": setting.num_train,
        "runs": records,
        "config": asked_for(config),
        "dataset": datasets.summary(load(config.dataset, config.num_clients, 0, config.data_dir)),
    }
    write_figure(results, places.plots / "epsilon.png")
    files.write_json(places.results, results)
    report = write_summary(results, places.root)
    print_summary(results, console)
    console.print(f"\nReport and figure: {report}", markup=False, highlight=False, soft_wrap=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, prog="python -m experiments.private", args=arguments, description=__doc__)

    def work() -> None:
        use_all_cores(config.seeds)
        run(config, Console())

    return exit_status(work)
