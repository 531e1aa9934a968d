"""Charts: data, labels and order of curves. Figures: names and user settings that Matplotlib trips over; images."""

import html.parser
import itertools
import math
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from igpt_jax import storage
from igpt_jax.metrics import charts, figures
from igpt_jax.metrics.charts import Chart, Series

NASTY = ("cost$%$", "a_$b", "_hidden", "$\\frac{$", "猫の写真", "caf\udce9", "tab\there", "long" * 60, "", r"a\$b^{",
         "</svg><script>")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves as PNG, in order."""
    figures_drawn, save = [], figures._save

    def record(path, figure):
        save(path, figure)
        figures_drawn.append(figure)

    monkeypatch.setattr(figures, "_save", record)
    return figures_drawn


def legend(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def two_runs(*names):
    return charts.over_steps({name: [(1, 3.0), (2, 2.5)] for name in names})


# Charts: what is drawn.

def test_loss_and_accuracy_of_a_run():
    """Each over its own steps, null values left out, ln V, per cent, the last step named. Seen to fail with the two
    metrics swapped, with the first loss in the label, with log2, and with shares instead of per cent."""
    lines = [{"step": step, "train/nats_per_pixel": 3 / step} for step in (1, 2, 4)] + [
        {"step": 4, "eval/nats_per_pixel": 1.0}, {"step": 5, "train/nats_per_pixel": None}]
    (loss,) = charts.training(lines, 1000, vocabulary=17)
    assert [series.points for series in loss.series] == [[(1, 3), (2, 1.5), (4, 0.75)], [(4, 1)]]
    assert [series.label for series in loss.series] == ["train: 0.750 at step 4", "held-out: 1.000 at step 4"]
    assert loss.levels == {"guessing: ln 17 = 2.833": math.log(17)} and (loss.x, loss.y) == ("step", "nats per pixel")
    loss, accuracy = charts.training([*lines, {"step": 1200, "eval/accuracy": 0.875}], 1200, vocabulary=17)
    assert accuracy.series[0].label == "held-out: 87.5 at step 1,200" and accuracy.series[0].points == [(1200, 87.5)]
    assert not loss.levels


@pytest.mark.parametrize("losses, steps, said", [
    ((3, 2.5, 2.2, 2.0, 1.9, 1.8), 50, "undertrained: loss is still falling (5.3 % in the last fifth)"),
    ((3, 2.5, 2.2, 2.0, 1.9, 1.89), 50, ""),  # less than 1 %
    ((3, 2.5, 2.0, 1.7, 1.9, 1.8), 50, ""),  # has been better
    ((3, 2.5, 2.2, 2.0, 1.9, 1.8), 60, ""),  # has not ended
    ((3,), 0, ""), ((), 0, ""),
])
def test_an_undertrained_run_is_called_so(losses, steps, said):
    """Seen to fail with each condition of the rule left out, and with the fall from the first loss."""
    assert charts.trend([(10 * index, loss) for index, loss in enumerate(losses)], steps) == said


def test_accuracy_by_layer():
    """Per cent over layers with intervals; baselines; one hue per run, a shade per checkpoint. Seen to fail with shares
    instead of per cent, with rows numbered instead of their layers, and with a hue per checkpoint."""
    rows = [{"layer": layer, "test_accuracy": accuracy, "interval": (accuracy - 0.125, accuracy + 0.0625)}
            for layer, accuracy in ((0, 0.25), (2, 0.75), (3, 0.5))]
    curves = [(run, f"{run}, step {step}", rows) for run in "ab" for step in (1, 2)] + [("c", "c", rows[:1])]
    chart = charts.accuracy_by_layer(curves, {"pixels": 0.3, "random": 0.125, "untrained": 0.25}, 1234)
    assert chart.series[0].points == [(0, 25), (2, 75), (3, 50)]
    assert chart.series[0].spread == [(12.5, 31.25), (62.5, 81.25), (37.5, 56.25)]
    assert [(series.label, series.hue, series.shade) for series in chart.series] == [
        ("a, step 1", 0, 0.5), ("a, step 2", 0, 1), ("b, step 1", 1, 0.5), ("b, step 2", 1, 1), ("c", 2, 1)]
    assert chart.levels == {"pixels: 30.0 %": 30, "random: 12.5 %": 12.5, "untrained: 25.0 %": 25}
    assert (chart.x, chart.y) == ("layer (0: the embedding)", "accuracy on 1,234 test images, %")


def test_accuracy_over_loss():
    """Each run's points in their order, the loss falling to the right, steps at the points. Seen to fail with the axis
    not inverted, and with points sorted by accuracy."""
    rows = [{"nats_per_pixel": nats, "steps": steps, "probe_accuracy": accuracy,
             "probe_interval": (accuracy - 0.125, accuracy + 0.125)}
            for nats, steps, accuracy in ((3.0, 500, 0.5), (math.nan, 700, 0.5), (2.5, 1000, 0.75), (2, 1500, 0.625))]
    chart = charts.accuracy_over_loss({"small": rows, "large": rows[2:]}, 10)
    small, large = chart.series
    assert small.points == [(3, 50), (2.5, 75), (2, 62.5)] and large.points == [(2.5, 75), (2, 62.5)]
    assert (small.label, large.label) == ("small", "large") and chart.falling
    assert small.notes == ["500", "1,000", "1,500"] and small.spread[1] == (62.5, 87.5)


def test_scaling():
    """Seconds left, GiB right, each with the compiled point; a device's memory on the right alone. Seen to fail with
    seconds in both panels, with bytes for GiB, and with the memory's line in both."""
    seconds, memory = charts.scaling([(8, 4.0, 2**33), (1024, 0.5, 2**31)], (16, 2.5, 3 * 2**30), 2**34)
    assert [series.points for series in seconds.series] == [[(8, 4), (1024, 0.5)], [(16, 2.5)]]
    assert [series.points for series in memory.series] == [[(8, 8), (1024, 2)], [(16, 3)]]
    assert memory.levels == {"a device's memory": 16} and not seconds.levels
    assert (seconds.y, memory.y) == ("seconds per step", "GiB per device")


