"""Training objectives: masked, denoising, the joint loss of fine-tuning, votes over views."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import random_parameters

from igpt_jax.config import FinetuneModelConfig, MeshConfig, ModelConfig, base_config, parse
from igpt_jax.evaluation import exact_loss
from igpt_jax.evaluation.steps import make_eval_step
from igpt_jax.model import objectives
from igpt_jax.model.dims import Dims
from igpt_jax.model.features import make_feature_step, pooled
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.objectives import Denoising, Diffusion, Masked
from igpt_jax.parallel import sharding, topology
from igpt_jax.planner import compilation
from igpt_jax.planner.answer import answer
from igpt_jax.training import transfer
from igpt_jax.training.loop import throughput_of
from igpt_jax.training.steps import init_state, make_loss, make_train_step

TOKENS = np.random.default_rng(0).integers(0, 16, (8, 16))
SIZES = {"layers": 2, "embed": 16, "heads": 2}
MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def make(job="pretrain", arguments=""):
    config = base_config(job, f"model=igpt_tiny,steps=10,batch_size=8,precision=float32{arguments}")
    config.model.update(SIZES)
    config = parse(job, config)
    return config, Model.of(config, 16, 4, MESH, 3 if job == "finetune" else 0)


def keys_for(count):
    return objectives.example_keys(jax.random.key(0), jnp.arange(count))


def loss_of(config, model, at, key=0, **options):
    """The generative loss of one step, from random parameters, at step `at`."""
    state = {**init_state(model, config, jax.random.key(0)), "params": random_parameters(model)}
    step = jax.jit(make_train_step(model, config, warmup_steps=0))
    _, metrics = step({**state, "step": jnp.int32(at)}, TOKENS, jax.random.key(key), **options)
    return float(metrics["train/nats_per_pixel"])


@pytest.mark.parametrize("objective", ["masked", "denoising", "diffusion"])
def test_the_first_loss_is_that_of_guessing(objective):
    """ln V, since the head starts at zero. A model that is not causal has no start vector.

    Seen to fail with the sum over all pixels divided by the number of chosen ones, and with denoising causal.
    """
    config, model = make(arguments=f",objective={objective}")
    state = init_state(model, config, jax.random.key(0))
    assert "start_D" not in state["params"]
    _, metrics = jax.jit(make_train_step(model, config, warmup_steps=0))(state, TOKENS, jax.random.key(0))
    assert float(metrics["train/nats_per_pixel"]) == pytest.approx(math.log(16), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_a_hidden_pixel_is_unseen_and_all_others_are_seen(backend):
    """Another color of a hidden pixel changes no logit; of any other pixel, before or after, those of all hidden ones.

    Seen to fail with attention causal, with hidden colors only dampened, and with the pixels shifted by one.
    """
    model = Model(ModelConfig("igpt_tiny", **SIZES, attention=backend), 16, 4, "float32", None, Masked(0.15))
    params = random_parameters(model)
    hidden_BT = np.zeros((1, 16), bool)
    hidden_BT[0, [3, 9]] = True
    logits = jax.jit(lambda tokens_BT: model.logits(params, tokens_BT, hidden_BT=hidden_BT))
    before = np.asarray(logits(TOKENS[:1]))
    for pixel in range(16):
        after = np.asarray(logits((TOKENS[:1] + 5 * (np.arange(16) == pixel)) % 16))
        changed = np.abs(after - before).max(axis=-1)[0] > 1e-6
        assert not changed.any() if hidden_BT[0, pixel] else changed.all(), pixel


def test_a_corrupted_pixel_hides_its_original_and_all_others_are_seen():
    """Another original color of a corrupted pixel changes no logit. Another color of any other pixel, before or after
    it, changes those of all pixels.

    Seen to fail with the original tokens given to the model, and with attention causal.
    """
    model = Model(ModelConfig("igpt_tiny", **SIZES), 16, 4, "float32", None, Denoising(0.15))
    params, keys_B = random_parameters(model), keys_for(1)

    @jax.jit
    def look(tokens_BT):
        view = model.objective.view(tokens_BT, keys_B, 16)
        return model.logits(params, view.tokens_BT, hidden_BT=view.hidden_BT), view.scored_BT

    before, corrupted_BT = look(TOKENS[:1])
    assert 0 < corrupted_BT.sum() < 16
    for pixel in range(16):
        after, same_BT = look((TOKENS[:1] + 5 * (np.arange(16) == pixel)) % 16)
        np.testing.assert_array_equal(same_BT, corrupted_BT)
        changed = np.abs(after - before).max(axis=-1)[0] > 1e-6
        assert not changed.any() if corrupted_BT[0, pixel] else changed.all(), pixel


@pytest.mark.parametrize("objective", [Masked(0.15), Denoising(0.15), Diffusion()])
def test_the_loss_counts_chosen_pixels_only(objective):
    """Against NumPy in float64: the mean over the chosen pixels of an image, then over images. They predict the
    original colors.

    Seen to fail with the mean over all pixels, with the mean over the pixels of the batch, and with the random colors
    as targets.
    """
    view = objective.view(jnp.asarray(TOKENS), keys_for(8), 16)
    logits_BTV = np.random.default_rng(1).normal(size=(8, 16, 16)).astype(np.float32)
    nats_BT = np.log(np.exp(logits_BTV, dtype=np.float64).sum(-1))
    nats_BT -= np.take_along_axis(logits_BTV, TOKENS[..., None], -1)[..., 0]
    chosen_BT = np.asarray(view.scored_BT)
    assert len(set(chosen_BT.sum(1))) > 1
    assert float(objective.loss(logits_BTV, jnp.asarray(TOKENS), view)) == pytest.approx(
        nats_BT.mean(1, where=chosen_BT).mean(), rel=1e-6)


@pytest.mark.parametrize("objective", ["masked", "denoising", "diffusion"])
def test_the_view_of_a_step_follows_from_seed_and_step(objective):
    """The same seed and step give the same view, whatever the number of microbatches; another step or seed another.

    Seen to fail with the step left out of the key, and with each microbatch drawing for itself.
    """
    config, model = make(arguments=f",objective={objective}")
    accumulated, _ = make(arguments=f",objective={objective},accumulate=4")
    assert loss_of(config, model, 3) == loss_of(config, model, 3)
    assert loss_of(config, model, 3) == pytest.approx(loss_of(accumulated, model, 3), rel=1e-6)
    assert len({loss_of(config, model, 3), loss_of(config, model, 4), loss_of(config, model, 3, key=1)}) == 3


@pytest.mark.parametrize("objective", [Masked, Denoising])
def test_the_share_of_chosen_pixels_is_the_mask_ratio(objective):
    """Within four standard deviations. At least one pixel of each image is chosen. A chosen pixel's random color is
    uniform: it equals the original in 1 of V cases.

    Seen to fail with `>` for `<=`, without the lower bound of the threshold, and with colors 1 to V - 1 only.
    """
    tokens_BT = jnp.zeros((500, 256), jnp.int32)
    view = objective(0.15).view(tokens_BT, keys_for(500), 16)
    assert float(view.scored_BT.mean()) == pytest.approx(0.15, abs=0.004)
    assert objective(0.01).view(tokens_BT[:, :4], keys_for(500), 16).scored_BT.any(axis=1).all()
    colors = np.bincount(view.tokens_BT[view.scored_BT], minlength=16) / view.scored_BT.sum()
    if objective is Denoising:
        np.testing.assert_allclose(colors, 1 / 16, atol=0.007)
        assert view.hidden_BT is None and not view.tokens_BT[~view.scored_BT].any()
    else:
        assert colors[0] == 1 and (view.hidden_BT == view.scored_BT).all()


@pytest.mark.parametrize("objective", [Masked(0.15), Denoising(0.15), Diffusion()])
def test_evaluation_corrupts_by_example(objective):
    """Loss and features of an image are the same alone and in another batch. Its views differ from each other and from
    those of other images.

    Seen to fail with the views drawn by index in the batch.
    """
    model = Model(ModelConfig("igpt_tiny", **SIZES), 16, 4, "float32", None, objective)
    params = random_parameters(model)
    tokens_BT, ids_B = np.repeat(TOKENS[:1], 3, axis=0), np.array([5, 6, 7])  # one picture thrice
    for step, part in ((jax.jit(make_eval_step(model)), lambda found: found["nats_per_pixel"]),
                       (jax.jit(make_feature_step(model, "normalized", views=2)), lambda found: found)):
        together, alone = (part(step(params, tokens_BT[rows], ids_B[rows])) for rows in (slice(3), slice(1, 2)))
        np.testing.assert_allclose(together[1], alone[0], rtol=1e-5)
        assert np.abs(np.asarray(together[0] - together[1])).max() > 1e-4
    assert together.shape == (3, 2, 3, 16)
    assert np.abs(np.asarray(together[0, 0] - together[0, 1])).max() > 1e-4


@pytest.mark.parametrize("objective", ["autoregressive", "masked", "denoising", "diffusion"])
def test_throughput_and_plan_count_the_attention_of_the_objective(objective):
    """Model FLOPs, and with them MFU, hold the causal half of attention for a causal model, all of it for others.

    Seen to fail with the direction left out of the call in training/loop.py, and of that in planner/answer.py.
    """
    config, model = make(arguments=f",objective={objective}")
    formula = train_flops_per_image(2, 16, 64, 16, 16, causal=objective == "autoregressive")
    assert throughput_of(config, model, MESH)._flops_per_image == formula
    planned = base_config("plan", f"model=igpt_tiny,objective={objective},batch_size=8,image_size=4,palette_size=16,"
                                  "topology=h200:8")
    planned.model.update(SIZES)
    planned = parse("plan", planned)
    verdict = compilation.Verdict("failed", devices=1)
    plan = answer(planned, topology.parse(planned.topology), verdict)
    assert plan.model_flops == 8 * formula


@pytest.mark.parametrize("class_layer", [-1, 1])
def test_the_joint_loss_is_the_weighted_sum(class_layer):
    """Against NumPy in float64 from the same features and logits: generative_weight L_GEN + class_weight L_CLF, the
    head on the mean of the normalized stream, at the end or before a block.

    Seen to fail with the head reading the stream without its norm, with the weights exchanged, and with another layer.
    """
    config, _ = make("finetune", ",generative_weight=0.5,class_weight=2.0")
    model = Model(FinetuneModelConfig("igpt_tiny", **SIZES), 16, 4, "float32", None, None, 3, class_layer)
    params, labels_B = random_parameters(model), np.arange(8) % 3
    loss, measured = jax.jit(make_loss(model, config))(params, (TOKENS, labels_B, objectives.View(TOKENS)), None)

    def nats(logits, chosen):
        logits = np.asarray(logits, np.float64)
        return (np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, chosen[..., None], -1)[..., 0]).mean()

    feature_BD = np.asarray(pooled(model, params, TOKENS)[class_layer], np.float64)  # test_probe proves these
    logits_BK = feature_BD @ np.asarray(params["class_head_KD"]).T
    generative, classes = nats(model.logits(params, TOKENS), TOKENS), nats(logits_BK, labels_B)
    assert float(measured["train/nats_per_pixel"]) == pytest.approx(generative, rel=1e-6)
    assert float(measured["train/classification_nats"]) == pytest.approx(classes, rel=1e-6)
    assert float(loss) == pytest.approx(0.5 * generative + 2 * classes, rel=1e-6)
    assert float(measured["train/accuracy"]) == (logits_BK.argmax(1) == labels_B).mean()


def test_without_generative_weight_only_classes_move_the_model():
    """The pixels' head keeps every bit; class head and trunk change. Seen to fail with the weight ignored."""
    config, model = make("finetune", ",generative_weight=0.0")
    state = {**init_state(model, config, jax.random.key(0)), "params": random_parameters(model)}
    after, _ = jax.jit(make_train_step(model, config, 0))(state, TOKENS, jax.random.key(0), np.arange(8) % 3)
    moved = {name: bool((state["params"][name] != after["params"][name]).any())
             for name in ("head_VD", "class_head_KD", "position_embed_TD")}
    assert moved == {"head_VD": False, "class_head_KD": True, "position_embed_TD": True}


