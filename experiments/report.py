"""The results of a run for people: tables in the terminal, sentences, and Markdown; `experiments.page` makes them HTML.

Everything is made from one plain mapping, the content of `results.json`:

    {
      "title": "Digits as tasks",
      "metric": "accuracy",                    higher is better, unless "lower_is_better": true
      "steps": [0, 1, 5, 20],                  adaptation steps at which scores are told
      "runs": [                                one entry an algorithm, in the order of the table
        {
          "name": "Cedar",
          "scores": [[0.20, 0.43, 0.76, 0.82], ...],     [R, len(steps)]: one row a seed; null where unknown
          "uploaded_bytes": 123, "downloaded_bytes": 456, "saved_bytes": 78,     per seed, exact; null: does not apply
          "poisoned_caught": [7, 7], "honest_dropped": [0, 28],                  [count, of]; null: does not apply
          "seconds": 4.2,                                                        null: not measured
          "details": {"MCC": "0.81", "adapts by": "sgd 0.1"},                            text by column; may be absent
          "note": ""
        }
      ],
      "dataset": {...},                        `datasets.summary(federation)`
      "config": {...},                         what the run was asked for
      "plots": {"caption": "plots/learning.png"},        paths relative to the report
      "notes": ["..."]
    }

Only `metric`, `steps` and `runs` with `name` and `scores` must be there.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.style import byte_unit

Results = Mapping[str, Any]
ABSENT = "–"


def print_report(
    results: Results, console: Console | None = None, *, report: str | os.PathLike[str] | None = None
) -> None:
    """Prints the tables, what they say in sentences, and where the report is.

    Args:
      results: see the module.
      console: where to print; standard output when None.
      report: path of the report, named on the last line.
    """
    console = console or Console()
    title = results.get("title")
    console.print()
    if title:
        console.print(title, style="bold", markup=False, highlight=False)
    for table in results_tables(results):
        console.print(table)
    for sentence in [*findings(results), *results.get("notes", ())]:
        line = Table.grid(padding=(0, 1))
        line.add_row("•", Text(sentence))
        console.print(line)
    if report is not None:
        console.print(f"\nReport and plots: {os.fspath(report)}", markup=False, highlight=False, soft_wrap=True)


def results_tables(results: Results) -> list[Table]:
    """The results as rich tables, 80 columns wide where names are short: scores, then bytes and screening.

    Args:
      results: see the module. Bold: the best of each column of scores, and what is within the spread over seeds of it.

    Returns:
      The scores; then, where they are told, the details, and what it took.
    """
    header, rows, best = _score_cells(results, short=True)
    tables = [_rich_table(f"{_capital(results['metric'])} of new clients after", header, rows, best)]
    header, rows = detail_cells(results)
    if len(header) > 1:
        tables.append(_rich_table(f"After {results['steps'][-1]} steps", header, rows, set()))
    header, rows = _other_cells(results, exact=False)
    rows = [row for row in rows if any(cell != ABSENT for cell in row[1:])]
    if len(header) > 1:
        tables.append(_rich_table("What it took", header, rows, set()))
    return tables


def findings(results: Results) -> list[str]:
    """What the numbers say, in sentences: who leads after each number of steps and by how much; bytes; screening.

    Two algorithms are alike when their means differ by less than the larger of their standard deviations over seeds.

    Args:
      results: see the module.

    Returns:
      The sentences.

    Example:
      >>> runs = [{"name": "A", "scores": [[0.5], [0.7]]}, {"name": "B", "scores": [[0.9], [0.9]]}]
      >>> findings({"metric": "accuracy", "steps": [5], "runs": runs})
      ['After 5 steps B is best (accuracy 0.900); next is A, 0.300 behind.']
    """
    runs, sentences = _checked(results), []
    for column, step in enumerate(results["steps"]):
        ranked = _ranked(results, column)
        if len(ranked) < 2:
            continue
        name, top, _ = ranked[0]
        alike, others = _alike(ranked), [entry for entry in ranked if entry[0] not in _alike(ranked)]
        when = "Before adaptation" if step == 0 else f"After {step} step{'s' if step != 1 else ''}"
        if not others:
            low, high = min(mean for _, mean, _ in ranked), max(mean for _, mean, _ in ranked)
            sentences.append(f"{when} all are alike within the spread ({results['metric']} {low:.3f} to {high:.3f}).")
            continue
        sentence = f"{when} {name} is best ({results['metric']} {top:.3f})"
        if len(alike) > 1:
            sentence += f", {' and '.join(alike[1:])} within the spread of it"
        sentences.append(f"{sentence}; next is {others[0][0]}, {abs(top - others[0][1]):.3f} behind.")
    for name, _, run in runs:
        saved, sent = run.get("saved_bytes"), run.get("uploaded_bytes")
        if saved and sent is not None:
            share = saved / (saved + sent)
            sentences.append(f"{name} uploaded {human_bytes(sent)} and saved {human_bytes(saved)} ({share:.1%}).")
        caught, dropped = run.get("poisoned_caught"), run.get("honest_dropped")
        if caught and caught[1]:
            sentences.append(f"{name} caught {_share(caught)} of the poisoned uploads.")
        if dropped and dropped[1]:
            sentences.append(f"{name} wrongly dropped {_share(dropped)} of the honest uploads.")
    return sentences


def markdown(results: Results) -> str:
    """The report as Markdown."""
    header, rows, best = exact_cells(results)
    rows = [[f"**{cell}**" if (i, k) in best else cell for k, cell in enumerate(row)] for i, row in enumerate(rows)]
    parts = [f"# {results.get('title') or 'Results'}", _markdown_table(header, rows), caption_of(results)]
    header, rows = detail_cells(results)
    if len(header) > 1:
        parts += [f"After {results['steps'][-1]} steps:", _markdown_table(header, rows)]
    if sentences := [*findings(results), *results.get("notes", ())]:
        parts += ["## What came out", "\n".join(f"- {sentence}" for sentence in sentences)]
    for caption, path in results.get("plots", {}).items():
        parts.append(f"![{caption}]({Path(path).as_posix()})")
    for title, key in (("Data", "dataset"), ("Configuration", "config")):
        if results.get(key):
            parts += [f"## {title}", _markdown_table(["", ""], [[_md(k), _md(v)] for k, v in flat(results[key])])]
    return "\n\n".join(part for part in parts if part) + "\n"


def human_bytes(count: float) -> str:
    """A number of bytes in the decimal unit that reads best.

    Example:
      >>> human_bytes(1_234_567), human_bytes(46_000), human_bytes(999)
      ('1.23 MB', '46.0 kB', '999 B')
    """
    unit, size = byte_unit(count)
    return f"{count:.0f} B" if size == 1 else f"{count / size:#.3g}".removesuffix(".") + f" {unit}"


def _checked(results: Results) -> list[tuple[str, np.ndarray, Mapping[str, Any]]]:
    """Name, `[R, steps]` float64 scores and entry of each run."""
    for key in ("metric", "steps", "runs"):
        if key not in results:
            raise ValueError(
                f"results must hold 'metric', 'steps' and 'runs', got {', '.join(map(repr, results)) or 'nothing'}."
            )
    steps, checked = len(results["steps"]), []
    for run in results["runs"]:
        scores = np.array(run["scores"], np.float64)  # None becomes NaN
        if scores.ndim != 2 or scores.shape[1] != steps or len(scores) == 0:
            raise ValueError(
                f"scores of {run['name']!r} must have shape [R, {steps}] with R >= 1, got {list(scores.shape)}."
            )
        checked.append((run["name"], scores, run))
    return checked


def _mean_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation of what is known; NaN where nothing is, 0 for the spread of one value."""
    values = values[np.isfinite(values)]
    if values.size == 0:
        return np.nan, np.nan
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else 0.0


