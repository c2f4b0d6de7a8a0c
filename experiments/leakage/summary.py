"""The numbers of a run for people: a table on screen and Markdown.

Everything is made from one plain mapping, the content of `results.json`:

    {
      "title": "...", "config": {...}, "dataset": {...}, "side": 28, "true": "...",
      "runs": [
        {"key": "full", "name": "whole upload", "group": "one picture", "pictures": 1, "sent": 1.0, "seconds": 4.0,
         "left_out": {"block1": 0.75},                       share of uploads without this layer, Cedar only
         "attackers": [
           {"attacker": "smooth 0.001, direction",
            "mse": [[..], ..], "psnr": .., "ssim": .., "label_accuracy": .., "recognised": ..,      [seeds, victims]
            "shown": "..."}                                  what became of some of the pictures, as text
         ]}
      ]
    }

Of all attackers the one of highest mean PSNR counts, once among those that have no other pictures, once among all.
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

Results = Mapping[str, Any]
Record = Mapping[str, Any]
HEADER = ("", "sent", "PSNR", "PSNR, informed", "SSIM", "MSE", "labels", "recognised", "best attacker")
SHOWN = {0: "", 1: "sent", 2: "PSNR", 3: "informed", 4: "SSIM", 6: "labels", 7: "known"}
"""Columns of the table on screen, and what heads them there."""


def best(record: Record, *, may_know: bool = True) -> Mapping[str, Any]:
    """The attacker of highest mean PSNR.

    Args:
      record: of a row.
      may_know: whether attackers with public pictures count.
    """
    known = [a for a in record["attackers"] if may_know or not a["attacker"].startswith("public")]
    return max(known, key=lambda a: float(np.mean(a["psnr"])))


def told(values: Any, digits: int) -> str:
    """Mean and standard deviation over victims and seeds."""
    values = np.asarray(values, np.float64)
    return f"{values.mean():.{digits}f} ±{values.std():.{digits}f}"


def rows(results: Results) -> list[list[str]]:
    """One row of text for each way to send."""
    made = []
    for record in results["runs"]:
        alone, strongest = best(record, may_know=False), best(record)
        made.append(
            [
                record["name"],
                f"{record['sent']:.0%}" if record["sent"] >= 0.1 or not record["sent"] else f"{record['sent']:.1%}",
                told(alone["psnr"], 1),
                told(strongest["psnr"], 1),
                told(strongest["ssim"], 2),
                f"{np.mean(strongest['mse']):.4f}",
                f"{np.mean(strongest['label_accuracy']):.0%}",
                f"{np.mean(strongest['recognised']):.0%}",
                strongest["attacker"],
            ]
        )
    return made


def notes(results: Results) -> list[str]:
    """What a reader must know, in sentences."""
    seeds, victims = np.shape(results["runs"][0]["attackers"][0]["psnr"])
    sentences = [
        f"Means and standard deviations over {seeds} seeds with {victims} victims each; a seed draws the model and the "
        "pictures.",
        "PSNR in decibels, 60 at most, of the best attacker without other pictures; then of the best of all, also of "
        "informed ones, who search among combinations of public pictures. The other columns are those of the best.",
        "Recognised (known): none of the public pictures is more alike to the reconstruction than the true one.",
    ]
    for record in results["runs"]:
        if record["left_out"]:
            shares = ", ".join(f"{name} ({share:.0%} of uploads)" for name, share in record["left_out"].items())
            sentences.append(f"{record['name']}: away stayed {shares}.")
    return sentences


def write_summary(results: Results, root: str | os.PathLike[str]) -> Path:
    """Writes `report.md` and returns its path."""
    lines = [
        f"# {results['title']}",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" + "|---:" * (len(HEADER) - 2) + "|---|",
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        *(f"- {sentence}" for sentence in notes(results)),
        "",
        "![reconstructions](plots/pictures.png)",
        "",
        "![PSNR](plots/psnr.png)",
    ]
    path = Path(root) / "report.md"
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def print_summary(results: Results, console: Console) -> None:
    """Prints the table."""
    table = Table(title=results["title"], box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for number in SHOWN:
        table.add_column(SHOWN[number], justify="left" if number == 0 else "right", no_wrap=True)
    group = None
    for record, row in zip(results["runs"], rows(results), strict=True):
        if group not in (None, record["group"]):
            table.add_section()
        group = record["group"]
        table.add_row(*(row[number].split(" ±")[0] if number == 4 else row[number] for number in SHOWN))
    console.print(table)
    for sentence in notes(results):
        console.print(f"• {sentence}", markup=False, highlight=False)
