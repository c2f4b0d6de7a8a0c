"""Tries attacks on aggregation rules over fractions of attackers and degrees of heterogeneity, and reports the worst.

`python -m experiments.robustness` takes some minutes; `--full` tries everything. The same command again goes on with an
interrupted run, and with other rules, attacks or fractions it adds to what is there.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from experiments import files
from experiments.cedar import use_all_cores
from experiments.comparison import Interrupted
from experiments.options import check_names, exit_status, open_run
from experiments.robustness.contenders import ATTACKS, DEFAULT_RULES, RULES
from experiments.robustness.grid import TAIL, Grid, Runner
from experiments.robustness.heatmap import plot_attacks, plot_worst
from experiments.robustness.problem import SETUPS, Problem, Setup, make_problem, read_examples
from experiments.robustness.summary import baseline, print_summary, worst_cases, write_summary

MAY_DIFFER = ("rules", "attacks", "fractions")
FULL = {"rules": tuple(RULES), "fractions": (0.1, 0.2, 0.3, 0.4), "alphas": (0.1, 0.3, 1.0, 10.0, 100.0), "seeds": 5}
DEFAULT = {"rules": DEFAULT_RULES, "fractions": (0.1, 0.3), "alphas": (0.1, 1.0, 100.0), "seeds": 3}


@dataclasses.dataclass(frozen=True)
class Config:
    """Rules x attacks x fractions of attackers x heterogeneity."""

    dataset: Literal["digits", "mnist", "wisdm"] = "digits"
    """Data set."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    full: bool = False
    """All rules, four fractions, five alphas, five seeds, as far as they are not given."""
    rules: tuple[str, ...] | None = None
    """Rules by name."""
    attacks: tuple[str, ...] | None = None
    """Attacks by name; default: all."""
    fractions: tuple[float, ...] | None = None
    """Shares of the clients that attack, below one half; rules that need it are told the number."""
    alphas: tuple[float, ...] | None = None
    """Concentrations per class of the Dirichlet split; small ones leave a client few classes."""
    seeds: int | None = None
    """Seeds; each draws the split, the attackers, the model and the batches."""
    clients: int = 20
    """Clients, all of which take part in every round."""
    rounds: int | None = None
    """Rounds of training; default: chosen for the data set."""
    learning_rate: float | None = None
    """Rate of the clients' SGD; default: chosen for the data set."""
    radius: float | None = None
    """Radius of centred clipping; default: chosen for the data set."""
    out: Path | None = None
    """Run directory; default: runs/robustness-DATASET, with -full."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.out or Path("runs") / f"robustness-{self.dataset}{'-full' if self.full else ''}"

    @property
    def grid(self) -> Grid:
        """What is tried on what; a ValueError says which option is out of range."""
        defaults: dict[str, Any] = FULL if self.full else DEFAULT
        defaults = defaults | {"attacks": tuple(ATTACKS)}
        chosen = {name: value if (value := getattr(self, name)) is not None else defaults[name] for name in defaults}
        check_names("rules", chosen["rules"], RULES)
        check_names("attacks", chosen["attacks"], ATTACKS)
        grid = Grid(
            rules=chosen["rules"],
            attacks=chosen["attacks"],
            fractions=chosen["fractions"],
            alphas=chosen["alphas"],
            num_seeds=chosen["seeds"],
            num_clients=self.clients,
        )
        _check(grid)
        return grid

    @property
    def setup(self) -> Setup:
        """Hyper-parameters; a ValueError says which option is out of range."""
        given = {name: getattr(self, name) for name in ("rounds", "learning_rate", "radius")}
        for name, value in given.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}.")
        return SETUPS[self.dataset]._replace(**{name: value for name, value in given.items() if value is not None})


def _check(grid: Grid) -> None:
    if grid.num_seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {grid.num_seeds}.")
    if grid.num_clients < 3:
        raise ValueError(f"clients must be at least 3, got {grid.num_clients}.")
    for name, values in (("fractions", grid.fractions), ("alphas", grid.alphas)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be at least one number, all different, got {values}.")
    for alpha in grid.alphas:
        if not 0 < alpha < math.inf:
            raise ValueError(f"alphas must be above 0 and finite, got {alpha}.")
    for fraction in grid.fractions:
        number = grid.num_byzantine(fraction) if 0 < fraction < 0.5 else 0
        if not 1 <= number < grid.num_clients / 2:
            raise ValueError(
                f"fractions must be above 0 and below 0.5, and at least one and less than half of the "
                f"{grid.num_clients} clients, got {fraction}."
            )
    numbers = [grid.num_byzantine(fraction) for fraction in grid.fractions]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"fractions must give different numbers of attackers, got {grid.fractions}: {numbers}.")
    if not grid.groups:
        raise ValueError(f"rules must hold one that is defined for {grid.num_clients} clients, got {grid.rules}.")


def collect(config: Config, grid: Grid, setup: Setup, problem: Problem, runner: Runner) -> dict[str, Any]:
    """The results as they are stored, see `experiments.robustness.summary`."""
    done, programs = runner.log()
    cells = [
        {name: value for name, value in done[cell].items() if name not in ("kind", "curve")}
        for group in grid.groups
        for cell in grid.cells(group)
    ]
    results: dict[str, Any] = {
        "title": f"Rules against attacks: {config.dataset}, {grid.num_clients} clients, {setup.rounds} rounds",
        "name": config.dataset,
        "dataset": problem.info,
        "config": run_config(grid, setup, config),
        "setup": setup._asdict(),
        "rules": list(grid.rules),
        "attacks": list(grid.attacks),
        "fractions": list(grid.fractions),
        "alphas": list(grid.alphas),
        "num_byzantine": [grid.num_byzantine(fraction) for fraction in grid.fractions],
        "num_clients": grid.num_clients,
        "rounds": setup.rounds,
        "tail": min(TAIL, setup.rounds),
        "cells": cells,
        "programs": {
            "compiled": len(programs),
            "compile_seconds": round(sum(record["seconds"] for record in programs), 1),
            "run_seconds": round(sum(cell["seconds"] for cell in cells), 1),
        },
    }
    results |= {"worst": worst_cases(results), "baseline": baseline(results), "plots": {}}
    return results


def run_config(grid: Grid, setup: Setup, config: Config) -> dict[str, Any]:
    """What makes a run what it is, as it is stored."""
    return files.plain({"dataset": config.dataset} | dataclasses.asdict(grid) | setup._asdict())


def run(config: Config, console: Console) -> dict[str, Any]:
    """Fills the grid that the options describe and reports on it.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.robustness.summary`.

    Raises:
      ValueError: if an option is out of range.
      Interrupted: after Ctrl-C; what was done is stored.
    """
    grid, setup = config.grid, config.setup
    examples = read_examples(config.dataset, config.data_dir)
    problem = make_problem(
        examples, setup.hidden, num_clients=grid.num_clients, alphas=grid.alphas, num_seeds=grid.num_seeds
    )
    places = open_run(config.folder, run_config(grid, setup, config), may_differ=MAY_DIFFER)
    runner = Runner(grid, problem, setup, places, console)
    try:
        runner.run()
    except Interrupted as stop:
        console.print(f"\nStopped: {stop}. The same command goes on with {places.root}.", soft_wrap=True)
        raise
    results = collect(config, grid, setup, problem, runner)
    plot_worst(places.plots / "worst.png", results)
    results["plots"]["The worst case of every rule"] = "plots/worst.png"
    for alpha in grid.alphas:
        name = f"plots/alpha-{alpha:g}.png"
        plot_attacks(places.root / name, results, alpha)
        results["plots"][f"Rules against attacks, alpha {alpha:g}"] = name
    files.write_json(places.results, results)
    report = write_summary(results, places.root)
    print_summary(results, console)
    console.print(f"\nReport and heat maps: {report}", markup=False, highlight=False, soft_wrap=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, prog="python -m experiments.robustness", args=arguments, description=__doc__)

    def work() -> None:
        use_all_cores(len(config.grid.alphas) * config.grid.num_seeds)
        run(config, Console())

    return exit_status(work)
