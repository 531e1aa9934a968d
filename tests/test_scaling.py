"""Scaling studies: the fit of the law, the best size for a budget, the plan of runs, and the job."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import run_all, run_job_command

from igpt_jax import storage
from igpt_jax.config import ModelConfig, OptimizerConfig, PretrainConfig, ScalingConfig, UserError
from igpt_jax.data import palette
from igpt_jax.data.store import Store
from igpt_jax.jobs import scaling
from igpt_jax.model.dims import Dims
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.scaling import analysis, charts, frontier, law, study
from igpt_jax.storage import slices

DATA = pathlib.Path(__file__).parent / "data"
TRUE = law.Law(E=1.69, a=406.4, alpha=0.34, b=410.7, beta=0.28, N0=1.0, D0=1.0)  # Hoffmann et al., Approach 3


def runs(budgets=4, sizes=5, span=0.6):
    """N and D of a study at equal FLOPs, C = 6 N D, around 20 tokens per parameter."""
    C = np.geomspace(1e18, 1e21, budgets)
    N = np.concatenate([np.sqrt(each / 120) * np.logspace(-span, span, sizes) for each in C])
    return N, np.repeat(C, sizes) / 6 / N


def rows_of(N, D, loss):
    """Rows of a study's table."""
    return [{"run": "", "budget": 6 * n * d, "flops": 6 * n * d, "tokens": d, "short": False,
             "nats_per_pixel": loss(n, d),
             **{f"parameters_{name}": n for name in study.COUNTS}} for n, d in zip(N, D, strict=True)]


def coverage(draws, refits):
    """How many intervals of alpha and beta hold the true value, with 1 % noise."""
    N, D = runs()
    rng, hits = np.random.default_rng(0), np.zeros(2, int)
    for _ in range(draws):
        loss = TRUE.loss(N, D) * np.exp(0.01 * rng.normal(size=len(N)))
        found = law.fit(N, D, loss)
        laws = law.bootstrap(found, N, D, loss, refits=refits)
        for i, name in enumerate(("alpha", "beta")):
            low, high = law.interval(getattr(laws, name), len(N))
            hits[i] += low <= getattr(TRUE, name) <= high
    return hits


def test_a_law_without_noise_is_found():
    """Fails if a term's exponent or the reference sizes are mixed up."""
    N, D = runs()
    found = law.fit(N, D, TRUE.loss(N, D))
    assert [float(found.E), float(found.alpha), float(found.beta)] == pytest.approx([1.69, 0.34, 0.28], rel=1e-3)
    assert found.loss(N * 10, D * 10) == pytest.approx(TRUE.loss(N * 10, D * 10), rel=1e-4)


def test_the_fit_of_published_runs_is_the_published_one(monkeypatch):
    """Besiroglu et al. (arXiv 2404.10102) refit Hoffmann et al.'s Approach 3 to 240 points of its Figure 4. Their Huber
    loss has delta 0.001. Their standard errors are 0.03 for E, 0.02 for the exponents; ours must be within a third."""
    N, C, loss = np.loadtxt(DATA / "hoffmann_figure4.csv", delimiter=",", skiprows=1).T
    N, D, loss = (values[np.argsort(loss)[:-5]] for values in (N, C / 6 / N, loss))  # as they did
    monkeypatch.setattr(law, "HUBER", 1e-3)
    found = law.fit(N, D, loss)
    assert found.E == pytest.approx(1.8172, abs=0.01)
    assert found.alpha == pytest.approx(0.3478, abs=0.007)
    assert found.beta == pytest.approx(0.3658, abs=0.007)
    refits = law.bootstrap(found, N, D, loss, refits=200)
    low, high = law.interval(refits.beta / (refits.alpha + refits.beta), len(N))
    assert low < 0.5126 < high < low + 0.1  # of the best size


def test_intervals_hold_the_true_exponents():
    """Fails with plain percentiles of few runs made narrower by half, or if refits do not move from the law."""
    assert min(coverage(20, 300)) >= 18


@pytest.mark.slow
def test_93_of_100_intervals_hold_the_true_exponents():
    assert min(coverage(100, 1000)) >= 93


