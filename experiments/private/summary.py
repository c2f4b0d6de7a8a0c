"""The numbers of a run for people: a table on screen, Markdown, and one figure.

Everything is made from one plain mapping, the content of `results.json`:

    {
      "title": "...", "metric": "accuracy", "steps": [0, 1, 5], "delta": 5e-4, "num_clients": 1000,
      "config": {...}, "dataset": {...},
      "runs": [
        {"algorithm": "Cedar", "budget": "epsilon 3", "epsilon": 2.99, "noise_multiplier": 1.2, "max_norm": 0.4,
         "clipped": 0.5, "noise_to_norm": 0.7, "scores": [[.2, .5, .7], ...], "adaptation": "sgd 0.1", ...}
      ]                                                              scores are [seeds, steps], of new clients
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
from experiments.style import legend, page, palette

Results = Mapping[str, Any]


def header(results: Results) -> list[str]:
    """Columns of the table."""
    steps = [f"{step} step{'s' if step != 1 else ''}" for step in results["steps"]]
    return ["", "budget", "epsilon", "noise", *steps, "clip norm", "clipped", "noise / norm"]


def rows(results: Results) -> list[list[str]]:
    """One row a run, as text, algorithm by algorithm."""
    told = []
    for record in results["runs"]:
        scores = np.asarray(record["scores"], np.float64)
        spread = scores.std(axis=0, ddof=1) if len(scores) > 1 else np.zeros(scores.shape[1])
        told.append(
            [
                record["algorithm"],
                record["budget"],
                "∞" if record["epsilon"] is None else f"{record['epsilon']:.2f}",
                f"{record['noise_multiplier']:.2f}",
                *(f"{mean:.3f} ±{std:.3f}" for mean, std in zip(scores.mean(axis=0), spread, strict=True)),
                "–" if record["max_norm"] is None else f"{record['max_norm']:.2f}",
                "–" if record["clipped"] is None else f"{record['clipped']:.0%}",
                f"{record['noise_to_norm']:.2f}" if record["epsilon"] is not None else "–",
            ]
        )
    return told


def caption(results: Results) -> str:
    """What the numbers are."""
    seeds = len(results["runs"][0]["scores"])
    return (
        f"{results['metric'].capitalize()} of new clients after so many steps, mean and standard deviation of {seeds} "
        f"seeds. Epsilon at delta = {results['delta']:.2g} for whole clients, adding or removing one of "
        f"{results['num_clients']}, of all updates told in the run. Noise is the multiplier; noise / norm is the "
        "expected length of the noise on an update over the clip norm. Nothing is said of the validation clients, on "
        "which the adaptation was chosen, nor of the several runs of one table together: they add up."
    )


def findings(results: Results) -> list[str]:
    """What each algorithm loses to each budget after the last step."""
    sentences = []
    for name in dict.fromkeys(record["algorithm"] for record in results["runs"]):
        mine = [record for record in results["runs"] if record["algorithm"] == name]
        last = {r["budget"]: float(np.mean(r["scores"], axis=0)[-1]) for r in mine}
        base, *others = last.items()
        told = ", ".join(f"{budget} {score:.3f} ({score - base[1]:+.3f})" for budget, score in others)
        sentences.append(f"{name} after {results['steps'][-1]} steps: {base[0]} {base[1]:.3f}; {told}.")
    return sentences


def write_figure(results: Results, path: Path) -> None:
    """Score after the last step against epsilon, one line an algorithm; what is not private lies at the right."""
    finite = [record["epsilon"] for record in results["runs"] if record["epsilon"] is not None]
    edge = 3 * max(finite, default=1.0)
    names = list(dict.fromkeys(record["algorithm"] for record in results["runs"]))
    with page(path, (6.8, 4.2)) as figure:
        ax = figure.subplots()
        for place, (name, style) in enumerate(palette(names).items()):
            mine = [r for r in results["runs"] if r["algorithm"] == name and (r["epsilon"] or r["max_norm"] is None)]
            shift = 1.02 ** (place - (len(names) - 1) / 2)  # so that bars stand side by side
            x = [shift * (edge if record["epsilon"] is None else record["epsilon"]) for record in mine]
            scores = [np.asarray(record["scores"])[:, -1] for record in mine]
            means = [s.mean() for s in scores]
            ax.errorbar(x, means, [s.std() for s in scores], color=style.color, linewidth=1, linestyle="none")
            ax.plot(x, means, marker=style.marker, color=style.color, markersize=7, markeredgecolor="white")
        ticks = sorted({round(e, 3) for e in finite})
        ax.set(xscale="log", xlabel=f"epsilon (delta = {results['delta']:.2g})")
        ax.set_xticks([*ticks, edge], [*(f"{e:g}" for e in ticks), "none"])
        ax.minorticks_off()
        ax.set(ylabel=f"{results['metric']} after {results['steps'][-1]} steps")
        ax.set_title("What privacy costs")
        legend(figure, names, None)


def write_summary(results: Results, root: str | os.PathLike[str]) -> Path:
    """Writes `report.md` and returns its path."""
    columns = header(results)
    lines = [
        f"# {results['title']}",
        "",
        caption(results),
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        *(f"- {sentence}" for sentence in (*findings(results), *results["dataset"].get("notes", ()))),
        "",
        "![epsilon](plots/epsilon.png)",
    ]
    path = Path(root) / "report.md"
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def print_summary(results: Results, console: Console) -> None:
    """Prints the table: budgets and the scores before and after adaptation."""
    columns = header(results)
    shown = (0, 1, 4, 3 + len(results["steps"]))
    table = Table(title=results["title"], box=box.SIMPLE_HEAD, title_justify="left")
    for number in shown:
        table.add_column(columns[number], justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows(results):
        table.add_row(*(row[number] for number in shown))
    console.print(table)
    for sentence in findings(results):
        console.print(f"- {sentence}", markup=False, highlight=False)
