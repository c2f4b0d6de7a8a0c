"""What is printed, and what is kept as JSON."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.duels import DuelResult, geometric_mean
from bench.floor import Ceilings
from bench.measure import Measurement, Workload
from bench.versus import Versus
from experiments.files import write_json as write_file


class Ratio(NamedTuple):
    """One thing that is done against the baseline, in one layout."""

    part: str
    """As in `Case`."""
    layout: str
    """As in `Case`."""
    ratio: float
    """Median over the turns of one wall clock over the other."""
    least: float
    """The shortest over the shortest."""
    extra_ms: float
    """Median over the turns of the difference, milliseconds a unit."""


class Result(NamedTuple):
    """One workload at one size."""

    name: str
    """Name of the workload's file."""
    num_clients: int
    """Clients in the cohort."""
    layouts: list[Measurement]
    """Everything that is done, each in every layout."""
    parts: list[Measurement]
    """Broken down, in the fastest layout."""
    versus: Versus | None = None
    """Beside the peers, if asked for."""
    duels: Sequence[DuelResult] = ()
    """The same where each thing that is done has its own peers."""
    baseline: str | None = None
    """As in `Workload`."""

    @property
    def ratios(self) -> list[Ratio]:
        """Everything against the baseline in the same layout."""
        found = []
        for m in self.layouts:
            base = next((b for b in self.layouts if (b.part, b.layout) == (self.baseline, m.layout)), None)
            if base is None or base is m or not m.seconds or not base.seconds:
                continue
            turns = list(zip(m.seconds, base.seconds, strict=False))
            ratio = statistics.median(a / b for a, b in turns)
            least = min(m.seconds) / min(base.seconds)
            found.append(
                Ratio(m.part, m.layout, ratio, least, 1e3 * statistics.median(a - b for a, b in turns) / m.units)
            )
        return found

    @property
    def best(self) -> list[Measurement]:
        """The fastest layout of everything that is done."""
        parts = dict.fromkeys(measurement.part for measurement in self.layouts)
        return [min((m for m in self.layouts if m.part == part), key=lambda m: m.ms) for part in parts]

    def record(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "workload": self.name,
            "num_clients": self.num_clients,
            "best": [{"part": best.part, "layout": best.layout, "ms": best.ms} for best in self.best],
            "layouts": [measurement.record() for measurement in self.layouts],
            "parts": [measurement.record() for measurement in self.parts],
            "versus": None if self.versus is None else self.versus.record(),
            "duels": [duel.record() for duel in self.duels],
            "geometric_mean": geometric_mean(self.duels),
            "ratios": [ratio._asdict() for ratio in self.ratios],
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


def print_ceilings(console: Console, dtype: str, ceilings: Ceilings) -> None:
    """One line on what the hardware can do."""
    console.print(
        f"{dtype}: {ceilings.operations / 1e9:.0f} GFLOP/s in a matmul, "
        f"{ceilings.bytes / 1e9:.1f} GB/s read and written",
        highlight=False,
    )


def print_result(console: Console, workload: Workload, result: Result) -> None:
    """The headlines and the tables."""
    size = f"{result.num_clients:,} clients, ms a {workload.unit}"
    console.print(_table(f"{size}, by layout", result.layouts, has_share=workload.duels is not None))
    if result.parts:
        console.print(_table(f"{size}, where it goes: {result.best[0].layout}", result.parts))
    if result.versus is not None:
        console.print(_peer_table(f"{size}, in turns with others", result.versus))
    if result.ratios:
        console.print(_ratio_table(f"{result.num_clients:,} clients, times {result.baseline!r}", result.ratios))
    if result.duels:
        print_duels(console, result.duels)
        return
    goal = "" if workload.goal_ms is None else f" (goal: {workload.goal_ms:g})"
    for best in result.best:
        name = result.name if len(result.best) == 1 else f"{result.name}, {best.part}"
        console.print(
            f"[bold]{name}: {best.ms:.3f} ms a {workload.unit}[/bold]{goal}, {best.layout}{_floor(best)}",
            highlight=False,
        )


def _floor(measurement: Measurement) -> str:
    if measurement.floor_seconds is None:
        return ""
    return f"; {measurement.ratio:.1f} times the floor of {1e3 * measurement.floor_seconds / measurement.units:.4f}"


def _table(title: str, measurements: Sequence[Measurement], *, has_share: bool = False) -> Table:
    fields = [field for field in ("part", "layout") if len({getattr(m, field) for m in measurements}) > 1]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for field in fields or ["layout"]:
        table.add_column(field, no_wrap=True)
    share = ("temp/args",) if has_share else ()
    for heading in ("median", "least", "CPU", "x floor", "call s", "peak MiB", "temp MiB", *share, "compile s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in measurements:
        timed = [f"{m.ms:.3f}", f"{1e3 * min(m.seconds) / m.units:.3f}", f"{m.cpu_ms:.3f}"] if m.seconds else []
        ratio = "" if m.ratio is None else f"{m.ratio:.1f}"
        table.add_row(
            *(getattr(m, field) for field in fields or ["layout"]),
            *([*timed, ratio, f"{m.median_seconds:.3f}"] if timed else [m.skipped, "", "", "", ""]),
            *(_mebibytes(number) for number in (m.peak_bytes, m.temp_bytes)),
            *(["" if m.temp_share is None else f"{m.temp_share:.3f}"] if has_share else []),
            f"{m.compile_seconds:.1f}",
        )
    return table


def _ratio_table(title: str, ratios: Sequence[Ratio]) -> Table:
    layouts = list(dict.fromkeys(ratio.layout for ratio in ratios))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("part", no_wrap=True)
    for layout in layouts:
        table.add_column(layout, justify="right")
    for part in dict.fromkeys(ratio.part for ratio in ratios):
        found = {ratio.layout: f"{ratio.ratio:.2f}" for ratio in ratios if ratio.part == part}
        table.add_row(part, *(found.get(layout, "") for layout in layouts))
    return table


def _peer_table(title: str, versus: Versus) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for heading in ("median", "least", "x ours", "peak MiB", "compile s", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in versus.ours:
        numbers = (f"{m.ms:.3f}", f"{1e3 * min(m.seconds) / m.units:.3f}", f"{m.ms / versus.best.ms:.2f}")
        table.add_row(f"cedarjax, {m.layout}", *numbers, _mebibytes(m.peak_bytes), f"{m.compile_seconds:.1f}")
    for peer in versus.peers:
        if peer.unavailable is not None:
            table.add_row(f"{peer.peer}: {peer.unavailable}", style="dim")
            continue
        versions = " ".join(f"{name} {version}" for name, version in (peer.versions or {}).items())
        table.add_row(
            f"{peer.peer} [dim]{versions}[/dim]",
            f"{peer.ms:.3f}",
            f"{1e3 * min(peer.seconds) / peer.units:.3f}",
            f"[bold]{versus.ratio(peer):.2f}[/bold]",
            _mebibytes(peer.peak_bytes),
            "" if peer.compile_seconds is None else f"{peer.compile_seconds:.1f}",
            f"{peer.difference:.0e}" if peer.agrees else f"[red]{peer.difference:.0e}, not the same[/red]",
        )
    return table


def print_duels(console: Console, duels: Sequence[DuelResult]) -> None:
    """One line a duel, the peers' times in columns, and the geometric mean of the ratios."""
    ours = list(dict.fromkeys(m.layout for duel in duels for m in duel.versus.ours))
    theirs = list(dict.fromkeys(peer.peer for duel in duels for peer in duel.versus.peers))
    table = Table(
        title="ms a call, in turns with others",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for heading in ("clients", *ours, *theirs, "ratio", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    reasons: dict[str, list[str]] = {}
    for duel in duels:
        times = {m.layout: m.ms for m in duel.versus.ours} | {p.peer: p.ms for p in duel.versus.peers}
        missing = {peer.peer: peer.unavailable for peer in duel.versus.peers if peer.unavailable is not None}
        for peer, reason in missing.items():
            reasons.setdefault(reason, []).append(f"{duel.name} in {peer}")
        cells = ["" if name not in times else "failed" if name in missing else f"{times[name]:.2f}" for name in theirs]
        table.add_row(
            duel.name,
            str(duel.num_clients),
            *(f"{times[name]:.2f}" if name in times else "" for name in ours),
            *cells,
            "" if duel.ratio is None else f"[bold]{duel.ratio:.1f}[/bold]",
            _duel_difference(duel),
        )
    console.print(table)
    for reason, names in reasons.items():
        console.print(f"[dim]{', '.join(names)}: {reason}[/dim]", highlight=False)
    mean = geometric_mean(duels)
    if mean is not None:
        count = sum(duel.ratio is not None for duel in duels)
        console.print(
            f"[bold]{mean:.1f} times as fast as the faster of {' and '.join(theirs)}[/bold], "
            f"geometric mean over {count} of {len(duels)}",
            highlight=False,
        )


def _duel_difference(duel: DuelResult) -> str:
    if not duel.versus.peers:
        return ""
    if not duel.is_compared:
        return "not compared"
    found = [peer.difference for peer in duel.versus.peers if peer.difference is not None]
    if not found:
        return ""
    return f"{max(found):.0e}" if duel.agrees else f"[red]{max(found):.0e}, not the same[/red]"


def _mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**20:.1f}"


def write_json(path: Path, machine: dict[str, Any], dtype: str, ceilings: Ceilings, results: Sequence[Result]) -> None:
    """All numbers, in place of whatever the file held, or nothing at all."""
    record = {
        "machine": machine,
        "dtype": dtype,
        "ceilings": ceilings._asdict(),
        "results": [result.record() for result in results],
    }
    write_file(path, record)