def test_the_best_size_has_the_lowest_loss_of_its_budget():
    """The closed form against a search. Fails if kappa or a reference size is left out."""
    N, D = runs()
    cost = frontier.Cost(k=30.0, kappa=0.8)
    best, tokens = frontier.optimum(TRUE, cost, 1e20)
    grid = best * np.geomspace(0.5, 2, 20001)
    assert grid[TRUE.loss(grid, cost.tokens(1e20, grid)).argmin()] == pytest.approx(best, rel=1e-3)
    assert cost.tokens(1e20, best) == pytest.approx(tokens)
    assert dataclasses.astuple(frontier.Cost.of(N, 30 * N**0.8)) == pytest.approx((30, 0.8))


def test_parabolas_are_biased_where_the_law_is_not():
    """Wide, lopsided profiles of an exact law: the parabolas' exponent is off by over 0.01, the law's is not."""
    C = np.geomspace(1e18, 1e21, 4)
    # Sizes from a third of the best to 30 times, further on the large side for larger budgets.
    N = np.concatenate([each**0.45 * np.geomspace(0.3, 30 * (each / 1e18)**0.3, 7) for each in C])
    D = np.repeat(C, 7) / 6 / N
    loss, cost = TRUE.loss(N, D), frontier.Cost(6.0, 1.0)
    minima = [frontier.profile(N[i * 7:i * 7 + 7], loss[i * 7:i * 7 + 7]).N for i in range(4)]
    true = TRUE.beta / (TRUE.alpha + TRUE.beta)
    found = law.fit(N, D, loss)
    best = [frontier.optimum(found, cost, each)[0] for each in C]
    assert frontier.power_law(C, np.array(best))[1] == pytest.approx(true, abs=0.002)
    assert abs(frontier.power_law(C, np.array(minima))[1] - true) > 0.01


def test_profiles_without_a_minimum_are_none():
    N = np.array([1e6, 2e6, 4e6])
    assert frontier.profile(N, np.array([3.0, 2.9, 2.7])) is None
    assert frontier.profile(N, np.array([2.9, 3.0, 2.9])) is None  # a maximum
    assert frontier.profile(N[:2], np.array([3.0, 2.9])) is None
    assert frontier.profile(N, np.array([3.0, 2.9, 3.0])).N == pytest.approx(2e6)


def test_few_runs_and_flat_losses_give_no_numbers():
    N, D = runs(2, 2)
    with pytest.raises(UserError, match="4 runs with .* do not determine"):
        law.fit(N, D, TRUE.loss(N, D))
    rows = rows_of(*runs(), lambda N, D: 2.0 + 0.01 * (N > 1e9))
    found = analysis.analyze(rows, (), (), {})
    assert "is not determined" in found["not_fitted"] and "optima" not in found


def test_short_runs_are_not_fitted():
    rows = rows_of(*runs(), TRUE.loss)
    wrong = [{**rows[0], "nats_per_pixel": 9.0, "short": True},
             {**rows[0], "nats_per_pixel": 2 * rows[0]["nats_per_pixel"], "budget": 7.0}]  # held out
    found = analysis.analyze(rows + wrong, (7.0,), (), {"igpt_s": 7.6e7})
    assert found["held_out"][0]["error"] == pytest.approx(-0.5, abs=0.01)
    assert found["runs_fitted"] == 20 and found["laws"]["all"]["alpha"]["value"] == pytest.approx(0.34, rel=1e-2)
    assert "tokens per parameter" in found["sentence"] and found["predictions"]["igpt_s"]["nats_per_pixel"] > 1.69


