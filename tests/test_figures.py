"""Curves and pictures."""

import math
import warnings

import numpy as np
import pytest
from PIL import Image

from igpt_jax import storage
from igpt_jax.metrics import figures
from igpt_jax.report import charts

NASTY = ("cost$%$", "a_$b", "_hidden", "$\\frac{$", "猫の写真", "caf\udce9", "tab\there", "long" * 60, "", r"a\$b^{")


def test_figures(tmp_path):
    """Seen to fail with rows of images that overlap the gap."""
    metrics = [{"step": step, "train/nats_per_pixel": 3 / step} for step in (1, 2, 4)] + [
        {"step": 4, "eval/nats_per_pixel": 1.0}, {"step": 5, "train/nats_per_pixel": None}]
    figures.loss_curve(storage.path(tmp_path / "figures" / "loss.png"), metrics, palette_size=17)
    with Image.open(tmp_path / "figures" / "loss.png") as image:
        assert image.width > 800

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
    """With its line in the legend, and nothing is said. Seen to fail with names given to Matplotlib as they are."""
    with warnings.catch_warnings(action="error"):
        picture = loss_of_runs(tmp_path / "loss.png", [name])
    assert capfd.readouterr().err == ""
    legend = picture[-picture.shape[0] // 8:, :, :3]
    assert (np.ptp(legend.astype(int), axis=2) > 60).any(), "no colored line in the legend"
    assert charts.lines([charts.Series(name, [1, 2], [3, 2]), charts.Series("b", [1, 2], [3, 2])], "x", "y")


@pytest.mark.parametrize("setting", ["text.usetex", "svg.fonttype", "font.size", "axes.prop_cycle"])
def test_a_picture_is_the_same_whatever_the_user_has_set(tmp_path, setting):
    """As a matplotlibrc does. Seen to fail with text.usetex, for want of LaTeX, and with another font size."""
    import matplotlib

    plain, chart = loss_of_runs(tmp_path / "loss.png", ["a"]), charts.split_bar({"a": 1.0}, "x")
    values = {"text.usetex": True, "svg.fonttype": "path", "font.size": 3, "axes.prop_cycle": "cycler('color', ['k'])"}
    with matplotlib.rc_context({setting: values[setting]}):
        np.testing.assert_array_equal(loss_of_runs(tmp_path / "loss.png", ["a"]), plain)
        assert charts.split_bar({"a": 1.0}, "x") == chart
        assert matplotlib.rcParams["text.usetex"] is (setting == "text.usetex")


def test_a_notebooks_backend_changes_nothing(tmp_path, python):
    """Seen to fail with a plain import of Matplotlib, which refuses a backend that is not installed."""
    done = python(f"""
import os
from igpt_jax import storage
from igpt_jax.metrics import figures
figures.loss_over_steps(storage.path({str(tmp_path)!r}) / "loss.png", {{"a": [(1, 3.0)]}})
assert os.environ["MPLBACKEND"].startswith("module")
""", devices=1, env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert (tmp_path / "loss.png").stat().st_size > 5000 and done.stderr == ""


def test_what_cannot_be_drawn_or_written_costs_a_line(tmp_path, capsys):
    """Seen to fail without `drawn`."""
    (tmp_path / "figures").write_text("a file, where a folder is needed")
    figures.loss_over_steps(storage.path(tmp_path / "figures" / "loss.png"), {"a": [(1, 3.0)]})
    assert charts.split_bar({"a": "much"}, "x") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("cannot be drawn: " in line for line in lines), lines


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_figures_leave_out_what_is_not_finite(tmp_path, bad, capsys):
    """In more runs than there are colors. Seen to fail with None, which a table holds for NaN."""
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
