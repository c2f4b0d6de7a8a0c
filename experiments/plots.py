"""Figures of a run, drawn from plain numbers; no state is kept and nothing is shown on a screen.

Every `draw_*` function draws on axes, every `plot_*` function makes a figure of it and writes a PNG atomically. Shape
letters: `R` runs (seeds), `P` points in time, `m` adaptation steps, `L` layers, `K` held-out clients. Curves are
`[R, P]`, or `[P]` for a single run; the line is the mean over runs and the band reaches one standard deviation to
either side. NaN is a gap. `order` names all algorithms of a report, so that each keeps its colour in figures that show
only some of them.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.style import INK, UPLOADED, Style, byte_unit, legend, page, styles_of

Curves = Mapping[str, Any]
BytesCurves = Mapping[str, tuple[Any, Any]]
Order = Sequence[str] | None


def draw_learning(ax: Axes, rounds: Any, curves: Curves, *, metric: str = "accuracy", order: Order = None) -> None:
    """A metric against the round of training.

    Args:
      ax: axes.
      rounds: `[P]`, or a mapping from algorithm to `[P]` when they were evaluated at different rounds.
      curves: algorithm to `[R, P]` or `[P]`.
      metric: name of what is drawn.
      order: all algorithms of the report.
    """
    for name, style in styles_of(curves, order).items():
        x = rounds[name] if isinstance(rounds, Mapping) else rounds
        _line(ax, name, x, curves[name], style)
    ax.set(xlabel="round", ylabel=metric)
    _tidy(ax, metric)


def draw_adaptation(ax: Axes, steps: Any, curves: Curves, *, metric: str = "accuracy", order: Order = None) -> None:
    """A metric of held-out clients against their own adaptation steps; at 0 the model is as it was downloaded.

    Args:
      ax: axes.
      steps: `[m + 1]` step numbers.
      curves: algorithm to `[R, m + 1]` or `[m + 1]`.
      metric: name of what is drawn.
      order: all algorithms of the report.
    """
    for name, style in styles_of(curves, order).items():
        _line(ax, name, steps, curves[name], style, with_marker=len(steps) <= 25)
    ax.set(xlabel="adaptation steps on the new client", ylabel=metric)
    _tidy(ax, metric)


def draw_uploads(ax: Axes, rounds: Any, layers: Sequence[str], fraction: Any) -> Any:
    """Which layers each round uploaded.

    Args:
      ax: axes.
      rounds: `[P]` equally spaced round numbers.
      layers: names of the `L` judged layers, the first at the top.
      fraction: `[L, P]` share of the round's clients that uploaded the layer, 0 to 1; NaN where it is not known.

    Returns:
      The image, for a colour bar.

    Raises:
      ValueError: when the shape or the range is wrong.
    """
    x, fraction = np.asarray(rounds, np.float64), np.asarray(fraction, np.float64)
    if fraction.shape != (len(layers), len(x)) or fraction.size == 0:
        raise ValueError(f"fraction must have shape [{len(layers)}, {len(x)}] like [L, P], got {list(fraction.shape)}.")
    known = fraction[np.isfinite(fraction)]
    if known.size and (known.min() < 0 or known.max() > 1):
        raise ValueError(f"fraction must lie in [0, 1], got {known.min()} to {known.max()}.")
    half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
    left, right = x[0] - half, x[-1] + half
    image = ax.imshow(
        fraction,
        aspect="auto",
        cmap=UPLOADED,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(left, right, len(layers) - 0.5, -0.5),
    )
    ax.grid(False)
    ax.set_yticks(np.arange(len(layers)), layers)
    ax.hlines(np.arange(1, len(layers)) - 0.5, left, right, color="white", linewidth=3)
    ax.set(xlabel="round", xlim=(left, right))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def draw_bytes(
    ax: Axes, curves: BytesCurves, *, metric: str = "accuracy", order: Order = None, is_log: bool = False
) -> None:
    """A metric against the bytes that all clients have uploaded so far.

    Args:
      ax: axes.
      curves: algorithm to `(bytes, values)`, each `[R, P]` or `[P]`; bytes are cumulative counts.
      metric: name of what is drawn.
      order: all algorithms of the report.
      is_log: whether bytes differ by orders of magnitude.
    """
    sent = {name: np.nanmean(_runs(f"bytes of {name}", pair[0]), axis=0) for name, pair in curves.items()}
    unit, scale = byte_unit(max((values.max() for values in sent.values()), default=0))
    for name, style in styles_of(curves, order).items():
        x = sent[name] / scale
        _line(ax, name, x, curves[name][1], style)
        end = _runs(name, curves[name][1])[:, -1]
        ax.plot(x[-1], end.mean(), style.marker, color=style.color, markersize=7, markeredgecolor="white", zorder=4)
    ax.set(xlabel=f"uploaded by all clients [{unit}]", ylabel=metric)
    _tidy(ax, metric, integer_x=False)
    if is_log:
        ax.set_xscale("log")


def draw_spread(
    ax: Axes, values: Mapping[str, tuple[Any, Any]], *, metric: str = "accuracy", order: Order = None
) -> None:
    """How a metric is spread over held-out clients: faint before adaptation, full after it.

    A dot is a client, the thick bar the median, the thin line reaches from quartile to quartile.

    Args:
      ax: axes.
      values: algorithm to `(before, after)`, each `[K]`.
      metric: name of what is drawn.
      order: all algorithms of the report.
    """
    rng = np.random.default_rng(0)
    for place, (name, style) in enumerate(styles_of(values, order).items()):
        for shift, alpha, clients in zip((-0.18, 0.18), (0.35, 1.0), values[name], strict=True):
            clients = np.asarray(clients, np.float64).ravel()
            clients = clients[np.isfinite(clients)]
            if clients.size == 0:
                continue
            x = place + shift + rng.uniform(-0.08, 0.08, clients.size)
            ax.scatter(x, clients, s=18, color=style.color, alpha=0.55 * alpha, linewidths=0)
            low, median, high = np.quantile(clients, (0.25, 0.5, 0.75))
            ax.vlines(place + shift, low, high, color=INK, linewidth=1.1, alpha=max(alpha, 0.5))
            ax.hlines(
                median, place + shift - 0.12, place + shift + 0.12, color=INK, linewidth=2.4, alpha=max(alpha, 0.5)
            )
    names = list(styles_of(values, order))
    ax.set_xticks(np.arange(len(names)), [textwrap.fill(name, 15, break_long_words=False) for name in names])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel=metric, xlim=(-0.5, len(names) - 0.5))
    ax.grid(False, axis="x")
    _limit(ax, metric)


def plot_learning(
    path: str | os.PathLike[str], rounds: Any, curves: Curves, *, metric: str = "accuracy", order: Order = None
) -> None:
    """Writes `draw_learning` as a PNG."""
    with page(path, (6.8, 4.2)) as figure:
        ax = figure.subplots()
        draw_learning(ax, rounds, curves, metric=metric, order=order)
        ax.set_title("While the model trains")
        legend(figure, curves, order)


def plot_adaptation(
    path: str | os.PathLike[str], steps: Any, curves: Curves, *, metric: str = "accuracy", order: Order = None
) -> None:
    """Writes `draw_adaptation` as a PNG."""
    with page(path, (6.8, 4.2)) as figure:
        ax = figure.subplots()
        draw_adaptation(ax, steps, curves, metric=metric, order=order)
        ax.set_title("New clients as they adapt")
        legend(figure, curves, order)


def plot_uploads(path: str | os.PathLike[str], rounds: Any, layers: Sequence[str], fraction: Any) -> None:
    """Writes `draw_uploads` as a PNG."""
    with page(path, (7.4, 1.5 + 0.38 * len(layers))) as figure:
        ax = figure.subplots()
        image = draw_uploads(ax, rounds, layers, fraction)
        ax.set_title("Layers uploaded in each round")
        _color_bar(figure, ax, image)


def plot_bytes(
    path: str | os.PathLike[str],
    curves: BytesCurves,
    *,
    metric: str = "accuracy",
    order: Order = None,
    is_log: bool = False,
) -> None:
    """Writes `draw_bytes` as a PNG."""
    with page(path, (6.8, 4.2)) as figure:
        ax = figure.subplots()
        draw_bytes(ax, curves, metric=metric, order=order, is_log=is_log)
        ax.set_title("What the upload buys")
        legend(figure, curves, order)


def plot_spread(
    path: str | os.PathLike[str],
    values: Mapping[str, tuple[Any, Any]],
    *,
    metric: str = "accuracy",
    order: Order = None,
) -> None:
    """Writes `draw_spread` as a PNG."""
    with page(path, (max(5.0, 1.3 * len(values) + 1.2), 4.2)) as figure:
        ax = figure.subplots()
        draw_spread(ax, values, metric=metric, order=order)
        ax.set_title("Each new client, before (faint) and after adaptation")


def overview(
    path: str | os.PathLike[str],
    *,
    learning: tuple[Any, Curves],
    adaptation: tuple[Any, Curves],
    uploads: tuple[Any, Sequence[str], Any],
    sent: BytesCurves,
    metric: str = "accuracy",
    title: str = "",
    order: Order = None,
) -> None:
    """Writes learning, adaptation, uploads and bytes as one PNG of two by two, with one legend.

    Args:
      path: the PNG.
      learning: `(rounds, curves)` of `draw_learning`.
      adaptation: `(steps, curves)` of `draw_adaptation`.
      uploads: `(rounds, layers, fraction)` of `draw_uploads`.
      sent: curves of `draw_bytes`.
      metric: name of what is drawn.
      title: one line above all.
      order: all algorithms of the report; those drawn, when None.
    """
    drawn = [*learning[1], *adaptation[1], *sent]
    order = list(dict.fromkeys([*(order or ()), *drawn]))
    with page(path, (11.4, 7.8)) as figure:
        (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
        draw_adaptation(top_left, *adaptation, metric=metric, order=order)
        top_left.set_title("New clients as they adapt")
        draw_learning(top_right, *learning, metric=metric, order=order)
        top_right.set_title("While the model trains")
        draw_bytes(bottom_left, sent, metric=metric, order=order)
        bottom_left.set_title("What the upload buys")
        image = draw_uploads(bottom_right, *uploads)
        bottom_right.set_title("Layers uploaded in each round")
        _color_bar(figure, bottom_right, image)
        legend(figure, drawn, order)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")


def _runs(name: str, values: Any) -> np.ndarray:
    values = np.atleast_2d(np.asarray(values, np.float64))
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must have shape [R, P] or [P] with at least one point, got {list(values.shape)}.")
    return values


def _line(ax: Axes, name: str, x: Any, values: Any, style: Style, *, with_marker: bool = False) -> None:
    runs, x = _runs(name, values), np.asarray(x, np.float64)
    if x.shape != runs.shape[1:]:
        raise ValueError(f"{name} must have one value for each of the {x.size} points, got {runs.shape[1]}.")
    known = np.isfinite(runs)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, runs, 0.0).sum(axis=0) / count
    deviation = np.sqrt((np.where(known, runs - mean, 0.0) ** 2).sum(axis=0) / count)
    mean = np.where(known.any(axis=0), mean, np.nan)
    dots: dict[str, Any] = dict(marker=style.marker, markersize=5.5, markeredgecolor="white", markeredgewidth=0.8)
    lone = x.size == 1
    ax.plot(x, mean, color=style.color, label=name, zorder=3, **(dots if with_marker or lone else {}))
    if len(runs) > 1:
        ax.fill_between(x, mean - deviation, mean + deviation, color=style.color, alpha=0.14, linewidth=0, zorder=2)


def _tidy(ax: Axes, metric: str, *, integer_x: bool = True) -> None:
    if integer_x:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(False, axis="x")
    ax.margins(x=0.03)
    _limit(ax, metric)


def _limit(ax: Axes, metric: str) -> None:
    """Shares stay within 0 and 1."""
    if metric.lower().startswith(("accuracy", "precision", "recall", "f1")):
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))


def _color_bar(figure: Figure, ax: Axes, image: Any) -> None:
    bar = figure.colorbar(image, ax=ax, ticks=[0, 0.5, 1], aspect=14, pad=0.02, shrink=0.9)
    bar.ax.set_yticklabels(["none", "half", "all"])
    bar.ax.tick_params(length=0, labelsize=8.5)
    bar.set_label("clients that upload", fontsize=8.5)
    bar.outline.set_visible(False)
