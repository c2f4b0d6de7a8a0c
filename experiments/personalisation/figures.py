"""How all algorithms stand at a glance: one row each, new clients beside those that trained."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.style import FAINT, INK, page

SHADES = ("#c3c8cd", "#8fc1b1", "#0b7a5a")


def draw_rows(ax: Axes, rows: Sequence[Mapping[int, np.ndarray]], steps: Sequence[int], *, color: str = INK) -> None:
    """A dot for each number of adaptation steps, and the spread over seeds of the last one.

    Args:
      ax: axes; row `i` is drawn at height `i`.
      rows: number of steps to `[seeds]` scores.
      steps: the numbers to draw, the last one strongest.
      color: of the spread.
    """
    shades = SHADES[-len(steps) :]
    for place, row in enumerate(rows):
        means = [float(np.mean(row[step])) for step in steps]
        ax.plot([min(means), max(means)], [place, place], color="#e8ebee", linewidth=3, zorder=1)
        last = np.asarray(row[steps[-1]])
        ax.plot([last.min(), last.max()], [place, place], color=color, linewidth=1, zorder=2)
        for mean, shade in zip(means, shades, strict=True):
            ax.scatter(mean, place, s=34, color=shade, edgecolor="white", linewidth=0.7, zorder=3)


def plot_standing(
    path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]], steps: Sequence[int], *, metric: str
) -> None:
    """Writes one row an algorithm: scores of new clients after some steps, and of clients that trained.

    Args:
      path: where the PNG goes.
      records: with `name`, `curve` and `own_curve`, each curve `[seeds, steps + 1]`.
      steps: numbers of adaptation steps to tell, increasing.
      metric: name of what is drawn.
    """
    last = steps[-1]
    ranked = sorted(records, key=lambda r: float(np.mean(r["curve"], axis=0)[last]))
    curves = {kind: [np.asarray(r[kind]) for r in ranked] for kind in ("curve", "own_curve")}
    with page(path, (8.6, 1.4 + 0.24 * len(ranked))) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        told = [step for step in steps if step > 0] or list(steps)
        draw_rows(left, [{s: c[:, s] for s in told} for c in curves["curve"]], told)
        ends = [0, last]
        draw_rows(right, [{s: c[:, s] for s in ends} for c in curves["own_curve"]], ends)
        left.set_yticks(range(len(ranked)), [r["name"] for r in ranked])
        for ax, title, shown in (
            (left, "New clients", told),
            (right, "Clients that trained, rows held back", ends),
        ):
            ax.set_title(title)
            ax.set_xlabel(metric)
            ax.grid(axis="y", visible=False)
            for step, shade in zip(shown, SHADES[-len(shown) :], strict=True):
                label = f"{step} step{'s' if step != 1 else ''}"
                ax.scatter([], [], s=34, color=shade, label=label)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -1.8 / (len(ranked) + 2)), ncols=len(shown))
        baseline = next((float(np.mean(r["curve"], axis=0)[last]) for r in ranked if r["key"] == "scratch"), None)
        if baseline is not None:
            left.axvline(baseline, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
            left.annotate("no training", (baseline, len(ranked) - 0.4), color=FAINT, fontsize=8, ha="center")
