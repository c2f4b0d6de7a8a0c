"""The numbers of a run for people: a table on screen, Markdown, and accuracy against the clock.

Everything is made from one plain mapping, the content of `results.json`:

    {
      "title": "...", "config": {...}, "dataset": {...}, "target": 0.9,
      "runs": [
        {"key": "fedasync", "name": "FedAsync", "seconds": 4.0,
         "time": [[1.2, 2.5, ...], ...],                 [seeds, points], simulated seconds
         "accuracy": [[.5, .7, ...], ...],               [seeds, points]
         "staleness": [[90, 10, ...], ...],              [seeds, bins], uploads; the last bin counts what is above
         "device_bytes": [..], "cloud_bytes": [..]}      [seeds], both ways
      ]
    }
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import files
from experiments.plots import draw_learning
from experiments.report import human_bytes
from experiments.style import legend, page

Results = Mapping[str, Any]
SHOWN = (0, 1, 2, 3, 4, 5)
"""Columns of the table on screen."""
HEADER = ("", "to target", "reached", "accuracy", "end", "staleness", "devices", "cloud")
GRID = 200
"""Points of a curve over time."""


def time_to_target(record: Mapping[str, Any], target: float) -> np.ndarray:
    """`[seeds]` simulated seconds at the first test that reached the target, inf where none did."""
    times, scores = np.asarray(record["time"]), np.asarray(record["accuracy"])
    return np.where(scores >= target, times, np.inf).min(axis=1)


def mean_staleness(record: Mapping[str, Any]) -> float:
    """Mean over all uploads; what is in the last bin counts as its number."""
    counts = np.sum(record["staleness"], axis=0)
    return float(counts @ np.arange(len(counts)) / max(counts.sum(), 1))


def rows(results: Results) -> list[list[str]]:
    """One row a server, as text, the fastest first."""
    target = results["target"]
    order = sorted(results["runs"], key=lambda r: float(np.median(time_to_target(r, target))))
    told = []
    for record in order:
        reached, scores = time_to_target(record, target), np.asarray(record["accuracy"])[:, -1]
        median = float(np.median(reached))
        told.append(
            [
                record["name"],
                f"{median:.1f}" if np.isfinite(median) else "never",
                f"{np.isfinite(reached).sum()} of {len(reached)}",
                f"{scores.mean():.3f} ±{scores.std():.3f}",
                f"{np.mean(record['time'], axis=0)[-1]:.0f}",
                f"{mean_staleness(record):.1f}",
                human_bytes(float(np.mean(record["device_bytes"]))),
                human_bytes(float(np.mean(record["cloud_bytes"]))),
            ]
        )
    return told


def held(record: Mapping[str, Any], grid: np.ndarray) -> np.ndarray:
    """`[seeds, grid]`: at each time the accuracy of the last test before it, NaN before the first and after the end."""
    curves = []
    for times, scores in zip(record["time"], record["accuracy"], strict=True):
        place = np.searchsorted(times, grid, side="right") - 1
        known = (place >= 0) & (grid <= times[-1])
        curves.append(np.where(known, np.asarray(scores)[np.maximum(place, 0)], np.nan))
    return np.array(curves)


def plot_clock(path: str | os.PathLike[str], results: Results) -> None:
    """Writes accuracy against simulated time, on a logarithmic clock."""
    ends = [float(np.max(record["time"])) for record in results["runs"]]
    starts = [float(np.min(record["time"])) for record in results["runs"]]
    grid = np.geomspace(max(min(starts), 1e-3), max(ends), GRID)
    curves = {record["name"]: held(record, grid) for record in results["runs"]}
    with page(path, (6.8, 4.2)) as figure:
        ax = figure.subplots()
        draw_learning(ax, grid, curves)
        ax.axhline(results["target"], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        ax.set(xscale="log", xlabel="simulated seconds")
        ax.set_title("While the model trains")
        legend(figure, curves, None)


def write_summary(results: Results, root: str | os.PathLike[str]) -> Path:
    """Writes `report.md` and returns its path."""
    lines = [
        f"# {results['title']}",
        "",
        f"Target: accuracy {results['target']:g}. Times are medians over seeds in simulated seconds; the median client "
        "takes one for a job. The last columns are bytes on links of devices and of edges with the cloud, both ways.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        "![accuracy against simulated time](plots/clock.png)",
    ]
    path = Path(root) / "report.md"
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def print_summary(results: Results, console: Console) -> None:
    """Prints the table."""
    title = f"{results['title']}; target {results['target']:g}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number in SHOWN:
        table.add_column(HEADER[number], justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*(row[number] for number in SHOWN))
    console.print(table)
