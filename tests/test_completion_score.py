"""The completion score: the Frechet distance, the features, and the jobs' columns."""

import itertools
import pathlib
import shutil
import types

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import igpt_jax
from igpt_jax import checkpoint, storage
from igpt_jax.config import EvaluateConfig, MeshConfig, ScalingConfig, UserError, parse
from igpt_jax.data.store import Store
from igpt_jax.evaluation.completion_score import CompletionScorer, frechet_distance, random_conv, score
from igpt_jax.jobs import evaluate, scaling
from igpt_jax.parallel import sharding

DATA = pathlib.Path(__file__).parent / "data"
RUN, STORE = str(DATA / "pretrain_format2"), str(DATA / "store_format2")  # 4x4 pixels, 8 colors; 36 images in train


IMAGES = np.random.default_rng(0).integers(0, 256, (40, 5, 5, 3), np.uint8)
NOISY = np.concatenate([IMAGES[:, :2], np.random.default_rng(1).integers(0, 256, (40, 3, 5, 3), np.uint8)], axis=1)


def draws_with(right):
    """Three draws of completions. So many of each are the images, others in each draw; the rest is noise."""
    return [np.where((np.arange(40) - 5 * k) % 40 < right, IMAGES.T, NOISY.T).T for k in range(3)]


def squared_errors(completed):
    """Of each image, over the lower half."""
    return (((completed.astype(float) - IMAGES) / 255) ** 2)[:, 2:].mean((1, 2, 3))


def covariance(F, seed):
    root = np.random.default_rng(seed).normal(size=(F, F))
    return root @ root.T / F


