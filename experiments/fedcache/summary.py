"""The numbers of a run for people: a table on screen, and Markdown.

Everything is made from one plain mapping, the content of `results.json`:

    {
      "title": "...", "config": {...}, "dataset": {...},
      "rounds": [2, 4, ...],                            when accuracy was taken
      "fleet": {"small": 21640, ...},                   bytes of a model of each architecture
      "runs": [
        {"key": "fedcache", "name": "FedCache", "seconds": 12.0,
         "curve": [[.71, .80, ...], ...],               [seeds, points], mean over the clients
         "clients": [[.9, .8, ...], ...],               [seeds, N], each client at the end
         "bytes": {"once": [..], "up": [..], "down": [..], "down_raw": [..]}}     [seeds], of all clients; the last
      ]                                                                           three a round
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
from experiments.report import human_bytes

Results = Mapping[str, Any]
REFERENCE = "fedavg"
SHOWN = (0, 1, 3, 4, 5, 7, 8)
"""Columns of the table on screen."""
HEADER = ("", "accuracy", "best", "worst", "up", "down", "raw", "once", "ratio")


def total_bytes(record: Mapping[str, Any], rounds: int) -> float:
    """Up and down over a whole run, with what is sent once; mean over seeds."""
    sent = {kind: np.mean(values) for kind, values in record["bytes"].items()}
    return float(sent["once"] + rounds * (sent["up"] + sent["down"]))


def rows(results: Results) -> list[list[str]]:
    """One row an algorithm, as text; the best in accuracy first."""
    rounds = results["rounds"][-1]
    reference = next((total_bytes(r, rounds) for r in results["runs"] if r["key"] == REFERENCE), None)
    told = []
    for record in sorted(results["runs"], key=lambda r: -float(np.mean(r["curve"], axis=0)[-1])):
        curve, clients = np.asarray(record["curve"]), np.asarray(record["clients"])
        total = total_bytes(record, rounds)
        sent = {kind: human_bytes(float(np.mean(values))) for kind, values in record["bytes"].items()}
        told.append(
            [
                record["name"],
                f"{curve[:, -1].mean():.3f} ±{curve[:, -1].std():.3f}",
                f"{curve.max(axis=1).mean():.3f}",
                f"{clients.min(axis=1).mean():.3f}",
                sent["up"],
                sent["down"],
                sent["down_raw"],
                sent["once"],
                f"{reference / total:.1f}" if reference and total else "–",
            ]
        )
    return told


def write_summary(results: Results, root: str | os.PathLike[str]) -> Path:
    """Writes `report.md` and returns its path."""
    models = ", ".join(f"{name} {size:,}" for name, size in results["fleet"].items())
    lines = [
        f"# {results['title']}",
        "",
        f"Bytes of a model: {models}. Accuracy is the mean over the clients, each with its model on its own rows,",
        "at the end and at its best; worst is the least of a client. Bytes are of all clients in a round: up, down",
        "(what the server has averaged, or raw), and once before the first. The ratio is FedAvg's bytes to these,",
        "both ways and over the whole run.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        *(f"![{name}](plots/{name}.png)\n" for name in ("learning", "bytes")),
    ]
    path = Path(root) / "report.md"
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def print_summary(results: Results, console: Console) -> None:
    """Prints the table."""
    table = Table(title=results["title"], box=box.SIMPLE_HEAD, title_justify="left")
    for number in SHOWN:
        table.add_column(HEADER[number], justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*(row[number] for number in SHOWN))
    console.print(table)
