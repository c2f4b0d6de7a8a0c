"""Compares devices that exchange logits with devices that exchange parameters: every user's accuracy, and the bytes.

All clients of the data set take part in every round and are tested on rows of their own that they did not train on. The
same command again goes on with an interrupted run, and with other algorithms it adds to what is there.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments import datasets, files, plots
from experiments.cedar import use_all_cores
from experiments.fedcache.contenders import CONTENDERS
from experiments.fedcache.problem import Problem, make_problem
from experiments.fedcache.summary import print_summary, write_summary
from experiments.one_by_one import one_by_one
from experiments.options import asked_for, check_names, exit_status, open_run
from experiments.seeds import OverSeeds


@dataclasses.dataclass(frozen=True)
class Config:
    """Algorithms x seeds on one fleet."""

    dataset: str = "mnist"
    """Data set of classification whose classes mean the same to all clients, see `experiments.datasets`."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    fleet: Literal["heterogeneous", "homogeneous"] = "heterogeneous"
    """Three architectures in turn, or one for all."""
    algorithms: tuple[str, ...] | None = None
    """Algorithms by name; default: all."""
    seeds: int = 3
    """Seeds; each draws the rows, the models and the batches."""
    rounds: int = 20
    """Rounds, each one pass over every client's rows."""
    points: int = 10
    """Times at which accuracy is taken; must divide the rounds."""
    alpha: float | None = None
    """Concentration of the Dirichlet draw that splits the rows (digits, mnist)."""
    max_per_client: int | None = None
    """Rows kept of a client (mnist); default: 300."""
    num_related: int = 16
    """Related samples of each sample."""
    embedding_dim: int = 256
    """Features of the random layer by which samples are related."""
    encoder: Path | None = None
    """File of a trained network to relate samples by in its place, see `experiments.fedcache.encoders`."""
    index: Literal["exact", "hnsw"] = "exact"
    """How related samples are found: all pairs of a class, or a graph on the host (needs hnswlib)."""
    out: Path | None = None
    """Run directory; default: runs/fedcache-DATASET-FLEET."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.out or Path("runs") / f"fedcache-{self.dataset}-{self.fleet}"

    def load(self, seed: int) -> datasets.Federation:
        """The federation of a seed."""
        kept = (self.max_per_client or 300) if self.dataset == "mnist" else self.max_per_client
        options: dict[str, Any] = {"alpha": self.alpha, "max_per_client": kept}
        return datasets.load(self.dataset, data_dir=self.data_dir, seed=seed, **options)

    def check(self) -> None:
        """Raises a ValueError that says which option is out of range."""
        for name in ("seeds", "rounds", "points", "num_related", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.rounds % self.points:
            raise ValueError(f"points must divide rounds, got {self.points} and {self.rounds}.")
        if self.algorithms is not None:
            check_names("algorithms", self.algorithms, CONTENDERS)


def contend(name: str, config: Config, problem: Problem) -> dict[str, Any]:
    """Runs one algorithm for all seeds.

    Args:
      name: key of `CONTENDERS`.
      config: the options.
      problem: what is given.

    Returns:
      The record, see `experiments.fedcache.summary`.
    """
    contender = CONTENDERS[name]
    rounds = config.rounds // config.points
    program = OverSeeds(lambda one, _: contender.run(problem, one, config.points, rounds), config.seeds)
    arguments = (problem.params, problem.train, problem.test, problem.relations, problem.keys)
    started = time.perf_counter()
    told = jax.device_get(program(arguments))
    seconds = time.perf_counter() - started
    sent = [[contender.num_bytes(problem, int(count)) for count in counts] for counts in told.exchanged]
    totals = {
        kind: [sum(int(getattr(one, kind)) for one in clients) for clients in sent]
        for kind in ("once", "up", "down", "down_raw")
    }
    return {
        "name": contender.label,
        "key": name,
        "curve": np.asarray(told.accuracy.mean(axis=2), np.float64).tolist(),
        "clients": np.asarray(told.accuracy[:, -1], np.float64).tolist(),
        "bytes": totals,
        "seconds": round(seconds, 1),
    }


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs what the options describe and prints the report.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.fedcache.summary`.

    Raises:
      ValueError: if an option is out of range.
      Interrupted: after Ctrl-C; what was done is stored.
    """
    config.check()
    problem = make_problem(
        config.load,
        config.seeds,
        config.fleet,
        num_related=config.num_related,
        embedding_dim=config.embedding_dim,
        encoder_file=config.encoder,
        index=config.index,
    )
    names = config.algorithms or tuple(CONTENDERS)
    places = open_run(config.folder, asked_for(config), may_differ=("algorithms",))
    labels = {name: CONTENDERS[name].label for name in names}
    records = one_by_one(
        labels,
        lambda name: contend(name, config, problem),
        places.root / "contenders",
        console,
        told=lambda record: f"{record['name']} {np.mean(record['curve'], axis=0)[-1]:.3f}",
    )
    points = np.arange(1, config.points + 1) * (config.rounds // config.points)
    results = {
        "title": f"{config.dataset}, {config.fleet} fleet of {problem.num_clients} clients, {config.rounds} rounds",
        "rounds": points.tolist(),
        "runs": records,
        "config": asked_for(config),
        "dataset": datasets.summary(config.load(0)),
        "fleet": {name: problem.num_bytes(name) for name in problem.fleet},
    }
    curves = {record["name"]: np.asarray(record["curve"]) for record in records}
    plots.plot_learning(places.plots / "learning.png", points, curves, metric="user accuracy")
    sent = {
        record["name"]: (np.asarray(record["bytes"]["once"])[:, None] + np.outer(record["bytes"]["up"], points), curve)
        for record, curve in zip(records, curves.values(), strict=True)
        if record["key"] != "alone"
    }
    if sent:
        plots.plot_bytes(places.plots / "bytes.png", sent, metric="user accuracy", is_log=True)
    files.write_json(places.results, results)
    report = write_summary(results, places.root)
    print_summary(results, console)
    console.print(f"\nReport and plots: {report}", markup=False, highlight=False, soft_wrap=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, prog="python -m experiments.fedcache", args=arguments, description=__doc__)

    def work() -> None:
        use_all_cores(config.seeds)
        run(config, Console())

    return exit_status(work)