def features_with(mean, cov, N, seed):
    """N rows with exactly this mean and sample covariance."""
    rows = np.random.default_rng(seed).normal(size=(N, len(mean)))
    rows -= rows.mean(axis=0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return mean + white @ np.linalg.cholesky(cov).T


def test_the_distance_of_two_gaussians():
    """Against scipy's matrix root; (m - n)^2 + (s - t)^2 for each independent variable.

    Seen to fail with R^T S for R S^T, and with covariances divided by N.
    """
    A, B, shift = covariance(6, 0), covariance(6, 1), np.arange(6) / 3
    expected = shift @ shift + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    found = frechet_distance(features_with(np.zeros(6), A, 50, 2), features_with(shift, B, 30, 3))
    assert found == pytest.approx(expected, rel=1e-9)
    one, other = (features_with(np.full(2, mean), np.eye(2) * std ** 2, 9, 4) for mean, std in ((1, 2), (4, 0.5)))
    assert frechet_distance(one, other) == pytest.approx(2 * (3 ** 2 + 1.5 ** 2), rel=1e-9)


@pytest.mark.parametrize("N, F", [(100, 8), (8, 100), (100, 1)])
def test_equal_sets_have_distance_zero(N, F):
    """And sets that differ by 1e-5 the right one, though the covariance is singular.

    Seen to fail in float32, and with roots of the eigenvalues of A^1/2 B A^1/2.
    """
    rows = np.random.default_rng(0).normal(size=(N, F)).astype(np.float32).astype(np.float64)
    rows[:, -1] = rows[:, 0]
    assert 0 <= frechet_distance(rows + 1000, rows[::-1] + 1000) < 1e-10
    square = (rows.mean(axis=0) ** 2).sum() + rows.var(axis=0, ddof=1).sum()
    assert frechet_distance(rows, rows * (1 + 1e-5)) == pytest.approx(1e-10 * square, rel=1e-3)


PINNED = [[0.0588607321348, 0.169576476857, 0.500450012648, 0.104921904668],
          [0.343928013228, 0.192728934968, 0.120040109754, 0.209152370025]]


def test_random_features_are_the_same_everywhere():
    """A change of the network needs another name of the column. Seen to fail with another seed, and without padding."""
    image = (np.arange(7 * 7 * 3).reshape(1, 7, 7, 3) * 37 % 256).astype(np.uint8)
    found = random_conv(np.concatenate([image, 255 - image]))
    assert found.shape == (2, 64) and found.dtype == np.float64
    np.testing.assert_allclose(found[:, [0, 5, 31, 40]], PINNED, rtol=1e-9)
    np.testing.assert_allclose(found[1:], random_conv(255 - image), rtol=1e-12)
    below = image.copy()
    below[:, -1] = 0
    changed = (random_conv(below) != found[:1])[0]
    assert changed[32:].any() and not changed[:32].any()


def test_the_score_falls_to_zero_as_completions_become_the_images():
    """Seen to fail with the originals' features scaled, with the error over the whole image, and with the best error of
    each draw for that of each image."""
    found = [score(IMAGES, draws_with(right), random_conv, "d") for right in (0, 20, 40)]
    assert found[0]["d"] > found[1]["d"] > found[2]["d"] == pytest.approx(0, abs=1e-12)
    errors_N = squared_errors(NOISY)
    assert found[0]["completion_mse_mean"] == pytest.approx(errors_N.mean()) and found[2]["completion_mse_mean"] == 0
    wrong_KN = np.array([(draw != IMAGES).any((1, 2, 3)) for draw in draws_with(20)])
    assert found[1]["completion_mse_mean"] == pytest.approx((errors_N * wrong_KN).mean())
    assert 0 < found[1]["completion_mse_best"] == pytest.approx((errors_N * wrong_KN.all(axis=0)).mean())


def test_intervals_and_baselines():
    """Seen to fail with the normal distribution for t's, and with the mirror image without its first row."""
    draws, real_NF = draws_with(20), random_conv(IMAGES)
    found = score(IMAGES, draws, random_conv, "d")
    distances = [frechet_distance(real_NF, random_conv(draw)) for draw in draws]
    expected = scipy.stats.t.interval(0.95, 2, np.mean(distances), scipy.stats.sem(distances))
    assert found["d"] == pytest.approx(np.mean(distances)) and found["d_interval"] == pytest.approx(list(expected))
    assert score(IMAGES, draws[:1], random_conv, "d")["d_interval"] is None
    other = np.concatenate([IMAGES[:, :2], IMAGES[np.arange(40) - 20, 2:]], axis=1)
    for name, images in (("mirror", IMAGES[:, [0, 1, 1, 0, 0]]), ("other_image", other)):
        assert found[f"d_{name}"] == pytest.approx(frechet_distance(real_NF, random_conv(images)))
        assert found[f"completion_mse_{name}"] == pytest.approx(squared_errors(images).mean())


def measured(folder, **keys):
    """The row of an evaluation of RUN."""
    given = {"checkpoints": RUN, "data": {"store": STORE, "split": "train"}, **keys}
    evaluate.run(parse("evaluate", given), str(folder))
    (row,) = evaluate.tables.load(storage.path(folder), "evaluation")
    return row


def figures(row):
    return {name: value for name, value in row.items() if "frechet" in name or "mse" in name}


def test_a_score_depends_on_neither_batch_nor_chance(tmp_path, capfd):
    """Of an evaluation, with fewer images than features. Seen to fail with the batch size in a draw's index, and with
    the last batch of features dropped."""
    row = measured(tmp_path / "a", completions=3, batch_size=8)
    assert "completion_images=36 does not determine the covariance of 64 features" in capfd.readouterr().err
    assert row["completion_images"] == 36 and row["completion_draws"] == 3
    assert 0 < row["random_conv_frechet_interval"][0] < row["random_conv_frechet"] < row["random_conv_frechet_mirror"]
    again = figures(measured(tmp_path / "b", completions=3, batch_size=36))
    assert len(again) == 9 and again == {name: pytest.approx(value, rel=1e-9) for name, value in figures(row).items()}
    more = measured(tmp_path / "a", completions=4)
    assert more["random_conv_frechet"] != row["random_conv_frechet"]
    assert more["random_conv_frechet_halves"] == row["random_conv_frechet_halves"]


def test_completions_are_those_of_the_sample_job(tmp_path):
    """Scored from Python. Seen to fail with one draw K times, and with the draws' indices in another order."""
    model = igpt_jax.load(RUN)
    images = Store.open(STORE).split("train").read(np.arange(36))
    draws = model.complete(images, n=2).transpose(1, 0, 2, 3, 4)
    expected = score(model.quantize(images), draws, random_conv, "random_conv_frechet")
    row = measured(tmp_path, completions=2)
    assert figures(row) == {name: pytest.approx(value) for name, value in expected.items()}


def test_features_of_a_checkpoint_and_of_a_function(tmp_path, monkeypatch):
    """The middle layer, as from Python; and a function of images. Seen to fail with the last layer."""
    model = igpt_jax.load(RUN)
    images = model.quantize(Store.open(STORE).split("train").read(np.arange(36)))
    features = model.features(images, layer=1)
    row = measured(tmp_path / "a", completions=1, completion_features=RUN, batch_size=8)
    assert row["checkpoint_frechet_halves"] == pytest.approx(frechet_distance(features[::2], features[1::2]), rel=1e-4)
    (tmp_path / "mine.py").write_text("def middle(images):\n    return images[:, 2].mean(axis=1)\n"
                                      "def flat(images):\n    return images[:, 0, 0, 0]\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = measured(tmp_path / "b", completions=1, completion_features="mine:middle")
    features = images[:, 2].mean(axis=1)
    assert row["function_frechet_halves"] == pytest.approx(frechet_distance(features[::2], features[1::2]))
    for given, message in (("mine:flat", r"must be finite numbers \[36, F\]; these are uint8 \[36\]"),
                           ("mine:number", "is not a function"), ("mine:missing", "cannot be imported .AttributeError"),
                           ("nowhere:f", "cannot be imported .ModuleNotFoundError: No module named 'nowhere'"),
                           (f"{tmp_path}/nothing", "holds no checkpoint.*Or use random, or MODULE:FUNCTION")):
        with pytest.raises(UserError, match=message) as caught:
            measured(tmp_path / "c", completions=1, completion_features=given)
        assert "\n" not in str(caught.value)


def test_tables_without_the_score_stay_valid(tmp_path, monkeypatch):
    """Rows are kept where the score is off, whatever its other keys; and measured again where it is on or its features
    change. Seen to fail with the new keys in the digest, and with a checkpoint's path for its identity."""
    count = []
    inner = evaluate._measured
    monkeypatch.setattr(evaluate, "_measured", lambda *arguments: count.append(1) or inner(*arguments))
    old = {name: value for name, value in evaluate.values_with(EvaluateConfig(), "resume", "same").items()
           if name not in ("samples", "views") and not name.startswith("completion")}
    assert evaluate._asked(EvaluateConfig()) == evaluate.json_digest(old)
    for times, keys in ((1, {}), (1, {"completion_images": 9}), (2, {"completions": 1}), (2, {"completions": 1}),
                        (3, {"completions": 1, "completion_features": RUN})):
        measured(tmp_path, **keys)
        assert len(count) == times, keys
    monkeypatch.setattr(evaluate.completion_score.checkpoint, "identity",
                        lambda path, inner=checkpoint.identity: inner(path) + "changed" * (path == RUN))
    measured(tmp_path, completions=1, completion_features=RUN)
    assert len(count) == 4


def test_a_study_scores_a_run_again_when_keys_or_images_change(tmp_path):
    """Otherwise the figures are those of scored.json. Seen to fail with each of the settings left out of its digest."""
    shutil.copytree(RUN, tmp_path / "run")
    counted = itertools.count(1)
    scorer = types.SimpleNamespace(columns=lambda *arguments: {"random_conv_frechet": next(counted)})
    keys = {"completions": 1}
    for times, split, changed in ((1, "train", {}), (1, "train", {}), (2, "train", {"completions": 2}),
                                  (3, "train", {"completion_images": 9}), (4, "train", {"completion_features": RUN}),
                                  (5, "held_out", {})):
        keys |= changed
        data = scaling._Data(4, 8, 36, "", Store.open(STORE).split(split))
        found = scaling._scored(parse("scaling", keys), data, storage.path(tmp_path / "run"), scorer)
        assert found == {"random_conv_frechet": times}


def test_models_that_cannot_draw_are_refused():
    """By both jobs, in one line. Seen to fail without either check."""
    mesh = sharding.make_mesh(MeshConfig())
    masked = types.SimpleNamespace(causal=False, config=types.SimpleNamespace(objective="masked"))
    scorer = CompletionScorer(EvaluateConfig(completions=2), mesh, 8)
    with pytest.raises(UserError, match="completions=2: STEP was trained with objective=masked.* Set completions=0"):
        scorer.columns("STEP", masked, {}, masked, Store.open(STORE).split("train"))
    config = parse("scaling", {"completions": 2, "pretrain": {"objective": "masked"}})
    assert isinstance(config, ScalingConfig)
    with pytest.raises(UserError, match="completions=2: models with pretrain.objective=masked cannot sample"):
        scaling._scorer(config, mesh)


def test_images_of_another_size_than_the_features_are_refused():
    """Seen to fail without the check."""
    keys = EvaluateConfig(completions=1, completion_features=RUN)
    scorer = CompletionScorer(keys, sharding.make_mesh(MeshConfig()), 8)
    with pytest.raises(UserError, match="its model takes images of 4 pixels, and these have 6"):
        scorer._of(np.zeros((8, 6, 6, 3), np.uint8))
