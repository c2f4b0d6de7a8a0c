"""What is printed, and what is kept as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.measure import Measurement, Workload
from experiments.files import write_text


class Result(NamedTuple):
    """One workload at one size."""

    name: str
    """Name of the workload's file."""
    num_clients: int
    """Clients in the cohort."""
    layouts: list[Measurement]
    """The whole workload in every layout."""
    parts: list[Measurement]
    """Broken down, in the fastest layout."""

    @property
    def best(self) -> Measurement:
        """The fastest layout."""
        return min(self.layouts, key=lambda measurement: measurement.ms)

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "workload": self.name,
            "num_clients": self.num_clients,
            "best": {"layout": self.best.layout, "ms": self.best.ms},
            "layouts": [measurement.record() for measurement in self.layouts],
            "parts": [measurement.record() for measurement in self.parts],
        }


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    """One line on what the numbers were made on."""
    environment = " ".join(f"{name}={value}" for name, value in machine["environment"].items())
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores{load}; {len(machine['devices'])} x {machine['backend']}, "
        f"jax {machine['versions']['jax']}, commit {(machine['commit'] or 'unknown')[:8]} {environment}".rstrip(),
        highlight=False,
    )


def print_result(console: Console, workload: Workload, result: Result) -> None:
    """The headline and two tables."""
    size = f"{result.num_clients} clients, ms a {workload.unit}"
    console.print(_table(f"{size}, by layout", "layout", result.layouts))
    console.print(_table(f"{size}, where it goes: {result.best.layout}", "part", result.parts))
    goal = "" if workload.goal_ms is None else f" (goal: {workload.goal_ms:g})"
    console.print(
        f"[bold]{result.name}: {result.best.ms:.3f} ms a {workload.unit}[/bold]{goal}, {result.best.layout}",
        highlight=False,
    )


def _table(title: str, field: str, measurements: Sequence[Measurement]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(field, no_wrap=True)
    for heading in ("median", "least", "CPU", "peak MiB", "compile s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in measurements:
        table.add_row(
            getattr(m, field),
            f"{m.ms:.3f}",
            f"{1e3 * min(m.seconds) / m.units:.3f}",
            f"{m.cpu_ms:.3f}",
            "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f}",
            f"{m.compile_seconds:.1f}",
        )
    return table


def write_json(path: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    """All numbers, in place of whatever the file held, or nothing at all."""
    record = {"machine": machine, "results": [result.record() for result in results]}
    write_text(path, json.dumps(record, indent=1) + "\n")
