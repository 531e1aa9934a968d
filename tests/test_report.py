"""The report page: what workdirs hold appears on it, whole or not, and nothing on it runs or is fetched."""

import base64
import html.parser
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, patience
from PIL import Image

from igpt_jax import config, report
from igpt_jax.config import ReportConfig, UserError
from igpt_jax.data import palette
from igpt_jax.jobs import report as job
from igpt_jax.report import comparison, page, paper, pictures, runs
from igpt_jax.runtime.job import run_job

NASTY = "<script>alert('x')</script>&$a_b$"
SIZES = {"igpt_s": (24, 512, 8, 2048), "igpt_m": (36, 1024, 8, 4096)}
GRAYS_VC = np.repeat(np.linspace(-1, 1, 5, dtype=np.float32)[:, None], 3, axis=1)


def workdir(folder, name, metrics=None, **settings):
    """A workdir of a job, done if it has metrics; settings are dotted names with __ for the dot."""
    (folder / "figures").mkdir(parents=True)
    written = config.to_dict(config.parse(name, config.base_config(name)))
    for key, value in settings.items():
        *path, last = key.split("__")
        group = written
        for part in path:
            group = group[part]
        group[last] = value
    (folder / "config.json").write_text(json.dumps(written))
    if metrics is not None:
        (folder / "result.json").write_text(json.dumps({"job": name, "status": "done", "metrics": metrics}))
    return folder


