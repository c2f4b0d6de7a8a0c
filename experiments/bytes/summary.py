"""The numbers of a run for people: a table, accuracy against bytes as training goes on, and the Pareto front.

Everything is made from one plain mapping, the content of `results.json`:

    {
      "title": "...", "config": {...}, "dataset": {...},
      "runs": [
        {"key": "top_k1", "name": "top 1 %, feedback", "kind": "fewer numbers", "seconds": 9.0, "rate": 0.1,
         "accuracy": [[.5, .7, ...], ...],               [seeds, points], new clients
         "uploaded": [[1200, 2400, ...], ...],           [seeds, points], bytes of all clients so far
         "full_bytes": 1000000,                          what FedAvg uploads in the same rounds
         "validation": [.6, .7, .5]}                     of each rate, by which one was chosen
      ]
    }
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import files
from experiments.plots import plot_bytes
from experiments.report import human_bytes
from experiments.style import EDGE, byte_unit, legend, page, palette

Results = Mapping[str, Any]
HEADER = ("", "accuracy", "uploaded", "of FedAvg's", "front", "rate", "s")
SHOWN = (0, 1, 2, 3, 4)
"""Columns of the table on screen."""
FAR = 0.25
"""Accuracy below the best at which a contender is not drawn to scale."""
CURVES = 8
"""Contenders whose learning curves are drawn: the ends of the front and what lies between."""


def final(record: Mapping[str, Any]) -> tuple[float, float]:
    """Mean over seeds of the bytes that were uploaded and of the accuracy at the end."""
    return float(np.mean(record["uploaded"], axis=0)[-1]), float(np.mean(record["accuracy"], axis=0)[-1])


def front(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the contenders that no other beats with fewer bytes, from the fewest bytes on.

    Example:
      >>> def run(key, size, score):
      ...     return {"key": key, "uploaded": [[size]], "accuracy": [[score]]}
      >>> front([run("a", 9, 0.9), run("b", 5, 0.9), run("c", 1, 0.2), run("d", 2, 0.1)])
      ['c', 'b']
    """
    keys: list[str] = []
    best = -np.inf
    for record in sorted(records, key=lambda r: (final(r)[0], -final(r)[1])):
        if final(record)[1] > best:
            best = final(record)[1]
            keys.append(record["key"])
    return keys


def rows(results: Results) -> list[list[str]]:
    """One row a contender, as text, the most bytes first."""
    on_front = front(results["runs"])
    told = []
    for record in sorted(results["runs"], key=lambda r: -final(r)[0]):
        scores, (sent, mean) = np.asarray(record["accuracy"])[:, -1], final(record)
        told.append(
            [
                record["name"],
                f"{mean:.3f} ±{scores.std():.3f}",
                human_bytes(sent),
                f"1/{record['full_bytes'] / sent:.1f}",
                "yes" if record["key"] in on_front else "",
                f"{record['rate']:g}",
                f"{record['seconds']:.0f}",
            ]
        )
    return told


def plot_front(path: str | os.PathLike[str], results: Results) -> None:
    """Writes accuracy at the end against all bytes, with the front; what lies far below is drawn at the edge."""
    records = results["runs"]
    unit, scale = byte_unit(max(final(record)[0] for record in records))
    styles = palette(list(dict.fromkeys(record["kind"] for record in records)))
    points = {record["key"]: (final(record)[0] / scale, final(record)[1]) for record in records}
    names = {record["key"]: record["name"] for record in records}
    keys = front(records)
    scores = np.array([y for _, y in points.values()])
    lowest = scores[scores > scores.max() - FAR].min()
    bottom = lowest - 0.25 * (scores.max() - lowest) - 0.005
    with page(path, (7.6, 4.8)) as figure:
        ax = figure.subplots()
        line = np.array([points[key] for key in keys])
        ax.step(line[:, 0], line[:, 1], where="post", color=EDGE, linewidth=1.4, zorder=1)
        for record in records:
            style, (x, y) = styles[record["kind"]], points[record["key"]]
            spread = np.asarray(record["accuracy"])[:, -1].std()
            if y < bottom:
                told = f"{record['name']}: {y:.2f} \u2193"
                ax.annotate(told, (x, bottom), (0, 4), textcoords="offset points", ha="center", color=style.color)
                continue
            ax.errorbar(x, y, yerr=spread, color=style.color, linewidth=0.8, alpha=0.4, zorder=2)
            ax.plot(x, y, style.marker, color=style.color, markersize=7, markeredgecolor="white", zorder=3)
        for number, key in enumerate(keys, 1):
            above = 8 if number % 2 else -15
            ax.annotate(str(number), points[key], (0, above), textcoords="offset points", ha="center", weight="bold")
        told = "\n".join(f"{number}  {names[key]}" for number, key in enumerate(keys, 1))
        ax.text(1.02, 1.0, told, transform=ax.transAxes, va="top", fontsize=8.5, linespacing=1.6)
        ax.set(xscale="log", xlabel=f"uploaded by all clients [{unit}]", ylabel="accuracy on new clients")
        ax.set_ylim(bottom=bottom)
        ax.margins(x=0.08)
        ax.set_title("What the upload buys, and the front that nobody beats")
        legend(figure, styles, None)


def plot_curves(path: str | os.PathLike[str], results: Results) -> None:
    """Writes accuracy against the bytes so far, for contenders along the front."""
    keys = front(results["runs"])
    shown = [keys[i] for i in sorted({round(i) for i in np.linspace(0, len(keys) - 1, min(CURVES - 1, len(keys)))})]
    curves = {
        record["name"]: (np.asarray(record["uploaded"]), np.asarray(record["accuracy"]))
        for record in results["runs"]
        if record["key"] in (*shown, "fedavg")
    }
    plot_bytes(path, curves, is_log=True)


def write_summary(results: Results, root: str | os.PathLike[str]) -> Path:
    """Writes `report.md` and returns its path."""
    lines = [
        f"# {results['title']}",
        "",
        "Accuracy of the common model on clients that never trained, as it is, mean and standard deviation over seeds. "
        "Bytes are what all clients uploaded, exact: codes, indices, scales, seeds and bitmaps. The front: nobody else "
        "is as accurate with fewer bytes. All had the same rates to choose from, on validation clients.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        "![accuracy against uploaded bytes, and the front](plots/front.png)",
        "",
        "![accuracy against bytes while the model trains](plots/curves.png)",
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
