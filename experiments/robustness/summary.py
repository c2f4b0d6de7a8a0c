"""The numbers of a grid for people: the worst attack on every rule, sentences, a table on screen, and Markdown.

Everything is made from one plain mapping, the content of `results.json`:

    {
      "title": "...", "dataset": {...}, "config": {...}, "setup": {...},
      "rules": ["krum", ...], "attacks": ["none", ...], "fractions": [0.1, ...], "alphas": [0.1, ...],
      "num_byzantine": [2, ...],                   attackers by fraction
      "num_clients": 20, "rounds": 30, "tail": 5,  last rounds that a number is the mean of
      "cells": [                                   one a rule, fraction and attack; none where a rule is not defined
        {"rule": "krum", "fraction": 0.1, "attack": "alie", "num_byzantine": 2, "num_diverged": 0, "seconds": 0.3,
         "accuracy": [[.94, .95, .93], ...]}       [alphas, seeds]
      ],
      "worst": [{"rule": ..., "fraction": ..., "alpha": ..., "attack": ..., "mean": ..., "std": ...}, ...],
      "baseline": [.94, ...] or null,              the mean with nobody attacking, by alpha
      "programs": {"compiled": 12, "compile_seconds": 81.0, "run_seconds": 60.2},
      "plots": {"caption": "plots/worst.png"}
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
from rich.text import Text

from experiments import files
from experiments.robustness.contenders import ATTACKS, RULES

Results = Mapping[str, Any]
ABSENT = "–"


def accuracies(results: Results) -> np.ndarray:
    """Accuracy of everything, NaN where a rule is not defined.

    Args:
      results: see the module.

    Returns:
      `[rules, fractions, attacks, alphas, seeds]` float64.
    """
    names = [results[key] for key in ("rules", "fractions", "attacks")]
    num_seeds = max((np.shape(cell["accuracy"])[1] for cell in results["cells"]), default=1)
    found = np.full((*map(len, names), len(results["alphas"]), num_seeds), np.nan)
    for cell in results["cells"]:
        place = tuple(name.index(cell[key]) for name, key in zip(names, ("rule", "fraction", "attack"), strict=True))
        found[place] = cell["accuracy"]
    return found


def worst_cases(results: Results) -> list[dict[str, Any]]:
    """The attack that leaves a rule with the least accuracy, mean over seeds, for every rule, fraction and alpha.

    Args:
      results: see the module. Nobody attacking counts as an attack: attackers may also choose to do nothing.

    Returns:
      One entry each, in that order; none where the rule is not defined.
    """
    scores = accuracies(results)
    entries = []
    for r, rule in enumerate(results["rules"]):
        for k, fraction in enumerate(results["fractions"]):
            for a, alpha in enumerate(results["alphas"]):
                means = scores[r, k, :, a].mean(axis=-1)
                if np.isnan(means).all():
                    continue
                attack = int(np.nanargmin(means))
                seeds = scores[r, k, attack, a]
                entries.append(
                    {
                        "rule": rule,
                        "fraction": fraction,
                        "alpha": alpha,
                        "attack": results["attacks"][attack],
                        "mean": float(means[attack]),
                        "std": float(seeds.std(ddof=1)) if len(seeds) > 1 else 0.0,
                    }
                )
    return entries


def baseline(results: Results) -> list[float] | None:
    """Accuracy of the mean with nobody attacking, by alpha; None where it is not in the grid."""
    if "mean" not in results["rules"] or "none" not in results["attacks"]:
        return None
    scores = accuracies(results)[results["rules"].index("mean"), 0, results["attacks"].index("none")]
    return scores.mean(axis=-1).tolist()


def findings(results: Results) -> list[str]:
    """Who holds most against the worst attack, in sentences; alike is who is within the larger deviation of the best.

    Args:
      results: see the module, with `worst`.

    Returns:
      One sentence for each fraction and alpha, and one if runs diverged.
    """
    sentences = []
    for fraction, number in zip(results["fractions"], results["num_byzantine"], strict=True):
        for alpha in results["alphas"]:
            ranked = sorted(_column(results, fraction, alpha), key=lambda entry: -entry["mean"])
            if len(ranked) < 2:
                continue
            best, last = ranked[0], ranked[-1]
            alike = [e for e in ranked[1:] if best["mean"] - e["mean"] < max(best["std"], e["std"])]
            sentence = (
                f"{number} of {results['num_clients']} attack, alpha {alpha:g}: {_rule(best)} keeps most, {_told(best)}"
            )
            if alike:
                sentence += f", within the spread of it {', '.join(map(_rule, alike))}"
            sentences.append(f"{sentence}; {_rule(last)} keeps least, {_told(last)}.")
    diverged = sum(cell["num_diverged"] for cell in results["cells"])
    if diverged:
        sentences.append(f"{diverged} runs ended with parameters that are not finite.")
    return sentences


def print_summary(results: Results, console: Console) -> None:
    """Prints the worst case of every rule, with the attack that it was, and what the numbers say."""
    header, rows, best = _worst_cells(results, " " if len(results["alphas"]) < 4 else "\n")
    console.print()
    console.print(results["title"], style="bold", markup=False, highlight=False)
    console.print("Accuracy under the worst of the attacks, and which it was; * is chosen against the rule")
    width = len(results["alphas"])
    for k, number in enumerate(results["num_byzantine"]):
        console.print(f"\n{number} of {results['num_clients']} clients attack", highlight=False)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
        places = [0, *range(1 + k * width, 1 + (k + 1) * width)]
        for place in places:
            table.add_column(header[place].split("\n")[-1], no_wrap=True)
        for i, row in enumerate(rows):
            table.add_row(*(Text(row[p], style="bold green" if (i, p) in best else "") for p in places))
        console.print(table)
    for sentence in (*findings(results), *_notes(results)):
        line = Table.grid(padding=(0, 1))
        line.add_row("•", Text(sentence))
        console.print(line)


def markdown(results: Results) -> str:
    """The report as Markdown: worst cases, sentences, figures, and all numbers."""
    header, rows, best = _worst_cells(results, " ")
    rows = [
        [f"**{_md(cell)}**" if (i, k) in best else _md(cell) for k, cell in enumerate(row)]
        for i, row in enumerate(rows)
    ]
    parts = [
        f"# {results['title']}",
        "Accuracy under the worst of the attacks, and which it was; `*` is chosen against the rule.",
        _table([text.replace("\n", ", ") for text in header], rows),
        "\n".join(f"- {_md(sentence)}" for sentence in (*findings(results), *_notes(results))),
        *(f"![{caption}]({Path(path).as_posix()})" for caption, path in results["plots"].items()),
        "## All numbers",
        f"Mean ± standard deviation over seeds, of the last {results['tail']} rounds.",
    ]
    scores = accuracies(results)
    for a, alpha in enumerate(results["alphas"]):
        for k, number in enumerate(results["num_byzantine"]):
            parts.append(f"### alpha {alpha:g}, {number} of {results['num_clients']} attack")
            body = [[RULES[rule].label, *map(_spread, scores[r, k, :, a])] for r, rule in enumerate(results["rules"])]
            parts.append(_table(["", *(_md(ATTACKS[attack].label) for attack in results["attacks"])], body))
    for title, key in (("Data", "dataset"), ("Hyper-parameters", "setup"), ("Configuration", "config")):
        body = [[_md(str(name)), _md(str(value))] for name, value in results[key].items()]
        parts += [f"## {title}", _table(["", ""], body)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_summary(results: Results, root: str | os.PathLike[str]) -> Path:
    """Writes `report.md` into `root`, atomically, and returns its path."""
    path = Path(root) / "report.md"
    files.write_text(path, markdown(results))
    return path


def _notes(results: Results) -> list[str]:
    notes = []
    if results["baseline"] is not None:
        told = ", ".join(f"{v:.3f}" for v in results["baseline"])
        alphas = ", ".join(f"{alpha:g}" for alpha in results["alphas"])
        notes.append(f"For comparison, the mean with nobody attacking: {told} (alpha {alphas}).")
    programs = results["programs"]
    notes.append(
        f"Programs compiled: {programs['compiled']} in {programs['compile_seconds']:.0f} s (threads added up), run for "
        f"{programs['run_seconds']:.0f} s."
    )
    return notes


def _column(results: Results, fraction: float, alpha: float) -> list[dict[str, Any]]:
    return [entry for entry in results["worst"] if (entry["fraction"], entry["alpha"]) == (fraction, alpha)]


def _worst_cells(results: Results, between: str) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Header, rows of text and the best cells of each column."""
    columns = [
        (number, fraction, alpha)
        for fraction, number in zip(results["fractions"], results["num_byzantine"], strict=True)
        for alpha in results["alphas"]
    ]
    header = ["", *(f"{number} of {results['num_clients']}\nalpha {alpha:g}" for number, _, alpha in columns)]
    rows = [[RULES[rule].label] for rule in results["rules"]]
    best = set()
    for place, (_, fraction, alpha) in enumerate(columns):
        entries = {entry["rule"]: entry for entry in _column(results, fraction, alpha)}
        top = max((entry["mean"] for entry in entries.values()), default=np.nan)
        for i, rule in enumerate(results["rules"]):
            entry = entries.get(rule)
            rows[i].append(
                ABSENT if entry is None else f"{_short(entry['mean'])}{between}{ATTACKS[entry['attack']].label}"
            )
            if entry is not None and entry["mean"] == top:
                best.add((i, place + 1))
    return header, rows, best


def _rule(entry: Mapping[str, Any]) -> str:
    return RULES[entry["rule"]].label


def _told(entry: Mapping[str, Any]) -> str:
    return f"{entry['mean']:.3f} ({ATTACKS[entry['attack']].label})"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _spread(seeds: np.ndarray) -> str:
    if np.isnan(seeds).any():
        return ABSENT
    return _short(seeds.mean()) + (f" ±{_short(seeds.std(ddof=1))}" if len(seeds) > 1 else "")


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:" if len(header) > 2 else "---"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