def write_lines(folder, losses):
    lines = [{"step": step, "time": step, "train/nats_per_pixel": loss + 0.01, "eval/nats_per_pixel": loss,
              "seconds/step": 2.0, "train/gradient_norm": None} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "ti')


@pytest.fixture
def workdirs(tmp_path):
    """A pretraining with a nasty name, a probe, one that has only just begun, and a sweep of two in a folder."""
    folder = tmp_path / "runs"
    trained = workdir(folder / NASTY.replace("/", "-"), "pretrain", {
        "parameters": 1000, "steps": 5, "note": NASTY, "eval/nats_per_pixel": 2.987654321}, seed=77, steps=5,
        data__store="elsewhere")
    write_lines(trained, (3.2, 3.1, 3.05, 3, 2.9))
    Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(trained / "figures" / "samples.png")
    rows = [{"features": f"layer {layer}", "layer": layer, "test_accuracy": accuracy, "interval": [accuracy - 0.02,
             accuracy + 0.01]} for layer, accuracy in enumerate((0.3, 0.45, 0.4))]
    probed = workdir(folder / "probe", "probe", {
        "accuracy_by_layer": {row["layer"]: row["test_accuracy"] for row in rows}, "test_accuracy": 0.45,
        "best_layer": 1, "raw_pixel_accuracy": 0.39, "untrained_accuracy": 0.47})
    (probed / "probe.json").write_text(json.dumps([
        *rows, {"features": NASTY, "test_accuracy": 0.39},
        {"features": "untrained model, layer 1", "layer": 1, "test_accuracy": 0.47, "interval": [0.45, 0.49]}]))
    begun = workdir(folder / "begun", "pretrain", data__store="other")
    (begun / "result.json").write_text('{"job": "pre')
    for rate, loss in ((0.01, 2.6), (0.001, 2.5)):
        one = workdir(folder / "sweep" / f"lr-{rate}", "pretrain", {"eval/nats_per_pixel": loss, "steps": 3},
                      optimizer__learning_rate=rate, log_every_steps=int(1000 * rate), data__store="store")
        write_lines(one, (3, 2.8, loss))
    rows = [{"learning_rate": rate, "eval/nats_per_pixel": loss}
            for rate, loss in ((0.01, 2.6), (0.001, 2.5), (1, None))]
    (folder / "sweep" / "sweep.json").write_text(json.dumps({"verdict": "Best: learning rate 0.001.", "rows": rows}))
    return folder


def sampled(folder, step, color, **settings):
    """A sample job: two 4x4 pictures of color 0, completed with `color`."""
    one = workdir(folder / f"sample-{step}", "sample", {"samples": 3}, checkpoint=f"runs/a/checkpoints/{step}",
                  **settings)
    file = io.BytesIO()
    np.savez(file, palette=GRAYS_VC, samples=np.full((3, 16), color), originals=np.zeros((2, 16), int),
             names=np.array(["test 0", "test 1"]), completions=np.full((2, 4, 16), color))
    (one / "samples.npz").write_bytes(file.getvalue())


class Page(html.parser.HTMLParser):
    """The tags, addresses and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_of_what_there_is(workdirs, tmp_path):
    """Every number shown is one from the files; names are text, not markup; no address leads out of the page.

    Seen to fail with autoescape off, and with the accuracies of the first and best layer exchanged.
    """
    done = job.run(ReportConfig(workdirs=f"{workdirs}/*"), str(tmp_path / "report"))
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert done == {"workdirs": 5, "bytes": len(text.encode())}
    assert not {"script", "iframe", "object", "link"} & set(page.tags)
    assert page.tags.count("section") == 1 + 1 + 5 + 1  # card, sweep, runs, paper
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    words = " ".join(page.text)
    assert NASTY in words and "2.9877" in words and "not ended" in words and "77" in words
    assert "rises and then falls, as the paper's does: +15.0 points from layer 0 to layer 1, -5.0 points" in words
    assert "beats raw pixels, 39.0 %" in words and "does not beat the untrained model, 47.0 %" in words
    assert "It saw 640 images" in words and "undertrained: loss is still falling (3.3 % in the last fifth)" in words
    charts = {file.name for file in (tmp_path / "report" / "figures").iterdir()}
    assert charts == {"compared-1-held-out-loss-over-learning-rate.svg", "compared-1-held-out-loss.svg",
                      "01-pretrain-loss.svg", "03-pretrain-loss.svg", "04-pretrain-loss.svg",
                      "05-probe-accuracy-by-layer.svg"}


def test_it_opens_with_results(workdirs, tmp_path):
    """Before any link or section of a run; each probe row is there once. Seen to fail with the highest loss, and with
    accuracy_by_layer among the results too."""
    job.run(ReportConfig(workdirs=f"{workdirs}/*"), str(tmp_path / "report"))
    text = (tmp_path / "report" / "report.html").read_text()
    card = " ".join(Page(text[text.index("<body>"):text.index("<nav>")]).text)
    assert "2.500" in card and "sweep/lr-0.001, step 3" in card and "45.0 %" in card and "layer 1" in card
    probe = text[text.index('id="run5"'):]
    assert probe.count("43.0 % to 46.0 %") == 1 and probe.count("<td>45.0 %</td>") == 1
    assert "<dt>accuracy by layer" not in probe and ">probe: probe<" not in text and "Figures" not in text


def test_runs_are_compared(workdirs):
    """Those of one job, objective, data and sweep: labels and columns by what differs; keys that a resumed run may
    change are no labels, nor are sizes that follow from the model's name. Seen to fail with all runs in one group, with
    labels of all differing keys, and with sizes that are taken for given."""
    (workdirs / "sweep" / "sweep.json").unlink()
    (one,) = comparison.comparisons(runs.load(f"{workdirs}/*"))
    assert [run.title for run, *_ in one.rows] == ["sweep/lr-0.001", "sweep/lr-0.01"]
    assert set(one.keys) == {"log_every_steps", "optimizer.learning_rate"}
    assert [series.label for series in one.charts[0].series] == [
        "learning_rate=0.001: 2.500 at step 3", "learning_rate=0.01: 2.600 at step 3"]
    assert one.results == ["steps", "eval/nats_per_pixel"] and [row[2] for row in one.rows] == [[3, 2.5], [3, 2.6]]
    for name, model in (("small", "igpt_s"), ("medium", "igpt_m")):
        workdir(workdirs / "sizes" / name, "pretrain", model__name=model, **dict(zip(
            ("model__layers", "model__embed", "model__heads", "model__mlp"), SIZES[model], strict=True)))
    sizes = runs.load(f"{workdirs}/sizes/*")
    assert comparison.legend(sizes, list(comparison.differing(sizes))) == ["model=igpt_m", "model=igpt_s"]
    same = [run for run, *_ in one.rows[:1]] * 2
    assert comparison.legend(same, list(comparison.differing(same))) == ["sweep/lr-0.001"] * 2


def test_runs_without_a_store_are_on_that_of_their_checkpoint(tmp_path):
    """Or on one of their own, if that is unknown. Seen to fail with all of them compared, and with none."""
    trained, store = str(ROOT / "tests" / "data" / "pretrain_format2"), {"data__store": "store"}
    for name, settings in {"a": {"checkpoint": trained}, "b": store, "c": store | {"data__test": "held_out"},
                           "d": {"checkpoint": "moved"}, "e": {"checkpoint": "another"}}.items():
        workdir(tmp_path / name, "probe", {"test_accuracy": 0.5}, **settings)
    for name in "fg":
        workdir(tmp_path / name, "pretrain", {"eval/nats_per_pixel": 2})
    (one,) = comparison.comparisons(runs.load(f"{tmp_path}/*"))
    assert [run.title for run, *_ in one.rows] == ["a", "b"]


def test_the_best_run_is_chosen_by_held_out_accuracy(tmp_path):
    """Of each data set; its test accuracy is shown. Seen to fail with the best test accuracy, and with all data sets
    as one."""
    for name, store, held_out, test in (("a", "x", 0.5, 0.6), ("b", "x", 0.55, 0.52), ("c", "y", 0.9, 0.91)):
        probed = workdir(tmp_path / f"probe-{name}", "probe", {"best_layer": 2, "test_accuracy": test},
                         data__store=store)
        (probed / "probe.json").write_text(json.dumps([
            {"features": f"layer {layer}", "layer": layer, "held_out_accuracy": accuracy, "test_accuracy": test,
             "interval": [0, 1]} for layer, accuracy in ((1, 1 - held_out), (2, held_out))]))
        tuned = workdir(tmp_path / f"tuned-{name}", "finetune", {"best_step": 3, "test_accuracy": test + 0.01},
                        data__store=store)
        (tuned / "metrics.jsonl").write_text("".join(
            json.dumps({"step": step, "time": step, "eval/accuracy": accuracy}) + "\n"
            for step, accuracy in ((3, held_out), (6, 0.1))))
    found = runs.load(f"{tmp_path}/*")
    assert [tile.name for tile in page._probe(found)] == ["Linear probe, x", "Linear probe, y"]
    tiles = [(tile.value, tile.sentence) for make in (page._probe, page._finetuned) for tile in make(found)]
    assert tiles == [("52.0 %", "test accuracy of layer 2: probe-b"), ("91.0 %", "test accuracy of layer 2: probe-c"),
                     ("53.0 %", "test accuracy: tuned-b, step 3"), ("92.0 %", "test accuracy: tuned-c, step 3")]
    (said,) = paper.finetuning(next(run for run in found if run.title == "tuned-a"), found)
    assert "9.0 points above the best probe, probe-b" in said


def test_a_sweep_is_a_comparison(workdirs):
    """Its verdict, and the loss over the rates, in order. Seen to fail with the rows in the file's order."""
    (one,) = comparison.comparisons(runs.load(str(workdirs)))
    assert one.sentence == "Best: learning rate 0.001." and one.title == "Learning-rate sweep in sweep/"
    assert one.charts[0].series[0].points == [(0.001, 2.5), (0.01, 2.6)] and one.charts[0].log_x == 10


def test_pictures_over_training(tmp_path):
    """A strip per step in order, eight at most, under the original and the given pictures; other settings are other
    strips. Seen to fail with steps in the order of names, and with the lower half given."""
    for step, color in ((1000, 4), *((step, 3) for step in range(210, 290, 10)), (200, 2)):
        sampled(tmp_path, step, color)
    sampled(tmp_path, 300, 3, temperature=0.5)
    completions, samples, *others = pictures.strips(runs.load(f"{tmp_path}/*"))
    labels = [row.label for row in completions.rows]
    assert labels[:4] == ["original", "given", "step 200", "step 210"] and labels[-1] == "step 1,000"
    assert [row.label for row in samples.rows] == labels[2:] and len(samples.rows) == 8  # of 10 steps
    assert [each.steps for each in (completions, samples, *others)] == [8, 8, 1, 1]

    def pixels(row):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(row.url.partition(",")[2]))))

    original, given, first, last = map(pixels, (*completions.rows[:3], completions.rows[-1]))
    assert original.shape == (64, 2 * 64 + 6, 4) == given.shape and (original[:, 64:70, 3] == 0).all()
    original, given, first, last = (strip[:, :64, :3] for strip in (original, given, first, last))
    assert (original == 0).all() and (given[:32] == 0).all() and (given[32:] == 127).all()
    for strip, color in ((first, 2), (last, 4)):
        assert (strip == palette.decode(np.array(color), GRAYS_VC)).all()
    assert [row.label for row in pictures.newest_completions([completions])] == ["original", "given", "completed"]


