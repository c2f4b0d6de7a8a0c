"""Compares servers that wait with servers that do not: simulated time until the model is as good as wanted.

Clients differ in speed, and each from job to job. All servers are given the same clients, the same work, and equally
many jobs. The same command again goes on with an interrupted run, and with other algorithms it adds to what is there.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments import datasets, files
from experiments.asynchrony.contenders import CONTENDERS
from experiments.asynchrony.problem import Problem, make_problem
from experiments.asynchrony.summary import plot_clock, print_summary, write_summary
from experiments.cedar import use_all_cores
from experiments.one_by_one import one_by_one
from experiments.options import asked_for, check_names, exit_status, open_run
from experiments.seeds import OverSeeds


@dataclasses.dataclass(frozen=True)
class Config:
    """Servers x seeds on one clock."""

    dataset: str = "digits"
    """Data set of classification whose classes mean the same to all clients, see `experiments.datasets`."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    algorithms: tuple[str, ...] | None = None
    """Servers by name; default: all."""
    seeds: int = 3
    """Seeds; each draws the clients, how fast they are, the model and the batches."""
    jobs: int = 2000
    """Jobs of clients, the same number for every server."""
    points: int = 40
    """Times at which the model is tested; `active * points` must divide the jobs."""
    active: int = 10
    """Clients that work at the same time."""
    heterogeneity: float = 1.0
    """Standard deviation of the logarithm of the clients' mean seconds, whose median is 1."""
    spread: float = 0.5
    """The same of one client's seconds from job to job."""
    target: float | None = None
    """Accuracy to reach; default: 95 % of the best that any server has at the end."""
    alpha: float | None = None
    """Concentration of the Dirichlet draw that splits the rows (digits, mnist, tabular sets); digits: default .3."""
    learning_rate: float = 0.1
    """Rate of the clients' SGD."""
    batch_size: int = 10
    """Examples per batch."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the MLP's blocks, where the model is an MLP."""
    out: Path | None = None
    """Run directory; default: runs/asynchrony-DATASET."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.out or Path("runs") / f"asynchrony-{self.dataset}"

    def load(self, seed: int) -> datasets.Federation:
        """The federation of a seed."""
        alpha = 0.3 if self.dataset == "digits" and self.alpha is None else self.alpha
        return datasets.load(self.dataset, data_dir=self.data_dir, seed=seed, alpha=alpha)

    def check(self) -> None:
        """Raises a ValueError that says which option is out of range."""
        for name in ("seeds", "jobs", "points", "active", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("heterogeneity", "spread"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.jobs % (self.active * self.points):
            raise ValueError(
                f"jobs must be divisible by active * points = {self.active * self.points}, got {self.jobs}."
            )
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"target must be above 0 and below 1, got {self.target}.")
        if self.algorithms is not None:
            check_names("algorithms", self.algorithms, CONTENDERS)


def contend(name: str, config: Config, problem: Problem) -> dict[str, Any]:
    """Runs one server for all seeds.

    Args:
      name: key of `CONTENDERS`.
      config: the options.
      problem: what is given.

    Returns:
      The record, see `experiments.asynchrony.summary`.
    """
    contender = CONTENDERS[name]
    program = OverSeeds(lambda fleet, _: contender.run(problem, fleet), config.seeds)
    started = time.perf_counter()
    told = jax.device_get(program(problem.fleets))
    size = sum(x[0].nbytes for x in jax.tree.leaves(problem.fleets.params))
    return {
        "name": contender.label,
        "key": name,
        "time": np.asarray(told.time, np.float64).tolist(),
        "accuracy": np.asarray(told.accuracy, np.float64).tolist(),
        "staleness": told.staleness.tolist(),
        "device_bytes": [int(sent) * size for sent in told.messages[:, 0]],
        "cloud_bytes": [int(sent) * size for sent in told.messages[:, 1]],
        "seconds": round(time.perf_counter() - started, 1),
    }


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs what the options describe and prints the report.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.asynchrony.summary`.

    Raises:
      ValueError: if an option is out of range.
      Interrupted: after Ctrl-C; what was done is stored.
    """
    config.check()
    problem = make_problem(
        config.load,
        config.seeds,
        config.hidden,
        heterogeneity=config.heterogeneity,
        spread=config.spread,
        num_active=config.active,
        num_parts=config.points,
        jobs_a_part=config.jobs // config.points,
        batch_size=config.batch_size,
        rate=config.learning_rate,
    )
    if config.active > problem.setting.num_train:
        raise ValueError(f"active must be at most {problem.setting.num_train} (all clients), got {config.active}.")
    names = config.algorithms or tuple(CONTENDERS)
    places = open_run(config.folder, asked_for(config), may_differ=("algorithms", "target"))
    labels = {name: CONTENDERS[name].label for name in names}
    records = one_by_one(
        labels,
        lambda name: contend(name, config, problem),
        places.root / "contenders",
        console,
        told=lambda record: f"{record['name']} {np.mean(record['accuracy'], axis=0)[-1]:.3f}",
    )
    best = max(float(np.mean(record["accuracy"], axis=0)[-1]) for record in records)
    results = {
        "title": f"{config.dataset}, {problem.setting.num_train} clients, {config.active} at once, {config.jobs} jobs",
        "target": round(0.95 * best, 3) if config.target is None else config.target,
        "runs": records,
        "config": asked_for(config),
        "dataset": datasets.summary(config.load(0)),
    }
    plot_clock(places.plots / "clock.png", results)
    files.write_json(places.results, results)
    report = write_summary(results, places.root)
    print_summary(results, console)
    console.print(f"\nReport and plot: {report}", markup=False, highlight=False, soft_wrap=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, prog="python -m experiments.asynchrony", args=arguments, description=__doc__)

    def work() -> None:
        use_all_cores(config.seeds)
        run(config, Console())

    return exit_status(work)