def test_more_runs_than_colors_are_thinned_out():
    """Evenly, first and last kept, in their order, and a note says so. Seen to fail with the first ten drawn."""
    chart = charts.over_steps({f"run {index}": [(1, 3.0), (2, float(index))] for index in range(19)})
    assert [series.label for series in chart.series] == [f"run {index}: {index}.000 at step 2"
                                                         for index in range(0, 19, 2)]
    assert chart.note == "10 of 19 runs" and len({series.hue for series in chart.series}) == 10


# Figures: how it is drawn.

def test_a_chart_is_drawn_as_it_says(tmp_path, drawn):
    """Points, intervals, levels, axes and labels, in panels side by side. Seen to fail with the ends of the intervals
    swapped, with one color for all, and with a legend for all panels."""
    chart = Chart("a", "x", "y", [Series("one", [(1, 3), (2, 2)], [(2, 5), (1, 4)]), Series("two", [(1, 1)], hue=1,
                  shade=0)], {"level": 1.5}, "a note", falling=True)
    figures.save(storage.path(tmp_path / "figures" / "a.png"), chart, two_runs("b"), title="both")
    axes, other = drawn[0].axes
    one, two = axes.containers
    assert list(one.lines[0].get_xdata()) == [1, 2] and list(one.lines[0].get_ydata()) == [3, 2]
    np.testing.assert_allclose([each[:, 1] for each in one.lines[2][0].get_segments()], [(2, 5), (1, 4)])
    assert two.lines[0].get_color() == figures.HUES[1] and two.lines[0].get_alpha() == 0.25
    assert [legend(panel) for panel in drawn[0].subfigs] == [["level", "one", "two"], ["b: 2.500 at step 2"]]
    assert axes.xaxis_inverted() and not other.xaxis_inverted() and axes.get_title() == "a note"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y") and drawn[0].get_suptitle() == "both"
    with Image.open(tmp_path / "figures" / "a.png") as image:
        assert image.width > 1000


def test_a_lone_dot_is_no_figure(tmp_path):
    """Seen to fail with every chart drawn."""
    lone = charts.over_steps({"a": [(300, 1.5)], "b": []})
    figures.save(storage.path(tmp_path / "lone.png"), lone)
    assert figures.svg(lone) is None and not list(tmp_path.iterdir())
    figures.save(storage.path(tmp_path / "two.png"), charts.over_steps({"a": [(300, 1.5)], "b": [(200, 1.6)]}), lone)
    assert [file.name for file in tmp_path.iterdir()] == ["two.png"]


