"""The grid: one compiled program for each rule and number of attackers, run once for every attack.

A program trains all runs (fractions of attackers, alphas, seeds) of a rule from the first round to the last. The attack
is an argument of it, a branch of a `lax.switch`, so that all attacks share one compilation. A rule that does not depend
on the number of attackers needs one program for all fractions. Programs are compiled in threads, ahead of their turn.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import cedarjax as cj
from experiments import files
from experiments.comparison import Interrupted, polite_interrupts
from experiments.robustness.contenders import ATTACKS, RULES, one_of
from experiments.robustness.problem import Problem, Runs, Setup
from experiments.seeds import OverSeeds

AHEAD = 2
"""Programs that are compiled at once, at most."""

TAIL = 5
"""Last rounds whose mean accuracy is the number of a cell; a run that is attacked goes up and down."""


class Group(NamedTuple):
    """What one program does."""

    rule: str
    """Key of `RULES`."""
    fractions: tuple[float, ...]
    """Shares of the clients that attack."""


class Cell(NamedTuple):
    """One number of the table for every alpha and seed."""

    rule: str
    """Key of `RULES`."""
    fraction: float
    """Share of the clients that attack."""
    attack: str
    """Key of `ATTACKS`."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried on what."""

    rules: tuple[str, ...]
    """Keys of `RULES`."""
    attacks: tuple[str, ...]
    """Keys of `ATTACKS`."""
    fractions: tuple[float, ...]
    """Shares of the clients that attack."""
    alphas: tuple[float, ...]
    """Concentrations of the Dirichlet draw."""
    num_seeds: int
    """Seeds."""
    num_clients: int
    """Clients, all of which take part in every round."""

    def num_byzantine(self, fraction: float) -> int:
        """Attackers, `f`."""
        return round(fraction * self.num_clients)

    def defined(self, rule: str, fraction: float) -> bool:
        """Whether there are enough clients for the rule."""
        return RULES[rule].min_clients(self.num_byzantine(fraction)) <= self.num_clients

    @property
    def groups(self) -> tuple[Group, ...]:
        """The programs, in the order of the rules."""
        found = []
        for rule in self.rules:
            able = tuple(fraction for fraction in self.fractions if self.defined(rule, fraction))
            found += [Group(rule, (fraction,)) for fraction in able] if RULES[rule].knows_f else [Group(rule, able)]
        return tuple(group for group in found if group.fractions)

    def cells(self, group: Group) -> tuple[Cell, ...]:
        """The cells of a program, attack by attack."""
        return tuple(Cell(group.rule, fraction, attack) for attack in self.attacks for fraction in group.fractions)


def make_program(
    problem: Problem, setup: Setup, rule: cj.Aggregator, attacks: Sequence[str]
) -> Callable[[Runs, tuple], tuple[jax.Array, jax.Array]]:
    """One run: clients train, attackers lie, the rule decides, the server tests, round after round.

    Args:
      problem: data and network.
      setup: hyper-parameters.
      rule: the aggregation rule.
      attacks: keys of `ATTACKS`.

    Returns:
      `run(one, (examples, index)) -> (accuracy [rounds], finite)` of the attack `attacks[index]`, for one run out of
      `Runs`; `finite` is False if the last parameters hold NaN or infinity.
    """
    choices = [ATTACKS[name].make(rule) for name in attacks]
    flips = jnp.array([name == "label_flip" for name in attacks])
    local = cj.local.sgd(problem.loss_fn, optax.sgd(setup.learning_rate), batch_size=setup.batch_size)

    def run(one: Runs, shared: tuple) -> tuple[jax.Array, jax.Array]:
        examples, index = shared
        num_clients = one.counts.shape[0]
        data = cj.ClientData({"x": examples.x[one.rows], "y": examples.y[one.rows]}, one.counts, one.counts)
        ids = jnp.arange(num_clients, dtype=jnp.int32)
        cohort = cj.Cohort(data, jnp.ones(num_clients, jnp.float32), ids, byzantine=one.byzantine)
        flipped = cj.attacks.flip_cohort(cohort, problem.num_classes)
        cohort = jax.tree.map(lambda a, b: jnp.where(flips[index], a, b), flipped, cohort)
        algorithm = cj.federated_round(local, optax.chain(one_of(choices, index), rule, optax.sgd(1.0)))

        def one_round(state: cj.ServerState, _: None) -> tuple[cj.ServerState, jax.Array]:
            state, _, _ = algorithm.step(state, cohort, jax.random.fold_in(one.keys, state.round))
            right = problem.apply(state.params, examples.test_x).argmax(axis=1) == examples.test_y
            return state, right.mean(dtype=jnp.float32)

        state, accuracy = jax.lax.scan(one_round, algorithm.init(one.params), None, length=setup.rounds)
        return accuracy, jnp.isfinite(state.params).all()

    return run


