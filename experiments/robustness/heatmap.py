"""The figures of a grid: one heat map of rules against attacks for each alpha, and one of the worst cases."""

import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.robustness.contenders import ATTACKS, RULES
from experiments.robustness.summary import Results, accuracies
from experiments.style import FAINT, INK, page

COLORS = matplotlib.colormaps["viridis"]
UNDEFINED = "#eceef0"
CELL_WIDTH, CELL_HEIGHT = 0.56, 0.31
GAP = 0.28
"""Space between groups of columns, in cells."""
GROUPS = {
    "nothing": "",
    "own data": "attackers know their data",
    "honest updates": "all honest updates",
    "the rule too": "and the rule",
}
_OUTSIDE: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}


def draw_cells(ax: Axes, values: np.ndarray, rows: Sequence[str], lefts: Sequence[float]) -> None:
    """Coloured cells with their numbers; grey with a dash where a value is NaN.

    Args:
      ax: axes.
      values: `[rows, columns]` in 0..1.
      rows: names, the first at the top.
      lefts: left end of each column, in cells.
    """
    for (row, column), value in np.ndenumerate(values):
        known = np.isfinite(value)
        color: Any = COLORS(float(value)) if known else UNDEFINED
        ax.add_patch(Rectangle((lefts[column], row), 1, 1, facecolor=color, edgecolor="white", linewidth=1))
        text = ("1.0" if value >= 0.995 else f"{value:.2f}".removeprefix("0")) if known else "–"
        ink = ("white" if _luminance(color) < 0.5 else INK) if known else FAINT
        ax.text(lefts[column] + 0.5, row + 0.52, text, ha="center", va="center", fontsize=8.5, color=ink)
    ax.set(xlim=(0, lefts[-1] + 1), ylim=(len(rows), 0))
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.xaxis.tick_top()
    ax.tick_params(axis="both", length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def plot_attacks(path: str | os.PathLike[str], results: Results, alpha: float) -> None:
    """Writes rules against attacks as a PNG: a panel for each fraction, the worst case in the last column.

    Args:
      path: the PNG.
      results: see `experiments.robustness.summary`, with `worst`.
      alpha: which alpha.
    """
    scores = accuracies(results).mean(axis=-1)[..., results["alphas"].index(alpha)]
    groups = [GROUPS[ATTACKS[name].knowledge] for name in results["attacks"]]
    lefts = _lefts([*groups, "worst"])
    labels = [*(ATTACKS[name].label for name in results["attacks"]), "worst case"]
    rules, panels = results["rules"], len(results["fractions"])
    size = (2.3 + CELL_WIDTH * (lefts[-1] + 1), 2.1 + panels * (0.5 + CELL_HEIGHT * len(rules)))
    with page(path, size) as figure:
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        for k, ax in enumerate(axes):
            worst = np.full((len(rules), 1), np.nan)
            for entry in results["worst"]:
                if (entry["fraction"], entry["alpha"]) == (results["fractions"][k], alpha):
                    row, column = rules.index(entry["rule"]), results["attacks"].index(entry["attack"])
                    worst[row] = entry["mean"]
                    outline: Any = {"fill": False, "edgecolor": INK, "linewidth": 1.4, "zorder": 3}
                    ax.add_patch(Rectangle((lefts[column] + 0.03, row + 0.05), 0.94, 0.9, **outline))
            draw_cells(ax, np.concatenate([scores[:, k], worst], axis=1), [RULES[r].label for r in rules], lefts)
            _name_columns(ax, labels if k == 0 else [""] * len(labels), lefts, rotation=40)
            attackers = f"{results['num_byzantine'][k]} of {results['num_clients']} attack"
            ax.annotate(attackers, (0, 1), (-4, 6), ha="right", fontweight="bold", fontsize=10, **_OUTSIDE)
        _name_groups(axes[0], groups, lefts, height=62)
        told = f"{results['name']}, alpha {alpha:g}: a client holds {_classes(results, alpha)} classes"
        _title(figure, told, f"{_measure(results)} Outlined: the worst attack on the rule. *: chosen against the rule.")


def plot_worst(path: str | os.PathLike[str], results: Results) -> None:
    """Writes the worst case of every rule as a PNG, by fraction and alpha.

    Args:
      path: the PNG.
      results: see `experiments.robustness.summary`, with `worst` and `baseline`.
    """
    alphas, fractions = results["alphas"], results["fractions"]
    columns = [(fraction, alpha) for fraction in fractions for alpha in alphas]
    found = {(entry["rule"], entry["fraction"], entry["alpha"]): entry["mean"] for entry in results["worst"]}
    values = np.array([[found.get((rule, *column), np.nan) for column in columns] for rule in results["rules"]])
    rows = [RULES[rule].label for rule in results["rules"]]
    if results["baseline"] is not None:
        values = np.concatenate([np.tile(results["baseline"], len(fractions))[None], values])
        rows = ["mean, nobody attacks", *rows]
    groups = [f"{number} of {results['num_clients']} attack" for number in results["num_byzantine"] for _ in alphas]
    lefts = _lefts(groups)
    width = 2.6 + 1.35 * CELL_WIDTH * (lefts[-1] + 1)
    with page(path, (max(width, 7.0), 1.7 + CELL_HEIGHT * len(rows))) as figure:
        ax = figure.subplots()
        draw_cells(ax, values, rows, lefts)
        if results["baseline"] is not None:
            ax.axhline(1, color="white", linewidth=5)
        _name_columns(ax, [f"alpha {alpha:g}" for _, alpha in columns], lefts, rotation=0)
        _name_groups(ax, groups, lefts, height=22, color=INK)
        count = sum(name != "none" for name in results["attacks"])
        told = f"{results['name']}: accuracy under the worst of {count} attack{'s' if count != 1 else ''}"
        _title(figure, told, _measure(results))


def _classes(results: Results, alpha: float) -> str:
    held = results["dataset"]["classes per client"][f"alpha {alpha:g}"]
    return f"{held:g} of {results['dataset']['classes']}"


def _measure(results: Results) -> str:
    seeds = max((np.shape(cell["accuracy"])[1] for cell in results["cells"]), default=0)
    return (
        f"Test accuracy, mean of the last {results['tail']} of {results['rounds']} rounds and of {seeds} "
        f"seed{'s' if seeds != 1 else ''}."
    )


def _title(figure: Figure, text: str, below: str) -> None:
    figure.suptitle(text, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    figure.supxlabel(below, x=0.012, ha="left", fontsize=8.5, color=FAINT)


def _lefts(groups: Sequence[str]) -> list[float]:
    """Where columns begin, with a gap wherever another group does."""
    lefts, gaps = [], 0
    for place, group in enumerate(groups):
        gaps += place > 0 and group != groups[place - 1]
        lefts.append(place + GAP * gaps)
    return lefts


def _name_columns(ax: Axes, labels: Sequence[str], lefts: Sequence[float], *, rotation: float) -> None:
    ax.set_xticks([left + (0.35 if rotation else 0.5) for left in lefts], labels)
    for text in ax.get_xticklabels():
        text.set(rotation=rotation, ha="left" if rotation else "center", rotation_mode="anchor")


def _name_groups(ax: Axes, groups: Sequence[str], lefts: Sequence[float], *, height: float, color: str = FAINT) -> None:
    """Names above the columns of each group."""
    end = lefts[-1] + 1
    for group in filter(None, dict.fromkeys(groups)):
        places = [place for place, name in enumerate(groups) if name == group]
        left, right = lefts[places[0]], lefts[places[-1]] + 1
        ax.annotate(group, ((left + right) / 2 / end, 1), (0, height), ha="center", fontsize=9, color=color, **_OUTSIDE)


def _luminance(color: Sequence[float]) -> float:
    red, green, blue = color[:3]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
