"""The command line: `python -m bench [WORKLOAD] [--clients N ...] [--repeats R] [--json FILE] [--peers]`.

`robust` also has `[--params D] [--rules NAME ...] [--weighted]`.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from bench import machine
from bench.duels import fight
from bench.floor import Ceilings, measure_ceilings
from bench.measure import Workload, fastest, measure
from bench.report import Result, print_ceilings, print_machine, print_result, write_json
from bench.versus import compare

Name = Literal[
    "mlp",
    "cnn",
    "femnist",
    "maml_mlp",
    "maml_cnn",
    "cedar",
    "robust",
    "scale",
    "conv",
    "chunks",
    "events",
    "compression",
    "secure",
]
MOST_PEER_PARAMS = 1_000_000  # of which a hundred clients have as many bytes as peers can hold a few times over


@dataclasses.dataclass(frozen=True)
class Options:
    """Speed and memory of cedarjax: every layout of the client axis, against the floor and against others."""

    workload: tyro.conf.Positional[Name | Literal["all"]] = "all"
    """What to measure."""
    clients: tuple[int, ...] = ()
    """Clients in the cohort, one or several sizes; default: those of the workload."""
    repeats: int = 11
    """Timed calls of each program, at least 5; the median counts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and inputs."""
    json: Path | None = None
    """File for all numbers."""
    peers: bool = False
    """Also run what others have for the same workload, in turns with the fastest layouts, and compare the results."""
    params: int | None = None
    """Numbers in one client's update, for `robust`; default: 100,000."""
    rules: tuple[str, ...] = ()
    """Rules to measure, for `robust`; default: all."""
    weighted: bool = False
    """Give the rules weights, as a round does and peers cannot, for `robust`."""

    @property
    def is_configured(self) -> bool:
        """Whether the workload is to be another than its default."""
        return self.params is not None or bool(self.rules) or self.weighted


def check(options: Options) -> None:
    """Raises unless the options make sense.

    Raises:
      ValueError: if an option is out of range.
    """
    if options.repeats < 5:
        raise ValueError(f"--repeats must be at least 5, got {options.repeats}.")
    if any(count < 1 for count in options.clients):
        raise ValueError(f"--clients must be at least 1, got {options.clients}.")
    if options.peers and options.dtype != "float32":
        raise ValueError(f"--peers must go with --dtype float32, got {options.dtype}.")
    if options.params is not None and options.params < 1:
        raise ValueError(f"--params must be at least 1, got {options.params}.")
    if options.peers and (options.params or 0) > MOST_PEER_PARAMS:
        raise ValueError(f"--params must be at most {MOST_PEER_PARAMS} with --peers, got {options.params}.")
    if options.is_configured and options.workload != "robust":
        raise ValueError(f"--params, --rules and --weighted must go with robust, got {options.workload}.")


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
    check(options)
    facts = machine.facts()
    print_machine(console, facts)
    ceilings = measure_ceilings(options.dtype)
    print_ceilings(console, options.dtype, ceilings)
    results = []
    for name in get_args(Name) if options.workload == "all" else (options.workload,):
        workload: Workload = importlib.import_module(f"bench.workloads.{name}").WORKLOAD
        if options.is_configured and workload.configure is not None:
            workload = workload.configure(num_params=options.params, names=options.rules, is_weighted=options.weighted)
        console.print(f"\n{workload.title}", highlight=False)
        for num_clients in options.clients or workload.num_clients:
            results.append(measure_workload(name, workload, num_clients, options, ceilings, console))
            print_result(console, workload, results[-1])
            if options.json is not None:  # after each, so that an interrupted run leaves what it has
                write_json(options.json, facts, options.dtype, ceilings, results)
    return results


def measure_workload(
    name: str, workload: Workload, num_clients: int, options: Options, ceilings: Ceilings, console: Console
) -> Result:
    """One workload at one size: all layouts, then the fastest broken down, then beside the peers."""
    dtype = jnp.dtype(options.dtype)
    parts, versus, duels = [], None, []
    with console.status("") as status:

        def tell(text: str) -> None:
            status.update(f"{name}, {num_clients:,} clients: {text}")

        if options.peers and workload.duels is not None:
            duels = fight(workload, num_clients, repeats=options.repeats, ceilings=ceilings, tell=tell)
            layouts = [measurement for duel in duels for measurement in duel.versus.ours]
        else:
            cases = workload.layouts(num_clients, dtype)
            seconds = workload.most_seconds
            layouts = measure(cases, repeats=options.repeats, most_seconds=seconds, ceilings=ceilings, tell=tell)
        best = [measurement.layout for measurement in fastest(layouts)]
        if workload.parts is not None:
            cases = workload.parts(num_clients, dtype, best[0])
            parts = measure(cases, repeats=options.repeats, ceilings=ceilings, tell=tell)
        if options.peers and workload.peers is not None:
            versus = compare(workload, num_clients, best, repeats=options.repeats, ceilings=ceilings, tell=tell)
    return Result(name, num_clients, layouts, parts, versus, duels, workload.baseline)


def main() -> int:
    """Reads the command line; returns the exit status: 1 if a peer's result is not ours."""
    options = tyro.cli(Options, prog="python -m bench")
    # One device a core, for the layouts on a mesh. A program on one of them has the threads of all cores all the same.
    jax.config.update("jax_num_cpu_devices", machine.num_cores())
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        results = run(options, console)
    except ValueError as error:
        console.print(f"[red]{error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        return 130
    versus = [result.versus for result in results if result.versus is not None]
    versus += [duel.versus for result in results for duel in result.duels]
    return 0 if all(peer.agrees for every in versus for peer in every.peers) else 1


if __name__ == "__main__":
    sys.exit(main())
