"""Trains Cedar and its baselines on a data set and reports on clients that never trained.

`python -m experiments.cedar --help` lists the options, `--dataset wisdm --suite filter` runs a suite of variants, and
`--resume RUN` goes on with an interrupted run, bit for bit.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console

from experiments import files
from experiments.comparison import Comparison, Interrupted, Plan
from experiments.datasets import LOADERS, Federation, load, load_npz, summary
from experiments.options import exit_status
from experiments.report import print_report
from experiments.setting import DEFAULT, PRESETS, make_setting
from experiments.tuning import tune
from experiments.variants import SUITE_SETTINGS, SUITES, Variant

NOT_STORED = ("out", "resume", "list", "tune", "data_dir")
DEMO_TITLE = "Digits as tasks: 100 clients name 5 of 10 digits in a private order; new ones have one image per class"


@dataclasses.dataclass(frozen=True)
class Config:
    """Federated meta-learning over simulated IoT clients: train, upload what matters, screen, personalise."""

    dataset: str = "digits"
    """Name of a data set; see `--list`."""
    data: Path | None = None
    """One's own data: an .npz with x [n, ...], y [n], client_id [n], optional split [n] (1 = new client)."""
    task: Literal["classification", "regression"] | None = None
    """Task of one's own data; told by the dtype of y by default."""
    data_dir: Path | None = None
    """Folder of the sets that are not embedded; default: $CEDARJAX_DATA, else shared/data beside this repository."""
    alpha: float | None = None
    """Concentration of the Dirichlet split (tabular sets, mnist)."""
    heterogeneity: Literal["plain", "rotation", "labels"] | None = None
    """What is private to every wearer (wisdm)."""
    suite: Literal["algorithms", "demo", "filter", "screening"] | None = None
    """A prepared set of variants; default: those of --algorithms."""
    algorithms: tuple[Literal["cedar", "fedavg", "fedprox", "reptile", "maml", "fomaml", "scratch"], ...] = (
        "cedar",
        "fedavg",
        "scratch",
    )
    """Algorithms to compare."""
    budget: float | None = None
    """Bytes that a client may upload for its judged layers each round, as a share of all their bytes."""
    skip: int | None = None
    """Judged layers that a client leaves out each round."""
    score: Literal["rcs", "update_norm", "fisher", "taylor", "cosine", "random"] = "rcs"
    """Importance of a layer."""
    carry: float = 0.0
    """Unspent bytes that a client may carry into its next round, as a share of the budget."""
    server: Literal["mean", "similarity", "screening"] = "mean"
    """Aggregation: the mean, Cedar's similarity weights, or these with detection."""
    min_gap: float = 0.3
    """Least gap between the clusters for detection to drop the lower one."""
    attack: Literal["none", "sign_flip", "gaussian", "label_flip"] = "none"
    """Simulated attack."""
    attack_fraction: float = 0.2
    """Share of the training clients that attack."""
    attack_scale: float = 5.0
    """Scale of sign_flip, standard deviation of gaussian."""
    seeds: int = 3
    """Seeds; each draws the clients' roles, the model and the cohorts anew."""
    rounds: int | None = None
    """Rounds of training; default: chosen for the data set."""
    participation: float | None = None
    """Share of the training clients in a round."""
    batch_size: int | None = None
    """Examples per batch."""
    epochs: int | None = None
    """Passes over a client's data in a round."""
    learning_rate: float | None = None
    """Rate of every algorithm's Adam; default: chosen on validation clients."""
    inner_rate: float | None = None
    """Rate of the MAMLs' inner step."""
    adapt_steps: int = 20
    """Adaptation steps on new clients."""
    tune: bool = False
    """Try learning rates on the validation clients and print the table in place of the comparison."""
    out: Path = Path("runs")
    """Folder of runs."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run directory to go on with."""
    list: bool = False
    """List the data sets and leave."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The rows of the table."""
        if self.suite is not None:
            return SUITES[self.suite]()
        options = dataclasses.asdict(self)
        shared = {name: options[name] for name in ("budget", "score", "carry", "server", "min_gap")}
        shared |= {name: options[name] for name in ("attack", "attack_fraction", "attack_scale")}
        return tuple(Variant(name, name, num_skipped=self.skip, **shared) for name in self.algorithms)


