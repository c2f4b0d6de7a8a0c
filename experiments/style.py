"""How all figures look: colours, type, pages and legends.

Figures are made outside pyplot, so that nothing is kept, shown or left open.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from experiments.files import write_bytes

COLORS = ("#0b7a5a", "#d1495b", "#3066be", "#e09f3e", "#7a5195", "#5f6772", "#27a3b4", "#9c6644")
MARKERS = ("o", "s", "^", "D", "v", "p", "X", "h")
INK, FAINT, EDGE, GRID = "#22262b", "#8a9099", "#c3c8cd", "#e8ebee"
UPLOADED = LinearSegmentedColormap.from_list("uploaded", ["#eef1f0", "#9fd0bd", "#0b7a5a"])
UNITS = (("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12))
STYLE: Any = {
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": EDGE,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": EDGE,
    "ytick.color": EDGE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.8,
    "savefig.dpi": 150,
}


class Style(NamedTuple):
    """How an algorithm looks in every figure."""

    color: str
    marker: str


def palette(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for each name, by its place; after eight names colours come again with other markers.

    Example:
      >>> palette(["Cedar", "FedAvg"])["FedAvg"].marker
      's'
    """
    size = len(COLORS)
    distinct = list(dict.fromkeys(names))
    return {
        name: Style(COLORS[index % size], MARKERS[(index + index // size) % size])
        for index, name in enumerate(distinct)
    }


def byte_unit(largest: float) -> tuple[str, int]:
    """The decimal unit in which a number of bytes reads best, and its size.

    Example:
      >>> byte_unit(2_500_000)
      ('MB', 1000000)
    """
    # Three digits of 0.9995 round to one.
    return next(((unit, size) for unit, size in reversed(UNITS) if largest >= 0.9995 * size), UNITS[0])


@contextlib.contextmanager
def page(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator[Figure]:
    """A figure outside pyplot, so that nothing has to be closed; written when the block ends without an exception."""
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.05, hspace=0.08)
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def styles_of(curves: Mapping[str, Any], order: Sequence[str] | None) -> dict[str, Style]:
    """The style of each curve, when `order` names all algorithms of the report."""
    styles = palette([*(order or ()), *curves])
    return {name: styles[name] for name in curves}


def legend(figure: Figure, names: Iterable[str], order: Sequence[str] | None) -> None:
    """One legend for the whole figure, below it."""
    styles = styles_of(dict.fromkeys(names), order)
    lines = [
        Line2D([], [], color=style.color, marker=style.marker, markersize=6, markeredgecolor="white", label=name)
        for name, style in styles.items()
    ]
    width = sum(len(name) + 6 for name in styles)
    rows = math.ceil(width / (figure.get_figwidth() * 12))
    figure.legend(handles=lines, loc="outside lower center", ncols=math.ceil(len(lines) / rows), columnspacing=1.6)