class Texts(html.parser.HTMLParser):
    """The texts and tags of an SVG."""

    def __init__(self, svg):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(svg)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_an_svg_shows_values_under_the_pointer():
    """Of all curves at one x, with their intervals; hidden until then. Strips cover the axes without overlaps, and each
    holds its own points. Seen to fail with values of several x in one box, and with y not flipped."""
    chart = Chart("loss", "step (of two runs)", "nats", [
        Series("train: 1.5 at step 3", [(step, 3 / step) for step in range(1, 4)]),
        Series("held-out", [(2, 1.75)], [(1.5, 2)], hue=1), Series("too near to be told apart", [(2.01, 1.5)], hue=2)])
    svg = figures.svg(chart)
    strips = svg.split('<g class="strip">')[1:]
    assert [re.findall(r"<text [^>]*>(.*?)</text>", strip) for strip in strips] == [
        ["step 1", "train 3"], ["step 2", "train 1.5", "held-out 1.75 (1.5 to 2)"], ["step 3", "train 1"]]
    assert ".strip>g{visibility:hidden}" in svg
    areas = [re.search(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', strip).groups() for strip in strips]
    for (left, width), (following, _) in itertools.pairwise(areas):
        assert abs(float(left) + float(width) - float(following)) < 0.2
    down = [float(re.search(r'cy="([\d.]+)"', strip)[1]) for strip in strips]
    assert down == sorted(down) and down[0] > 5, "a falling loss goes down"
    assert "currentColor" in svg and figures.TEXT not in svg


@pytest.mark.parametrize("name", NASTY)
def test_any_name_is_drawn(tmp_path, name, capfd):
    """Its line is in the legend, stderr stays empty, and the SVG has no tag more. Seen to fail with names given to
    Matplotlib as they are, and to the SVG."""
    with warnings.catch_warnings(action="error"):
        figures.save(storage.path(tmp_path / "loss.png"), two_runs(name))
        svg = figures.svg(two_runs(name))
    assert capfd.readouterr().err == ""
    picture = np.asarray(Image.open(tmp_path / "loss.png"))
    bottom = picture[-picture.shape[0] // 8:, :, :3]
    assert (np.ptp(bottom.astype(int), axis=2) > 60).any(), "no colored line in the legend"
    assert sorted(set(Texts(svg).tags)) == sorted(set(Texts(figures.svg(two_runs("plain"))).tags))


@pytest.mark.parametrize("setting", ["text.usetex", "svg.fonttype", "font.size", "axes.prop_cycle"])
def test_a_users_matplotlibrc_changes_no_figure(tmp_path, setting):
    """Seen to fail with text.usetex, which needs LaTeX, and with another font size."""
    import matplotlib

    def draw():
        figures.save(storage.path(tmp_path / "loss.png"), two_runs("a"))
        return (tmp_path / "loss.png").read_bytes(), figures.svg(two_runs("a"))

    plain = draw()
    values = {"text.usetex": True, "svg.fonttype": "path", "font.size": 3, "axes.prop_cycle": "cycler('color', ['k'])"}
    with matplotlib.rc_context({setting: values[setting]}):
        assert draw() == plain
        assert matplotlib.rcParams["text.usetex"] is (setting == "text.usetex")


def test_a_notebooks_backend_changes_nothing(tmp_path, python):
    """Seen to fail with a plain import of Matplotlib, which refuses a backend that is not installed."""
    done = python("figure_with_backend.py", tmp_path / "loss.png", devices=1,
                  env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert (tmp_path / "loss.png").stat().st_size > 5000 and done.stderr == ""


def test_a_figure_that_cannot_be_drawn_or_written_costs_one_line(tmp_path, capsys):
    """Seen to fail without the decorator `drawn`."""
    (tmp_path / "figures").write_text("a file, where a folder is needed")
    figures.save(storage.path(tmp_path / "figures" / "loss.png"), two_runs("a"))
    assert figures.svg(Chart("much", "x", "y", [Series("", [("a", 1), (None, 2)])])) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("cannot be drawn: " in line for line in lines), lines
    assert "'loss.png'" in lines[0] and "'much'" in lines[1]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_figures_omit_values_that_are_not_finite(tmp_path, bad, capsys):
    """Seen to fail with None, which tables hold for NaN."""
    figures.save(storage.path(tmp_path / "loss.png"), charts.over_steps({"a": [(1, 3.0), (2, bad), (3, 2.0)],
                                                                         "none": [(1, bad)]}))
    figures.loss_by_position(storage.path(tmp_path / "means.png"), np.float64([[1, 2], [3, bad or np.nan]]),
                             {"0": 2.0, "1": bad or np.nan})
    figures.loss_maps(storage.path(tmp_path / "maps.png"), np.zeros((1, 2, 2, 3), np.uint8),
                      np.float32([[[[1], [2]], [[3], [bad or np.nan]]]]))
    assert len(list(tmp_path.glob("*.png"))) == 3, capsys.readouterr().err


# Images.

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


def test_headings_are_over_their_columns():
    """The last one is centered over the rest. Seen to fail with all headings over the first column."""
    images = np.full((4, 16, 16, 3), 255, np.uint8)
    plain, headed = (np.asarray(figures.image_grid(images, 4, 6, 4, names)) for names in ((), ("a", "b", "c")))
    np.testing.assert_array_equal(headed[-len(plain):], plain)
    across = np.flatnonzero((headed < 128).any(axis=(0, 2)))
    groups = np.split(across, np.flatnonzero(np.diff(across) > 20) + 1)
    np.testing.assert_allclose([group.mean() for group in groups], [48, 148, 298], atol=3)


def test_loss_maps_name_their_classes(tmp_path, drawn):
    """A class and its mean loss over each picture. Seen to fail with names and losses in another order."""
    nats_NYXC = np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((2, 2, 1), np.float32)
    figures.loss_maps(storage.path(tmp_path / "maps.png"), np.zeros((5, 2, 2, 3), np.uint8), nats_NYXC, list("abcde"))
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_title()]
    assert titles == ["a, 0.00", "b, 1.00", "c, 2.00", "d, 3.00", "e, 4.00"]
