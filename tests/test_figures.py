"""Figures: the data, labels and order of curves; names and user settings that Matplotlib trips over; image grids."""

import math
import warnings

import numpy as np
import pytest
from PIL import Image

from igpt_jax import storage
from igpt_jax.metrics import figures
from igpt_jax.report import charts

NASTY = ("cost$%$", "a_$b", "_hidden", "$\\frac{$", "猫の写真", "caf\udce9", "tab\there", "long" * 60, "", r"a\$b^{")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test draws, in order. They are written too, as always."""
    figures_drawn, save = [], figures._save

    def record(path, figure):
        save(path, figure)
        figures_drawn.append(figure)

    monkeypatch.setattr(figures, "_save", record)
    return figures_drawn


def curves(axes):
    """(label, x, y) of each line with a label, in the order in which they were drawn. Error bars are left out."""
    return [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()
            if not line.get_label().startswith("_")]


def legend(owner):
    """Texts of the legend of axes or of a figure."""
    box = owner.get_legend() if hasattr(owner, "get_legend") else owner.legends[0]
    return [text.get_text() for text in box.texts]


def axis_labels(axes):
    return axes.get_xlabel(), axes.get_ylabel()


def test_loss_curve(tmp_path, drawn):
    """Both losses over their own steps, null values left out, and ln V. Seen to fail with the two metrics swapped, with
    steps counted instead of read, with the first loss instead of the last in the label, and with log2."""
    metrics = [{"step": step, "train/nats_per_pixel": 3 / step} for step in (1, 2, 4)] + [
        {"step": 4, "eval/nats_per_pixel": 1.0}, {"step": 5, "train/nats_per_pixel": None}]
    figures.loss_curve(storage.path(tmp_path / "figures" / "loss.png"), metrics, palette_size=17)
    with Image.open(tmp_path / "figures" / "loss.png") as image:
        assert image.width > 800
    (axes,) = drawn[0].axes
    guessing, train, held_out = curves(axes)
    assert guessing == ("guessing: ln 17 = 2.833", [0, 1], [math.log(17)] * 2)  # x is a share of the width
    assert train == ("train: 0.750 at the end", [1, 2, 4], [3, 1.5, 0.75])
    assert held_out == ("held-out: 1.000 at the end", [4], [1])
    assert legend(axes) == [guessing[0], train[0], held_out[0]] and axis_labels(axes) == ("step", "nats per pixel")
    assert [line.get_linestyle() for line in axes.get_lines()] == ["--", "-", "-"]


def test_accuracy_by_layer(tmp_path, drawn):
    """Per cent over layers with intervals, and two baselines. Seen to fail with fractions instead of per cent, with
    the two ends of the intervals swapped, and with rows numbered instead of their layers."""
    rows = [{"layer": layer, "test_accuracy": accuracy, "interval": (accuracy - 0.1, accuracy + 0.05)}
            for layer, accuracy in ((0, 0.25), (2, 0.75), (3, 0.5))]
    figures.accuracy_by_layer(storage.path(tmp_path / "a.png"), {"": rows, "run": rows[:1]},
                              {"pixels": 0.3, "random": 0.125}, 1234)
    (axes,) = drawn[0].axes
    first, second = axes.containers
    assert [each.get_label() for each in axes.containers] == ["layers, with 95 % intervals", "run"]
    assert list(first.lines[0].get_xdata()) == [0, 2, 3] and list(first.lines[0].get_ydata()) == [25, 75, 50]
    assert list(second.lines[0].get_xdata()) == [0] and list(second.lines[0].get_ydata()) == [25]
    ends = [segment[:, 1] for segment in first.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [(15, 30), (65, 80), (40, 55)])
    assert curves(axes) == [("pixels: 30.0 %", [0, 1], [30] * 2), ("random: 12.5 %", [0, 1], [12.5] * 2)]
    assert set(legend(drawn[0])) == {"layers, with 95 % intervals", "run", "pixels: 30.0 %", "random: 12.5 %"}
    assert axis_labels(axes) == ("layer (0: the embedding)", "accuracy on 1,234 test images, %")


def test_accuracy_over_loss(tmp_path, drawn):
    """Each run's points in their order, the loss falling to the right, steps written at the points. Seen to fail
    with the axis not inverted, and with points sorted by accuracy."""
    rows = [{"nats_per_pixel": nats, "steps": steps, "probe_accuracy": accuracy,
             "probe_interval": (accuracy - 0.1, accuracy + 0.1)}
            for nats, steps, accuracy in ((3.0, 500, 0.5), (2.5, 1000, 0.75), (2.0, 1500, 0.625))]
    figures.accuracy_over_loss(storage.path(tmp_path / "a.png"), {"small": rows, "large": rows[1:]}, 10)
    (axes,) = drawn[0].axes
    small, large = (container.lines[0] for container in axes.containers)
    assert (list(small.get_xdata()), list(small.get_ydata())) == ([3, 2.5, 2], [50, 75, 62.5])
    assert (list(large.get_xdata()), list(large.get_ydata())) == ([2.5, 2], [75, 62.5])
    assert legend(drawn[0]) == ["small", "large"] and axes.xaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["500", "1,000", "1,500", "1,000", "1,500"]


def test_scaling_curve(tmp_path, drawn):
    """Seconds left, GiB right, each with the compiled point; a device's memory on the right alone. Seen to fail with
    seconds in both panels, with bytes for GiB, and with the memory's line in both."""
    figures.scaling_curve(storage.path(tmp_path / "s.png"), "igpt_s on v5e", [(8, 4.0, 2**33), (16, 2.0, 2**32),
                          (1024, 0.5, 2**31)], (16, 2.5, 3 * 2**30), 2**34)
    seconds, memory = drawn[0].axes
    counts = [8, 16, 1024]
    assert curves(seconds) == [("by formula, best mesh", counts, [4, 2, 0.5]), ("compiled", [16], [2.5])]
    assert curves(memory) == [("by formula, best mesh", counts, [8, 4, 2]), ("compiled", [16], [3]),
                              ("a device's memory", [0, 1], [16, 16])]
    assert legend(memory) == [name for name, _, _ in curves(memory)]
    assert axis_labels(seconds) == ("devices", "seconds per step") and axis_labels(memory)[1] == "GiB per device"
    assert drawn[0].get_suptitle() == "igpt_s on v5e"
    assert [text.get_text() for text in seconds.get_xticklabels()] == ["8", "1,024"]  # every second one
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in drawn[0].axes)


