"""Compares what clients can send in place of their whole update: accuracy against uploaded bytes.

All contenders do the same local work in the same rounds with the same clients. The same command again goes on with an
interrupted run, and with other names it adds to what is there.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from experiments import datasets, files
from experiments.bytes.contenders import CONTENDERS, RATES
from experiments.bytes.problem import Problem, make_problem
from experiments.bytes.program import contend
from experiments.bytes.summary import plot_curves, plot_front, print_summary, write_summary
from experiments.cedar import use_all_cores
from experiments.one_by_one import one_by_one
from experiments.options import asked_for, check_names, exit_status, open_run
from experiments.setting import ModelName


@dataclasses.dataclass(frozen=True)
class Config:
    """Compressors x rates x seeds on one data set."""

    dataset: str = "digits"
    """Data set of classification whose classes mean the same to all clients, see `experiments.datasets`."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    algorithms: tuple[str, ...] | None = None
    """Contenders by name; default: all."""
    seeds: int = 3
    """Seeds; each draws the clients, the model and the batches."""
    rounds: int = 100
    """Rounds of training."""
    points: int = 20
    """Times at which the model is tested; must divide the rounds."""
    participation: float = 0.2
    """Share of the training clients in a round."""
    alpha: float | None = None
    """Concentration of the Dirichlet draw that splits the rows (digits, mnist, tabular sets); digits: default .3."""
    max_per_client: int | None = None
    """Examples kept of a client (mnist)."""
    batch_size: int = 10
    """Examples per batch."""
    hidden: tuple[int, ...] = (64, 64, 64)
    """Widths of the MLP's blocks, which are the layers that Cedar's filter judges."""
    model: ModelName | None = "mlp"
    """Kind of model."""
    out: Path | None = None
    """Run directory; default: runs/bytes-DATASET."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.out or Path("runs") / f"bytes-{self.dataset}"

    def load(self, seed: int) -> datasets.Federation:
        """The federation of a seed."""
        options: dict[str, Any] = {"alpha": self.alpha, "max_per_client": self.max_per_client}
        if self.dataset == "digits" and self.alpha is None:
            options["alpha"] = 0.3
        return datasets.load(self.dataset, data_dir=self.data_dir, seed=seed, **options)

    def check(self) -> None:
        """Raises a ValueError that says which option is out of range."""
        for name in ("seeds", "rounds", "points", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.rounds % self.points:
            raise ValueError(f"points must divide the rounds, got {self.points} and {self.rounds}.")
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation must be above 0 and at most 1, got {self.participation}.")
        if self.algorithms is not None:
            check_names("algorithms", self.algorithms, CONTENDERS)

    def problem(self) -> Problem:
        """What all contenders are given."""
        return make_problem(
            self.load,
            self.seeds,
            self.hidden,
            self.model,
            participation=self.participation,
            rounds=self.rounds,
            points=self.points,
            batch_size=self.batch_size,
        )


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs what the options describe and prints the report.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.bytes.summary`.

    Raises:
      ValueError: if an option is out of range.
      Interrupted: after Ctrl-C; what was done is stored.
    """
    config.check()
    problem = config.problem()
    names = config.algorithms or tuple(CONTENDERS)
    places = open_run(config.folder, asked_for(config), may_differ=("algorithms",))
    records = one_by_one(
        {name: CONTENDERS[name].label for name in names},
        lambda name: contend(name, problem),
        places.root / "contenders",
        console,
        told=lambda record: f"{record['name']} {np.mean(record['accuracy'], axis=0)[-1]:.3f}",
    )
    results = {
        "title": f"{config.dataset}: accuracy against bytes, {problem.setting.num_train} clients, {problem.cohort} of "
        f"them in each of {problem.rounds} rounds",
        "runs": records,
        "config": asked_for(config),
        "dataset": datasets.summary(config.load(0)),
    }
    plot_front(places.plots / "front.png", results)
    plot_curves(places.plots / "curves.png", results)
    files.write_json(places.results, results)
    report = write_summary(results, places.root)
    print_summary(results, console)
    console.print(f"\nReport and plots: {report}", markup=False, highlight=False, soft_wrap=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, prog="python -m experiments.bytes", args=arguments, description=__doc__)

    def work() -> None:
        use_all_cores(len(RATES) * config.seeds)
        run(config, Console())

    return exit_status(work)