def _ranked(results: Results, column: int) -> list[tuple[str, float, float]]:
    """Name, mean and spread of the runs with known scores in a column, the best first."""
    sign = -1.0 if results.get("lower_is_better") else 1.0
    told = [(name, *_mean_std(scores[:, column])) for name, scores, _ in _checked(results)]
    return sorted((entry for entry in told if np.isfinite(entry[1])), key=lambda entry: -sign * entry[1])


def _alike(ranked: list[tuple[str, float, float]]) -> list[str]:
    """Names of the best and of all within the spread of it."""
    _, top, spread = ranked[0]
    return [name for name, mean, std in ranked if mean == top or abs(mean - top) < max(spread, std)]


def _score_cells(results: Results, *, short: bool) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Header, rows of text, and the cells (row, column) that share the best score; none where all are alike."""
    runs, best = _checked(results), set()
    several = any(len(scores) > 1 for _, scores, _ in runs)
    header = ["", *(f"{step} steps" if step != 1 else "1 step" for step in results["steps"])]
    rows = [[name, *(_score(*_mean_std(s), several, short) for s in scores.T)] for name, scores, _ in runs]
    for column in range(len(results["steps"])):
        ranked = _ranked(results, column)
        alike = _alike(ranked) if ranked else []
        if len(alike) < len(ranked):
            best |= {(row, column + 1) for row, (name, _, _) in enumerate(runs) if name in alike}
    return header, rows, best


def _other_cells(results: Results, *, exact: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of everything but scores; columns that nobody fills are left out."""
    runs = _checked(results)
    header, rows = [""], [[name] for name, _, _ in runs]
    bytes_text: Callable[[int], str] = _exact_bytes if exact else human_bytes
    count_text: Callable[[Sequence[int]], str] = _share if exact else "{0[0]}/{0[1]}".format
    columns: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("uploaded", "uploaded_bytes", bytes_text),
        ("saved", "saved_bytes", bytes_text),
        ("downloaded", "downloaded_bytes", bytes_text),
        ("poisoned caught", "poisoned_caught", count_text),
        ("honest dropped", "honest_dropped", count_text),
        ("seconds", "seconds", "{:.1f}".format),
        ("remark", "note", str),
    )
    for title, key, text in columns:
        values = [run.get(key) for _, _, run in runs]
        if (key == "downloaded_bytes" and not exact) or all(value in (None, "") for value in values):
            continue
        header.append(title)
        for row, value in zip(rows, values, strict=True):
            row.append(ABSENT if value is None else text(value))
    return header, rows


