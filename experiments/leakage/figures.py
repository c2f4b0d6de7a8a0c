"""The figures: what the attacker sees, and how many decibels it gets."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.leakage.pictures import unpack_pictures
from experiments.leakage.summary import Results, best
from experiments.style import COLORS, EDGE, FAINT, INK, page

COLUMNS = 11
"""Most ways to send beside each other; the true pictures come first in every band."""
CELL, GAP = 0.62, 0.07
LABEL = 0.38


def plot_pictures(path: str | os.PathLike[str], results: Results) -> None:
    """Writes the reconstructions of the strongest attacker as a PNG: a column for each way to send.

    Args:
      path: the PNG.
      results: see `experiments.leakage.summary`.
    """
    side = results["side"]
    true = unpack_pictures(results["true"], side)
    columns = [(r["name"], r["group"], best(r)) for r in results["runs"]]
    most = -(-len(columns) // -(-len(columns) // COLUMNS))  # in bands that are filled alike
    bands = [columns[start : start + most] for start in range(0, len(columns), most)]
    count, wide = len(true), max(most, 6) + 1  # the title needs as much
    height = 0.5 + len(bands) * (count * CELL + 1.0)
    width = wide * (CELL + GAP) * 1.28 + 0.2
    with page(path, (width, height)) as figure:
        figure.set_layout_engine("none")
        top = height - 1.15
        for band in bands:
            _draw_band(figure, (width, height), top, [("the truth", None, None), *band], true, side)
            top -= count * CELL + 1.0
        figure.text(0.1 / width, 1 - 0.12 / height, results["title"], fontsize=12, fontweight="bold", va="top")
        figure.text(
            0.1 / width,
            1 - 0.36 / height,
            "Reconstructions by the strongest attacker; below, its mean PSNR in decibels.",
            fontsize=8.5,
            color=FAINT,
            va="top",
        )


def _draw_band(
    figure: Figure,
    size: tuple[float, float],
    top: float,
    columns: Sequence[tuple[str, str | None, Mapping[str, Any] | None]],
    true: np.ndarray,
    side: int,
) -> None:
    width, height = size
    step = (CELL + GAP) * 1.28
    groups = [group for _, group, _ in columns]
    for place, (name, group, attacker) in enumerate(columns):
        left = 0.1 + place * step
        if group and group != groups[place - 1]:
            end = next((k for k in range(place, len(groups)) if groups[k] != group), len(groups))
            right = 0.1 + (end - 1) * step + CELL
            line = Line2D([left / width, right / width], [(top + LABEL) / height] * 2, color=EDGE, linewidth=0.8)
            figure.add_artist(line)
            figure.text(left / width, (top + LABEL + 0.03) / height, group, fontsize=8, color=FAINT, va="bottom")
        pictures = true if attacker is None else unpack_pictures(attacker["shown"], side)
        for row, picture in enumerate(pictures):
            box = (left / width, (top - (row + 1) * CELL) / height, CELL / width, (CELL - GAP) / height)
            ax = figure.add_axes(box)
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
        middle = (left + CELL / 2) / width
        label = _wrap(name)
        figure.text(middle, (top + 0.04) / height, label, ha="center", va="bottom", fontsize=7.2, linespacing=1.05)
        if attacker is not None:
            text = f"{np.mean(attacker['psnr']):.1f}"
            below = (top - len(pictures) * CELL - 0.02) / height
            figure.text(middle, below, text, ha="center", va="top", fontsize=8, color=INK)


def _wrap(name: str, width: int = 12) -> str:
    """Words on lines of at most so many letters."""
    lines = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def plot_psnr(path: str | os.PathLike[str], results: Results) -> None:
    """Writes the mean PSNR of each way to send as a PNG, without and with public pictures.

    Args:
      path: the PNG.
      results: see `experiments.leakage.summary`.
    """
    records = [r for r in results["runs"] if r["key"] != "blind"]
    blind = [r for r in results["runs"] if r["key"] == "blind"]
    places, place = [], 0.0
    for before, record in itertools.pairwise([None, *records]):
        place += 1.0 if before is None or before["group"] == record["group"] else 1.7
        places.append(place)
    with page(path, (6.8, 0.9 + 0.235 * places[-1])) as figure:
        ax = figure.subplots()
        marks = (
            ("without other pictures", False, COLORS[2], "o", 0.16),
            ("informed by public pictures", True, COLORS[1], "s", -0.16),
        )
        for label, may_know, color, marker, shift in marks:
            values = [np.asarray(best(r, may_know=may_know)["psnr"]) for r in records]
            means, spread = [v.mean() for v in values], [v.std() for v in values]
            where = np.array(places) - shift
            ax.errorbar(means, where, xerr=spread, fmt="none", ecolor=color, elinewidth=1, alpha=0.45)
            ax.plot(means, where, marker, color=color, markersize=5, markeredgecolor="white", label=label)
        if blind:
            level = float(np.mean(best(blind[0])["psnr"]))
            ax.axvline(level, color="0.45", linewidth=1, linestyle=":")
            ax.annotate(
                "blind guess",
                (level, 1),
                (3, 2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=8,
                color="0.35",
                annotation_clip=False,
            )
        ax.set_yticks(places, [r["name"] for r in records])
        ax.set(ylim=(places[-1] + 0.8, 0.2), xlabel="PSNR of the best attacker, decibels")
        ax.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