def test_the_probes_error_has_a_law_of_its_own():
    """Fails with the accuracy in place of the error, or if the loss's law answers for the probe."""
    error = law.Law(E=0.3, a=0.2, alpha=0.5, b=0.1, beta=0.2, N0=1e8, D0=1e10)
    rows = [{**row, "probe_accuracy": 1 - error.loss(row["parameters_all"], row["tokens"])}
            for row in rows_of(*runs(), TRUE.loss)]
    found = analysis.analyze(rows, (), (1e22,), {})
    assert found["probe_law"]["alpha"]["value"] == pytest.approx(0.5, rel=0.02)
    for optima, true in ((found["optima"]["all"], TRUE), (found["probe_optima"], error)):
        assert optima[-1]["parameters"] == pytest.approx(frontier.optimum(true, frontier.Cost(6, 1), 1e22)[0], rel=0.05)
    assert [len(chart.series) for chart in charts.frontier(found)] == [4, 4]
    unprobed = [{**row, "probe_accuracy": None} for row in rows]
    assert not {"probe_law", "probe_not_fitted"} & analysis.analyze(unprobed, (), (), {}).keys()
    assert "do not determine" in analysis.analyze(rows[:3], (), (), {})["probe_not_fitted"]
    assert "7 runs are too few" in analysis.Fit.of(rows[::3], "all").unidentified


def config(**keys):
    return ScalingConfig(**{"budgets": (1e14, 1e11), "sizes": ("2x32", "igpt_tiny"), **keys})


def test_runs_take_the_budget_by_the_exact_count():
    """Fails if steps come from 6 N D, or if the batch does not grow with the tokens."""
    found = study.planned(config(), image_size=16, vocabulary=512)
    assert [run.name for run in found] == ["1e11-2x32", "1e11-igpt_tiny", "1e14-2x32", "1e14-igpt_tiny"]
    for run in found:
        model = run.config.model
        per_image = train_flops_per_image(model.layers, model.embed, model.mlp, 512, 256)
        assert run.flops == run.config.steps * run.config.batch_size * per_image
        assert run.flops == pytest.approx(run.budget, rel=0.5 * run.config.batch_size * per_image / run.budget)
        assert run.tokens == run.config.steps * run.config.batch_size * 256
    assert found[2].config.batch_size > found[0].config.batch_size
    assert study.batch_size_for(study.ANCHOR_TOKENS, 1024) == 128
    counts = study.parameter_counts(Dims(6, 128, 4, 32, 512, 512, 256))
    assert counts["all"] - counts["no_embedding"] == 768 * 128
    assert counts["no_embedding"] - counts["blocks"] == 512 * 128


@pytest.mark.parametrize("keys, message", [
    ({"sizes": ("4by64",)}, "'4by64' is not a size"),
    ({"budgets": (1e3,)}, "less than one step of 2x32"),
    ({"budgets": (1e12,), "held_out_budgets": (1e12,)}, "name a budget twice"),
    ({"sizes": ()}, "sizes is empty"),
    ({"sizes": ("0x64",)}, "'0x64' is not a size"),  # 0 would be the model table's
    ({"budgets": (1.2341e12, 1.2342e12)}, "two budgets have the run 1.23e12-2x32"),
    ({"pretrain": PretrainConfig(batch_size=64)}, "pretrain.batch_size has no effect: .* or set batch_size"),
    ({"pretrain": PretrainConfig(model=ModelConfig(mlp=64))}, "pretrain.model.mlp has no effect"),
    ({"pretrain": PretrainConfig(optimizer=OptimizerConfig(ema=0.9))}, "pretrain.optimizer.ema has no effect"),
    ({"pretrain": PretrainConfig(optimizer=OptimizerConfig(warmup_steps=10**6))}, "exceeds the .* steps of 1e11-2x32"),
])
def test_wrong_studies_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        study.planned(config(**keys), 16, 512)