def test_workdirs_are_found_below_folders_and_reports_are_not(workdirs):
    """Twice, with the report in the same folder, its path written in another way, and another report beside it. Seen to
    fail where only the same path is left out, and without a look into folders that are no workdirs."""
    workdir(workdirs / "old", "report", {"workdirs": 1})
    (workdirs / "notes.txt").write_text("a file")
    for _ in range(2):
        assert run_job(job.run, ReportConfig(workdirs=f"{workdirs}/*"), f"{workdirs}/../runs/report") == 0
        assert json.loads((workdirs / "report" / "result.json").read_text())["metrics"]["workdirs"] == 5
    assert sorted(run.title for run in runs.load(f"{workdirs}/*,{workdirs}/sweep/*"))[-2:] == [
        "sweep/lr-0.001", "sweep/lr-0.01"]
    assert [run.title for run in runs.load(f"{workdirs}/probe")] == ["probe"]


@pytest.mark.parametrize("last, best, said", [
    (0.30, 1, "rises and then falls"), (0.46, 2, "rises to the last layer"), (0.29, 0, "does not rise"),
    (0.44, 1, "its fall lies within the 95 % intervals"),
    (0.46, 1, "rises to the last layer; the paper's falls after the middle: +15.0 points")])
def test_a_fall_is_claimed_where_the_intervals_part(workdirs, last, best, said):
    """Seen to fail with the intervals left out, with the untrained model's row among the layers, and with the layer of
    the best test accuracy."""
    probe = next(run for run in runs.load(f"{workdirs}/*") if run.job == "probe")
    assert [row["layer"] for row in probe.by_layer] == [0, 1, 2]
    probe.metrics["accuracy_by_layer"]["2"], probe.metrics["best_layer"] = last, best
    probe.tables["probe.json"][2]["interval"] = [last - 0.02, last + 0.01]
    assert said in paper.probing(probe)[0]