def load_federation(config: Config, seed: int) -> Federation:
    """The federation that the options ask for."""
    if config.data is not None:
        return load_npz(config.data, task=config.task, seed=seed)
    return load(
        config.dataset, data_dir=config.data_dir, seed=seed, alpha=config.alpha, heterogeneity=config.heterogeneity
    )


def make_plan(config: Config, federation: Federation, title: str) -> Plan:
    """Fills in what the options leave open with the data set's preset."""
    preset = PRESETS.get(config.dataset, DEFAULT) if config.data is None else DEFAULT
    preset = preset._replace(**SUITE_SETTINGS.get(config.suite or "", {}))
    given = {name: getattr(config, name) for name in ("participation", "batch_size", "epochs", "inner_rate", "rounds")}
    preset = preset._replace(**{name: value for name, value in given.items() if value is not None})
    return Plan(
        title=title,
        variants=config.variants,
        preset=preset,
        rounds=preset.rounds,
        steps=config.adapt_steps,
        learning_rate=config.learning_rate,
        dataset=summary(federation),
        config=run_config(config),
        notes=federation.notes,
    )


def run_config(config: Config) -> dict[str, Any]:
    """The options that make a run what it is, as they are stored."""
    options = dataclasses.asdict(config)
    for name in NOT_STORED:
        options.pop(name)
    return files.plain({name: str(value) if isinstance(value, Path) else value for name, value in options.items()})


def resumed(config: Config) -> Config:
    """The options of the run that is resumed.

    Args:
      config: the options of the command line, with `resume`.

    Returns:
      The stored options, beside those that say where things are.

    Raises:
      files.RunDirError: if there is no such run, or an option is given that differs from the stored one.
    """
    assert config.resume is not None
    path = files.run_dir(config.resume).config
    if not path.exists():
        raise files.RunDirError(f"resume must name a run directory, got {config.resume}: {path.name} is absent.")
    stored, given, default = files.read_json(path), run_config(config), run_config(Config())
    for name, value in given.items():
        if value not in (default[name], stored.get(name)):
            raise files.RunDirError(f"{name} must be left out or be {stored.get(name)!r} as in the run, got {value!r}.")
    stored["algorithms"] = tuple(stored["algorithms"])
    stored["data"] = None if stored["data"] is None else Path(stored["data"])
    return dataclasses.replace(config, **stored)


def use_all_cores(seeds: int) -> None:
    """One CPU device per core, up to the number of seeds, and compiled programs kept between runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", max(1, min(cores, seeds)))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cedarjax" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs the comparison that the options describe and prints its report.

    Args:
      config: the options.
      console: where to print.

    Returns:
      The results, see `experiments.report`.
    """
    config = config if config.resume is None else resumed(config)
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}.")
    use_all_cores(config.seeds)
    federation = load_federation(config, 0)
    title = f"{federation.name}: {federation.task} on clients that never trained"
    plan = make_plan(config, federation, DEMO_TITLE if config.suite == "demo" else title)
    setting = make_setting(lambda seed: load_federation(config, seed), range(config.seeds), plan.preset.hidden)
    if config.tune:
        return tune(setting, plan, console)
    if config.resume is not None:
        places = files.resume_run(config.resume, plan.config)
    else:
        places = files.start_run(files.number_run_dir(config.out, federation.name), plan.config)
    console.print(f"[bold]{plan.title}[/]  ({config.seeds} seeds, {plan.rounds} rounds; {places.root})")
    try:
        results = Comparison(setting, plan, places, console).run()
    except Interrupted as stop:
        console.print(
            f"\nStopped: {stop}. Go on with: python -m experiments.cedar --resume {places.root}", soft_wrap=True
        )
        raise
    print_report(results, console, report=places.root / "report.html")
    return results


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    console = Console()
    if config.list:
        console.print("\n".join(LOADERS))
        return 0
    return exit_status(lambda: run(config, console))


if __name__ == "__main__":
    sys.exit(main())
