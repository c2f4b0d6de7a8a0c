"""Several runs side by side, as Markdown: `python -m experiments.personalisation.overview RUN [RUN ...]`.

Every run directory becomes a column, every algorithm a row; rows are sorted by their mean rank. The best of a column is
bold, and so is whatever lies within the spread of it (one standard deviation over seeds).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from cedarjax import metrics
from experiments import files
from experiments.personalisation.contenders import CONTENDERS
from experiments.personalisation.tournament import SCRATCH

ABSENT = "–"
Records = Mapping[str, Mapping[str, Any]]


class View(NamedTuple):
    """What a table shows."""

    title: str
    """Its heading."""
    read: Callable[[Mapping[str, Any]], np.ndarray]
    """`[seeds]` scores of a record."""


def _worst_decile(clients: Sequence[Any]) -> np.ndarray:
    last = jnp.asarray(clients, jnp.float32)[:, :, -1]
    return np.array([float(metrics.fairness(one).worst_decile) for one in last])


VIEWS = (
    View("New clients, after one step", lambda r: np.asarray(r["curve"])[:, 1]),
    View("New clients, after the last step", lambda r: np.asarray(r["curve"])[:, -1]),
    View("New clients, after the last step, mean of the worst tenth", lambda r: _worst_decile(r["clients"])),
    View("Clients that trained, on rows held back, as they are", lambda r: np.asarray(r["own_curve"])[:, 0]),
    View("Clients that trained, on rows held back, after the last step", lambda r: np.asarray(r["own_curve"])[:, -1]),
)


def load_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What a run has stored, by the key of the algorithm.

    Raises:
      ValueError: if there is nothing.
    """
    records = {path.stem: files.read_json(path) for path in sorted((folder / "contenders").glob("*.json"))}
    if not records:
        raise ValueError(f"runs must be run directories of experiments.personalisation, got {folder}.")
    return records


def table(view: View, runs: Mapping[str, Records]) -> str:
    """One table in Markdown.

    Args:
      view: what it shows.
      runs: heading of a column to what `load_records` gave.

    Returns:
      Lines, with the best in bold; rows are sorted by their mean rank over the columns in which they are.
    """
    scores = {
        heading: {key: np.asarray(view.read(record), np.float64) for key, record in records.items()}
        for heading, records in runs.items()
    }
    keys = [key for key in (SCRATCH, *CONTENDERS) if any(key in found for found in scores.values())]
    ranks = {heading: _ranks(found) for heading, found in scores.items()}
    keys.sort(key=lambda key: np.mean([rank[key] for rank in ranks.values() if key in rank]))
    lines = [f"| | {' | '.join(scores)} |", "|---|" + "---:|" * len(scores)]
    for key in keys:
        cells = [_cell(key, found) for found in scores.values()]
        lines.append(f"| {CONTENDERS[key].label if key in CONTENDERS else 'no training'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(scores: np.ndarray) -> float:
    """Mean over seeds, below everything where one of them is not finite."""
    mean = float(np.mean(scores))
    return mean if np.isfinite(mean) else -np.inf


def _ranks(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Share of the other algorithms that are better, 0 for the best."""
    means = {key: _mean(scores) for key, scores in found.items()}
    return {key: sum(other > mean for other in means.values()) / len(means) for key, mean in means.items()}


def _cell(key: str, found: Mapping[str, np.ndarray]) -> str:
    if key not in found:
        return ABSENT
    best = max(found.values(), key=_mean)
    mean, spread = _mean(found[key]), float(np.std(found[key]))
    if not np.isfinite(mean):
        return "diverged"
    is_best = mean >= _mean(best) - float(np.std(best))
    told = f"{_short(mean)} ±{_short(spread)}"
    return f"**{told}**" if is_best else told


def _short(value: float) -> str:
    """Three decimals, without a zero before the point."""
    return f"{value:.3f}".replace("0.", ".") if abs(value) < 1 else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""

    def overview(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> tuple[Path, ...]:
        """Prints the tables of several runs.

        Args:
          runs: run directories; a column is headed by the name of its directory.
        """
        return runs

    folders = tyro.cli(overview, prog="python -m experiments.personalisation.overview", args=arguments)
    try:
        runs = {folder.name: load_records(folder) for folder in folders}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for view in VIEWS:
        print(f"### {view.title}\n\n{table(view, runs)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