@pytest.mark.parametrize("typed", ["", "nowhere", "{}/*/figures"])
def test_nothing_to_report_is_said_in_one_line(workdirs, typed, tmp_path):
    with pytest.raises(UserError, match="workdirs|matches nothing") as error:
        job.run(ReportConfig(workdirs=typed.format(workdirs)), str(tmp_path / "report"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [
    ("result.json", '{"metrics": 5, "device": "x", "versions": [1]}'), ("figures/a.png", ""),
    ("result.json", '{"metrics": {"accuracy_by_layer": {"1": null, "x": 2}, "parameters": "many", "steps": 1,'
                    ' "eval/nats_per_pixel": "x", "test_accuracy": [1]}}'),
    ("probe.json", '[{"features": "layer 0", "layer": 0, "test_accuracy": null, "interval": [null, null]},'
                   ' {"features": "layer 1", "layer": 1, "test_accuracy": 0.5, "interval": 5}]'),
    ("evaluation.json", '[{"steps": 1, "nats_per_pixel": 2}]'), ("samples.npz", "PK"), ("result.json", "[" * 10**5),
    ("metrics.jsonl", '5\n{"step": 1, "seconds/step": "a"}\n'), ("../sweep.json", '{"rows": 5, "verdict": [1]}'),
    ("config.json", '{"job": "probe", "batch_size": null}'), ("config.json", '{"job": "sample", "rows": "x"}'),
])
def test_a_damaged_file_costs_its_part_of_the_page(workdirs, tmp_path, name, content):
    """In every workdir. Seen to fail with each part made as if the file were whole."""
    found = list(workdirs.glob("**/config.json"))
    for folder in (file.parent for file in found):
        (folder / name).write_text(content)
    assert job.run(ReportConfig(workdirs=f"{workdirs}/*"), str(tmp_path / "report"))["workdirs"] == len(found) == 5
    assert Page((tmp_path / "report" / "report.html").read_text()).tags.count("section") >= 6


def test_values_are_shown_as_people_read_them():
    """Seen to fail with .4g for all, with shares as they are, and with a distance's interval in per cent."""
    assert [report.shown(value) for value in (None, 12345678, 0.25, 3.05630001, 25220.65, 1e-7, [1, 2.5], "a", True)] \
        == ["–", "12,345,678", "0.25", "3.0563", "25,221", "1e-07", "1, 2.5", "a", "True"]
    assert report.shown(0.77778, "test_accuracy") == "77.8 %" and report.shown(0.25, "learning_rate") == "0.25"
    assert report.shown([0.5, 0.625], "interval") == "50.0 % to 62.5 %"
    assert report.shown([0.5, 0.625], "random_conv_frechet_interval") == "0.5 to 0.625"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium makes no window narrower than 500
def test_a_browser_shows_it_without_a_complaint(workdirs, tmp_path, width):
    """In Chromium, no name resolves; its console stays empty and the page is not blank, as wide as the window.

    Seen to fail with a <script> in page.html, which the page's own policy refuses.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium: apt-get install chromium")
    job.run(ReportConfig(workdirs=f"{workdirs}/*"), str(tmp_path / "report"))
    picture = tmp_path / "page.png"
    done = subprocess.run([browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                           "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
                           f"--user-data-dir={tmp_path}/profile", f"--window-size={width},3000",
                           f"--screenshot={picture}", (tmp_path / "report" / "report.html").as_uri()],
                          capture_output=True, text=True, timeout=patience())
    assert "CONSOLE" not in done.stderr, done.stderr
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape == (3000, width) and len(np.unique(pixels)) > 20
