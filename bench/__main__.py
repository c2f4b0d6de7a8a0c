"""The command line: `python -m bench [WORKLOAD] [--clients N ...] [--repeats R] [--json FILE]`."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Literal, get_args

import jax
import tyro
from rich.console import Console

from bench import machine
from bench.measure import Workload, measure
from bench.report import Result, print_machine, print_result, write_json

Name = Literal["cedar"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Speed and memory of cedarjax: every layout of the client axis, and where the time goes in the fastest."""

    workload: tyro.conf.Positional[Name | Literal["all"]] = "all"
    """What to measure."""
    clients: tuple[int, ...] = ()
    """Clients in the cohort, one or several sizes; default: those of the workload."""
    repeats: int = 11
    """Timed calls of each program, at least 5; the median counts."""
    json: Path | None = None
    """File for all numbers."""


def run(options: Options, console: Console) -> list[Result]:
    """Measures, prints, and writes what was asked for.

    Args:
      options: the command line.
      console: where to print.

    Returns:
      One result a workload and size.

    Raises:
      ValueError: if an option is out of range.
    """
    if options.repeats < 5:
        raise ValueError(f"--repeats must be at least 5, got {options.repeats}.")
    if any(count < 1 for count in options.clients):
        raise ValueError(f"--clients must be at least 1, got {options.clients}.")
    facts = machine.facts()
    print_machine(console, facts)
    results = []
    for name in get_args(Name) if options.workload == "all" else (options.workload,):
        workload: Workload = importlib.import_module(f"bench.workloads.{name}").WORKLOAD
        console.print(f"\n{workload.title}", highlight=False)
        for num_clients in options.clients or workload.num_clients:
            with console.status("") as status:
                layouts = measure(workload.layouts(num_clients), repeats=options.repeats, tell=status.update)
                best = min(layouts, key=lambda measurement: measurement.ms).layout
                parts = measure(workload.parts(num_clients, best), repeats=options.repeats, tell=status.update)
            results.append(Result(name, num_clients, layouts, parts))
            print_result(console, workload, results[-1])
    if options.json is not None:
        write_json(options.json, facts, results)
    return results


def main() -> int:
    """Reads the command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m bench")
    jax.config.update("jax_num_cpu_devices", machine.num_cores())  # one device a core, for the layouts on a mesh
    console = Console()
    try:
        run(options, console)
    except ValueError as error:
        console.print(f"[red]{error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