def test_added_budgets_and_sizes_leave_all_runs_in_their_slices():
    """And the slices of a study are about equally long. Seen to fail with slices cut from the list of runs."""
    few = study.planned(config(budgets=(1e13, 3e13), sizes=("2x32", "2x48", "4x64")), 16, 512)
    more = study.planned(config(budgets=(1e12, 3e12, 1e13, 3e13), sizes=("2x32", "2x48", "4x64", "6x96")), 16, 512)
    turns = {run.name: run.turn for run in more}
    assert all(turns[run.name] == run.turn for run in few)
    for count in (2, 4):
        assert set(np.bincount([turn % count for turn in turns.values()])) == {16 // count}


def test_defaults_of_runs_are_pretrains():
    assert config().pretrain == PretrainConfig()


STUDY = ["--config.fewest_steps=1",
         "--config.sizes=('1x8','1x16','2x16')", "--config.batch_size=32", "--config.budgets=(5e8,1e9)",
         "--config.pretrain.precision=float32", "--config.pretrain.log_every_steps=1000",
         "--config.pretrain.optimizer.learning_rate=1e-2", "--config.probe=True", "--config.probing.limit=64",
         "--config.probing.data.test=held_out", "--config.completions=2", "--config.completion_images=70"]


ELSEWHERE = "--config.pretrain.precision=bfloat16"  # that of the merging machine says nothing of the runs


def test_a_study_resumes_merges_and_reports(store, folder):
    """A whole study on digits, the same again, and its runs as two slices."""
    def command(workdir, *more):
        return ["scaling", f"--workdir={folder / workdir}", *STUDY, f"--config.pretrain.data.store={store}", *more]

    def job(*given):
        return run_job_command(*command(*given))

    done = job("one")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "one" / "result.json").read_text())["metrics"]
    rows = json.loads((folder / "one" / "scaling.json").read_text())
    assert result["runs"] == len(rows) == 6 == result["runs_fitted"] and {row["status"] for row in rows} == {"done"}
    assert all(0 <= row["probe_accuracy"] <= 1 and row["random_conv_frechet"] > 0 for row in rows)
    assert (folder / "one" / "figures" / "completion_profiles.png").exists()
    assert "laws" in result

    written = (folder / "one" / rows[0]["run"] / "result.json").stat().st_mtime_ns
    refused = {"--config.pretrain.seed=1": "holds a run with seed=0 (now 1)",
               "--config.pretrain.optimizer.schedule=wsd": "holds a run with optimizer.schedule='cosine' (now 'wsd')",
               "--config.pretrain.palette=" + str(folder / "other.npy"): "held-out images or another palette"}
    palette.save(storage.path(folder / "other.npy"), Store.open(store).palette[::-1])
    again, *others = run_all(command("one"), *(command("one", setting) for setting in refused))
    assert again[0] == 0 and (folder / "one" / rows[0]["run"] / "result.json").stat().st_mtime_ns == written
    assert json.loads((folder / "one" / "scaling.json").read_text()) == rows
    for (code, log), message in zip(others, refused.values(), strict=True):
        assert code == 2 and message in log and len(log.splitlines()) == 1, log

    for i in range(2):  # the slices find their runs done
        for row in rows:
            shutil.copytree(folder / "one" / row["run"], folder / "many" / f"slice-{i}" / row["run"])
    parts = [command(f"many/slice-{i}", f"--config.shard={i}/2") for i in range(2)]
    assert [code for code, _ in run_all(*parts, command("many", "--config.shard=merge", ELSEWHERE))] == [0, 0, 0]
    for i in range(2):
        assert len(json.loads((folder / "many" / f"slice-{i}" / "scaling.json").read_text())) == 3
    code, log = run_all(command("many", "--config.shard=merge", "--config.held_out_budgets=(2e9,)"))[0]
    assert code == 2 and "are not those of the slices" in log
    merged = json.loads((folder / "many" / "scaling.json").read_text())
    assert merged == rows
    assert json.loads((folder / "many" / "result.json").read_text())["metrics"] == result

    # Other keys of probing probe again, and train nothing. Seen to fail with probed.json read without its keys.
    def slice_rows():
        return json.loads((folder / "many" / "slice-0" / "scaling.json").read_text())

    before = slice_rows()
    probed = job("many/slice-0", "--config.shard=0/2", "--config.probing.limit=128")
    assert probed.returncode == 0 and "step 1/" not in probed.stderr, probed.stderr
    assert all(old["probe_interval"] != new["probe_interval"] for old, new in zip(before, slice_rows(), strict=True))
    with pytest.raises(UserError, match="the slices differ in probing.limit"):
        slices.joined(storage.path(folder / "many"), "scaling", scaling.NAME, scaling.STUDY)
    assert job("many/slice-0", "--config.shard=0/2").returncode == 0 and slice_rows() == before