def test_the_majority_of_the_votes_decides():
    """Most votes win; ties fall to either at random, by the seed. Seen to fail with ties to the lowest."""
    votes_EM = np.array([[2, 1, 2, 0, 2], [0, 0, 1, 1, 2], [1, 1, 1, 1, 1]] * 50)
    found = exact_loss.majority(votes_EM, 3, seed=0)
    assert (found[0::3] == 2).all() and (found[2::3] == 1).all()
    assert 10 < (found[1::3] == 0).sum() < 40 and (found[1::3] < 2).all()
    np.testing.assert_array_equal(found, exact_loss.majority(votes_EM, 3, seed=0))
    assert (found != exact_loss.majority(votes_EM, 3, seed=1)).any()
    np.testing.assert_array_equal(found[:3], exact_loss.majority(votes_EM[:3], 3, seed=0))  # by place in the split


def test_a_position_table_for_another_size():
    """A plane stays a plane inside when it grows, averages where it shrinks, and rows are not exchanged with columns.

    Seen to fail with the table resized as a line of positions.
    """
    rows, columns = np.meshgrid(np.arange(4.), np.arange(4.), indexing="ij")

    def resized(table_TD, side):
        return transfer.resized("position_embed_TD", table_TD, Dims(L=1, D=2, N=1, H=2, F=8, V=5, T=side ** 2))

    table_TD = jnp.asarray(np.stack([rows, 10 * columns], axis=-1).reshape(16, 2), jnp.float32)
    grown = np.asarray(resized(table_TD, 8)).reshape(8, 8, 2)
    np.testing.assert_allclose(grown[1:7, 3, 0], np.arange(1, 7) / 2 - 0.25, atol=1e-6)
    np.testing.assert_allclose(grown[3, 1:7, 1], 10 * (np.arange(1, 7) / 2 - 0.25), atol=1e-5)
    halved = np.asarray(resized(table_TD, 2)).reshape(2, 2, 2)
    assert (np.diff(halved[:, 0, 0]) > 1.5).all() and (np.diff(halved[0, :, 1]) > 15).all()
    np.testing.assert_allclose(halved.mean((0, 1)), [1.5, 15], rtol=1e-5)
    np.testing.assert_allclose(resized(table_TD, 4), table_TD, atol=1e-6)