def test_more_runs_than_colors_are_thinned_out(tmp_path, drawn):
    """Evenly, first and last kept, in their order, and the title says so. Seen to fail with the first ten drawn."""
    runs = {f"run {index}": [(1, 3.0), (2, float(index))] for index in range(19)}
    figures.loss_over_steps(storage.path(tmp_path / "loss.png"), runs)
    (axes,) = drawn[0].axes
    assert curves(axes) == [(f"run {index}: {index}.000 at the end", [1, 2], [3, index]) for index in range(0, 19, 2)]
    assert axes.get_title() == "10 of 19 runs"


def test_image_grid(tmp_path):
    """Seen to fail with rows of images that overlap the gap."""
    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    grid = figures.image_grid(images, columns=3, scale=4, gap=2)
    assert grid.size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    pixels = np.asarray(grid)
    np.testing.assert_array_equal(pixels[10:18, 10:18], images[4].repeat(4, axis=0).repeat(4, axis=1))
    assert (pixels[:, 8:10] == 255).all() and (pixels[10:, 20:] == 255).all()
    figures.save_png(storage.path(tmp_path / "grid.png"), grid)
    with Image.open(tmp_path / "grid.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def loss_of_runs(path, names):
    figures.loss_over_steps(storage.path(path), {name: [(1, 3.0), (2, 2.5)] for name in names})
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", NASTY)
def test_any_name_is_drawn(tmp_path, name, capfd):
    """Its line is in the legend, and stderr stays empty. Seen to fail with names given to Matplotlib as they are."""
    with warnings.catch_warnings(action="error"):
        picture = loss_of_runs(tmp_path / "loss.png", [name])
    assert capfd.readouterr().err == ""
    bottom = picture[-picture.shape[0] // 8:, :, :3]
    assert (np.ptp(bottom.astype(int), axis=2) > 60).any(), "no colored line in the legend"
    assert charts.lines([charts.Series(name, [1, 2], [3, 2]), charts.Series("b", [1, 2], [3, 2])], "x", "y")


@pytest.mark.parametrize("setting", ["text.usetex", "svg.fonttype", "font.size", "axes.prop_cycle"])
def test_a_users_matplotlibrc_changes_no_figure(tmp_path, setting):
    """Seen to fail with text.usetex, which needs LaTeX, and with another font size."""
    import matplotlib

    plain, chart = loss_of_runs(tmp_path / "loss.png", ["a"]), charts.split_bar({"a": 1.0}, "x")
    values = {"text.usetex": True, "svg.fonttype": "path", "font.size": 3, "axes.prop_cycle": "cycler('color', ['k'])"}
    with matplotlib.rc_context({setting: values[setting]}):
        np.testing.assert_array_equal(loss_of_runs(tmp_path / "loss.png", ["a"]), plain)
        assert charts.split_bar({"a": 1.0}, "x") == chart
        assert matplotlib.rcParams["text.usetex"] is (setting == "text.usetex")


def test_a_notebooks_backend_changes_nothing(tmp_path, python):
    """Seen to fail with a plain import of Matplotlib, which refuses a backend that is not installed."""
    done = python("figure_with_backend.py", tmp_path / "loss.png", devices=1,
                  env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert (tmp_path / "loss.png").stat().st_size > 5000 and done.stderr == ""


def test_a_figure_that_cannot_be_drawn_or_written_costs_one_line(tmp_path, capsys):
    """Seen to fail without the decorator `drawn`."""
    (tmp_path / "figures").write_text("a file, where a folder is needed")
    figures.loss_over_steps(storage.path(tmp_path / "figures" / "loss.png"), {"a": [(1, 3.0)]})
    assert charts.split_bar({"a": "much"}, "x") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("cannot be drawn: " in line for line in lines), lines


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_figures_omit_values_that_are_not_finite(tmp_path, bad, capsys):
    """Seen to fail with None, which tables hold for NaN."""
    runs = {f"run {index}": [(1, 3.0), (2, bad)] for index in range(30)} | {"none": [(1, bad)]}
    figures.loss_over_steps(storage.path(tmp_path / "loss.png"), runs)
    rows = [{"nats_per_pixel": nats, "steps": 1, "probe_accuracy": 0.5, "probe_interval": (0.4, 0.6)}
            for nats in (2.0, bad)]
    figures.accuracy_over_loss(storage.path(tmp_path / "accuracy.png"), {"a": rows, "b": rows[1:]}, 10)
    figures.loss_by_position(storage.path(tmp_path / "means.png"), np.float64([[1, 2], [3, bad or np.nan]]),
                           {"0": 2.0, "1": bad or np.nan})
    figures.loss_maps(storage.path(tmp_path / "maps.png"), np.zeros((1, 2, 2, 3), np.uint8),
                          np.float32([[[1, 2], [3, bad or np.nan]]]))
    assert len(list(tmp_path.glob("*.png"))) == 4, capsys.readouterr().err
