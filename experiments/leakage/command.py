"""Attacks what clients upload and tells how much of their pictures comes back.

The attacker is the server or whoever reads what it receives: it knows the model, the code, how uploads are masked and
compressed, the order of a client's batches, how many pictures an upload stands for, and, in one of its kinds, other
pictures. The same command again goes on with an interrupted run, and with other rows it adds to what is there.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from cedarjax import core
from experiments import files
from experiments.cedar import use_all_cores
from experiments.leakage.attack import Attacks, blind, originals
from experiments.leakage.contenders import Row, contenders
from experiments.leakage.figures import plot_pictures, plot_psnr
from experiments.leakage.model import ModelName
from experiments.leakage.problem import SIDE, Problem, make_problem
from experiments.leakage.summary import best, print_summary, write_summary
from experiments.one_by_one import one_by_one
from experiments.options import asked_for, check_names, exit_status, open_run

BLIND = "blind"


@dataclasses.dataclass(frozen=True)
class Config:
    """Ways to send x attackers x victims x seeds."""

    dataset: str = "digits"
    """Data set of pictures whose classes mean the same to all clients: digits or mnist."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    model: ModelName = "lenet"
    """A smooth LeNet, which is easiest to attack; the library's MLP or CNN."""
    rows: tuple[str, ...] | None = None
    """Ways to send by name; default: all."""
    seeds: int = 4
    """Seeds; each draws the model and the pictures."""
    victims: int = 2
    """Victims of a seed."""
    steps: int = 300
    """Steps of every search."""
    warm_up: int = 0
    """Steps of training on public pictures before the upload that is attacked; 0: the first round, which leaks most."""
    learning_rate: float = 0.1
    """Rate of the clients' SGD."""
    out: Path | None = None
    """Run directory; default: runs/leakage-DATASET-MODEL."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.out or Path("runs") / f"leakage-{self.dataset}-{self.model}"

    def check(self) -> None:
        """Raises a ValueError that says which option is out of range."""
        for name, least in (("seeds", 1), ("victims", 1), ("steps", 1), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")


def table_of(problem: Problem) -> dict[str, Row]:
    """All rows, for the layers of a model; Cedar's budget is half of the judged bytes, or the largest layer's."""
    params = jax.tree.map(lambda x: x[0], problem.victims.params)
    judged = [name for name in sorted(params) if name != "head"]
    sizes = core.layer_bytes(params, judged)
    budget = max(sum(sizes) // 2, *sizes)
    return contenders([*judged, "head"], budget, budget / sum(sizes))


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs what the options describe and prints the report.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.leakage.summary`.

    Raises:
      ValueError: if an option is out of range.
      Interrupted: after Ctrl-C; what was done is stored.
    """
    config.check()
    problem, told = make_problem(
        config.dataset,
        config.data_dir,
        config.model,
        num_seeds=config.seeds,
        num_victims=config.victims,
        rate=config.learning_rate,
        warm_up=config.warm_up,
    )
    table = table_of(problem)
    names = tuple(dict.fromkeys((BLIND, *(config.rows or table))))
    check_names("rows", names, (BLIND, *table))
    places = open_run(config.folder, asked_for(config), may_differ=("rows",))
    attacks = Attacks(problem, config.steps)
    records = one_by_one(
        {name: table[name].label if name in table else "a blind guess" for name in names},
        lambda name: attacks.run(name, table[name]) if name in table else blind(problem),
        places.root / "rows",
        console,
        told=lambda record: f"{record['name']} {np.mean(best(record)['psnr']):.1f} dB",
    )
    before = f"after {config.warm_up} steps of training" if config.warm_up else "before training"
    results = {
        "title": f"What uploads give away: {config.dataset}, {config.model}, {before}",
        "side": SIDE,
        "true": originals(problem),
        "runs": records,
        "config": asked_for(config),
        "dataset": told,
    }
    plot_pictures(places.plots / "pictures.png", results)
    plot_psnr(places.plots / "psnr.png", results)
    files.write_json(places.results, results)
    report = write_summary(results, places.root)
    print_summary(results, console)
    console.print(f"\nReport and pictures: {report}", markup=False, highlight=False, soft_wrap=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, prog="python -m experiments.leakage", args=arguments, description=__doc__)

    def work() -> None:
        use_all_cores(config.seeds)
        run(config, Console())

    return exit_status(work)
