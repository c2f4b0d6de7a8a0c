import gc

import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import plots
from experiments.style import COLORS, byte_unit, palette

ROUNDS = np.arange(0, 50, 10)
CURVES = {"Cedar": np.linspace(0.2, 0.8, 15).reshape(3, 5), "FedAvg": np.linspace(0.2, 0.7, 5)}
SENT = {name: (np.arange(5) * 2_000_000, values) for name, values in CURVES.items()}
FRACTION = np.linspace(0, 1, 15).reshape(3, 5)
SPREAD = {"Cedar": (np.linspace(0, 0.4, 7), np.linspace(0.5, 1, 7)), "FedAvg": (np.full(7, 0.2), [0.5, np.nan])}


def draw_all(folder):
    plots.plot_learning(folder / "learning.png", ROUNDS, CURVES)
    plots.plot_adaptation(folder / "adaptation.png", np.arange(5), CURVES, metric="R2")
    plots.plot_uploads(folder / "uploads.png", ROUNDS, ["a", "b", "c"], FRACTION)
    plots.plot_bytes(folder / "bytes.png", SENT, order=["from scratch", "Cedar", "FedAvg"])
    plots.plot_spread(folder / "spread.png", SPREAD)
    plots.overview(
        folder / "overview.png",
        learning=(ROUNDS, CURVES),
        adaptation=(np.arange(5), CURVES),
        uploads=(ROUNDS, ["a", "b", "c"], FRACTION),
        sent=SENT,
        title="A title",
    )


def test_every_figure_is_a_png_with_ink_and_nothing_else_is_left(tmp_path):
    settings = dict(matplotlib.rcParams)
    draw_all(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["adaptation.png", "bytes.png", "learning.png", "overview.png", "spread.png", "uploads.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = matplotlib.image.imread(tmp_path / name)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600
        assert (pixels[..., :3].min(axis=-1) < 0.9).mean() > 0.01
    assert matplotlib.pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


def test_equal_numbers_give_equal_files(tmp_path):
    for name in ("a", "b"):
        plots.plot_spread(tmp_path / name, SPREAD)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_line_is_the_mean_and_band_the_deviation_of_known_values():
    ax = Figure().subplots()
    values = np.array([[0.0, 1.0, np.nan], [1.0, np.nan, np.nan], [5.0, 2.0, np.nan]])
    plots.draw_learning(ax, [1, 2, 3], {"A": values}, metric="loss")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 1.5, np.nan])
    band = ax.collections[0].get_paths()[0].vertices
    at_first = band[band[:, 0] == 1.0, 1]
    np.testing.assert_allclose([at_first.min(), at_first.max()], [2 - np.std([0, 1, 5]), 2 + np.std([0, 1, 5])])


def test_algorithms_keep_their_colour_when_others_are_left_out():
    axes = Figure().subplots(1, 2)
    names = ["A", "B", "C"]
    plots.draw_learning(axes[0], [1, 2], {name: [0, 1] for name in names}, order=names)
    plots.draw_learning(axes[1], [1, 2], {"C": [0, 1]}, order=names)
    assert axes[1].lines[0].get_color() == axes[0].lines[2].get_color() == COLORS[2]


def test_palette_tells_many_names_apart():
    styles = palette([f"name {number}" for number in range(24)])
    assert len(set(styles.values())) == 24


def test_uploads_are_drawn_from_the_first_layer_down():
    ax = Figure().subplots()
    image = plots.draw_uploads(ax, [1, 2], ["first", "second"], [[1.0, np.nan], [0.0, 0.5]])
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), [[1.0, np.nan], [0.0, 0.5]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second"]
    assert ax.get_ylim() == (1.5, -0.5)
    assert ax.get_xlim() == (0.5, 2.5)


def test_bytes_are_scaled_to_the_unit_named():
    ax = Figure().subplots()
    plots.draw_bytes(ax, {"A": ([[1e6, 3e6], [2e6, 4e6]], [0.1, 0.2]), "B": ([0, 0], [0.1, 0.1])})
    assert ax.get_xlabel() == "uploaded by all clients [MB]"
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [1.5, 3.5])


@pytest.mark.parametrize("count, unit", [(0, "B"), (999, "B"), (1000, "kB"), (10**9, "GB"), (10**16, "TB")])
def test_byte_unit(count, unit):
    assert byte_unit(count)[0] == unit


def test_errors_name_the_curve_and_the_shape(tmp_path):
    with pytest.raises(ValueError, match="Cedar must have one value for each of the 3 points, got 5"):
        plots.plot_learning(tmp_path / "a.png", [1, 2, 3], CURVES)
    with pytest.raises(ValueError, match=r"Cedar must have shape \[R, P\] or \[P\]"):
        plots.plot_learning(tmp_path / "a.png", [], {"Cedar": []})
    with pytest.raises(ValueError, match=r"fraction must have shape \[2, 5\] like \[L, P\], got \[3, 5\]"):
        plots.plot_uploads(tmp_path / "a.png", ROUNDS, ["a", "b"], FRACTION)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\]"):
        plots.plot_uploads(tmp_path / "a.png", ROUNDS, ["a", "b", "c"], 2 * FRACTION)
    assert list(tmp_path.iterdir()) == []


def test_single_points_single_clients_and_dead_curves_are_drawn(tmp_path):
    plots.plot_learning(tmp_path / "a.png", [0], {"A": [0.5], "B": [np.nan]})
    plots.plot_spread(tmp_path / "b.png", {"A": ([0.5], [0.6]), "B": ([np.nan], [0.7])})
    plots.plot_uploads(tmp_path / "c.png", [1], ["a"], [[1.0]])
    plots.plot_bytes(tmp_path / "d.png", {"A": ([0], [0.5])})
    assert len(list(tmp_path.iterdir())) == 4


def test_figures_are_collected(tmp_path):
    plots.plot_learning(tmp_path / "a.png", ROUNDS, CURVES)
    gc.collect()
    alive = [found for found in gc.get_objects() if isinstance(found, Figure)]
    plots.plot_learning(tmp_path / "a.png", ROUNDS, CURVES)
    gc.collect()
    assert len([found for found in gc.get_objects() if isinstance(found, Figure)]) <= len(alive)