class Runner:
    """Fills the cells of a grid that the run's log does not hold yet.

    Args:
      grid: what is tried on what.
      problem: data and network.
      setup: hyper-parameters.
      places: the run directory.
      console: where progress is shown.
    """

    def __init__(self, grid: Grid, problem: Problem, setup: Setup, places: files.RunDir, console: Console):
        """Remembers the parts; nothing runs yet."""
        self.grid, self.problem, self.setup, self.places, self.console = grid, problem, setup, places, console

    def log(self) -> tuple[dict[Cell, dict[str, Any]], list[dict[str, Any]]]:
        """What was done so far: the record of each cell, and one of each compilation."""
        records = files.read_jsonl(self.places.metrics)
        done = {Cell(r["rule"], r["fraction"], r["attack"]): r for r in records if r["kind"] == "cell"}
        return done, [r for r in records if r["kind"] == "program"]

    def run(self) -> None:
        """Does what is missing.

        Raises:
          Interrupted: after Ctrl-C, when the attack that was running has been stored.
        """
        grid, done = self.grid, self.log()[0]
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        todo = [group for group in grid.groups if not done.keys() >= set(grid.cells(group))]
        total = sum(len(grid.cells(group)) for group in grid.groups)
        with (
            polite_interrupts() as pressed,
            Progress(*columns, TimeElapsedColumn(), console=self.console) as progress,
            self._compile_ahead(todo) as compiled,
        ):
            task = progress.add_task("", total=total)
            progress.update(task, completed=total - sum(len(grid.cells(group)) for group in todo))
            for group in todo:
                numbers = ", ".join(str(grid.num_byzantine(fraction)) for fraction in group.fractions)
                title = f"{RULES[group.rule].label}, {numbers} of {grid.num_clients} attack"
                progress.update(task, description=f"{title}: compiling")
                program, arguments = compiled(group)
                for index, attack in enumerate(grid.attacks):
                    progress.update(task, description=f"{title}: {ATTACKS[attack].label}")
                    missing = [cell for cell in self._column(group, attack) if cell not in done]
                    if missing:
                        self._attack(group, attack, index, program, arguments, missing)
                    progress.advance(task, len(group.fractions))
                    if pressed:
                        raise Interrupted(f"stopped after {ATTACKS[attack].label} on {title}")

    def _column(self, group: Group, attack: str) -> list[Cell]:
        return [cell for cell in self.grid.cells(group) if cell.attack == attack]

    def _attack(
        self, group: Group, attack: str, index: int, program: OverSeeds, arguments: Runs, missing: list[Cell]
    ) -> None:
        """Runs one attack on one rule and stores what came out, one line a cell."""
        grid, started = self.grid, time.perf_counter()
        accuracy, finite = jax.device_get(program(arguments, (self.problem.examples, jnp.int32(index))))
        seconds = time.perf_counter() - started
        shape = (len(group.fractions), len(grid.alphas), grid.num_seeds)
        accuracy, finite = accuracy.reshape(*shape, -1), finite.reshape(shape)
        for place, cell in enumerate(self._column(group, attack)):
            if cell not in missing:
                continue
            record = {
                "kind": "cell",
                **cell._asdict(),
                "num_byzantine": grid.num_byzantine(cell.fraction),
                "accuracy": np.round(accuracy[place, ..., -TAIL:].mean(axis=-1, dtype=np.float64), 5),
                "curve": np.round(accuracy[place].mean(axis=1, dtype=np.float64), 4),
                "num_diverged": int((~finite[place]).sum()),
                "seconds": round(seconds / len(group.fractions), 3),
            }
            files.append_jsonl(self.places.metrics, record, sync=True)

    @contextmanager
    def _compile_ahead(self, todo: Sequence[Group]) -> Iterator[Callable[[Group], tuple[OverSeeds, Runs]]]:
        """Compiles in threads, in the order of use, while what is compiled already runs."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        pool = ThreadPoolExecutor(max_workers=min(AHEAD, cores))
        futures: dict[Group, Future] = {group: pool.submit(self._compile, group) for group in todo}

        def compiled(group: Group) -> tuple[OverSeeds, Runs]:
            program, arguments, record = futures.pop(group).result()
            files.append_jsonl(self.places.metrics, record)
            return program, arguments

        try:
            yield compiled
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _compile(self, group: Group) -> tuple[OverSeeds, Runs, dict[str, Any]]:
        numbers = [self.grid.num_byzantine(fraction) for fraction in group.fractions]
        arguments = self.problem.runs(numbers)
        # Rules that do not depend on f are given that of the first fraction and ignore it.
        rule = RULES[group.rule].make(numbers[0], self.setup.radius)
        run = make_program(self.problem, self.setup, rule, self.grid.attacks)
        program = OverSeeds(run, arguments.keys.shape[0])
        started = time.perf_counter()
        program.compile(arguments, (self.problem.examples, jnp.int32(0)))
        seconds = round(time.perf_counter() - started, 2)
        return program, arguments, {"kind": "program", **group._asdict(), "seconds": seconds}