def detail_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the details that the runs tell."""
    runs = _checked(results)
    columns = list(dict.fromkeys(column for _, _, run in runs for column in run.get("details", {})))
    rows = [[name, *(run.get("details", {}).get(column, ABSENT) for column in columns)] for name, _, run in runs]
    return ["", *columns], rows


def exact_cells(results: Results) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Header, rows of text with exact bytes, and the cells (row, column) that share the best score."""
    header, rows, best = _score_cells(results, short=False)
    more, others = _other_cells(results, exact=True)
    return header + more[1:], [row + other[1:] for row, other in zip(rows, others, strict=True)], best


def _rich_table(title: str, header: list[str], rows: list[list[str]], best: set[tuple[int, int]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    for column, text in enumerate(header):
        narrow = text.replace(" ", "\n") if len(text) > 10 else text
        table.add_column(narrow, justify="right" if column else "left", no_wrap=True, vertical="bottom")
    for i, row in enumerate(rows):
        table.add_row(*(Text(cell, style="bold green" if (i, k) in best else "") for k, cell in enumerate(row)))
    return table


def _score(mean: float, std: float, with_spread: bool, short: bool) -> str:
    if not np.isfinite(mean):
        return ABSENT
    text = f"{mean:.3f} ±{std:.3f}" if with_spread else f"{mean:.3f}"
    return re.sub(r"\b0\.", ".", text) if short else text


def _share(count: Sequence[int]) -> str:
    return f"{count[0]} of {count[1]}" + (f" ({count[0] / count[1]:.1%})" if count[1] else "")


def _exact_bytes(count: int) -> str:
    return f"{count:,} B"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def caption_of(results: Results) -> str:
    """What the numbers of the table are."""
    most = max((len(run["scores"]) for run in results["runs"]), default=1)
    seeds = f"mean ± standard deviation of {most} seeds" if most > 1 else "one seed"
    return f"{_capital(results['metric'])} of new clients after so many steps; {seeds}. Bytes are those of one seed."


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of a nested mapping, keys joined by a dot."""
    rows = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += flat(item, f"{prefix}{key}.")
        elif isinstance(item, list | tuple):
            rows.append(
                (f"{prefix}{key}", ("\n" if any(isinstance(i, str) for i in item) else ", ").join(map(str, item)))
            )
        else:
            rows.append((f"{prefix}{key}", str(item)))
    return rows


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:" if len(header) > 2 else "---"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
