"""Sampling: the cache changes nothing, and an image does not depend on its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import random_parameters

from igpt_jax.config import ModelConfig
from igpt_jax.model import sampling as decode
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import Sampling, generate


@pytest.fixture(scope="module")
def model():
    return Model(ModelConfig("igpt_tiny", layers=2, embed=24, heads=2), vocabulary=13, image_size=5,
                 precision="float32")


def keys_for(count, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def uncached(model, params, given_BP, keys_B, sampling):
    """One whole forward pass per pixel."""
    B, P = given_BP.shape
    tokens = jnp.pad(given_BP, ((0, 0), (0, model.dims.T - P)))
    logits = jax.jit(model.logits)
    for position in range(P, model.dims.T):
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
        tokens = tokens.at[:, position].set(sampling.draw(logits(params, tokens)[:, position], keys))
    return tokens


@pytest.mark.parametrize("given, sampling", [
    (0, Sampling()), (1, Sampling(temperature=0)), (10, Sampling(0.7, top_k=5, top_p=0.9)), (24, Sampling()),
    (25, Sampling())])
def test_cached_equals_uncached_token_for_token(model, given, sampling, monkeypatch):
    """Segments of 8, so that a run crosses several. Seen to fail with the cache written one position late."""
    monkeypatch.setattr(decode, "SEGMENT", 8)
    params = random_parameters(model)
    given_BP = jnp.asarray(np.random.default_rng(0).integers(0, 13, (3, given)), jnp.int32)
    tokens = jax.jit(generate, static_argnums=(0, 4))(model, params, given_BP, keys_for(3), sampling)
    np.testing.assert_array_equal(tokens, uncached(model, params, given_BP, keys_for(3), sampling))
    np.testing.assert_array_equal(tokens[:, :given], given_BP)


def test_an_image_does_not_depend_on_its_batch(model):
    """Seen to fail with one key for the whole batch."""
    params = random_parameters(model)
    run = jax.jit(generate, static_argnums=(0, 4))
    together = run(model, params, jnp.zeros((4, 0), jnp.int32), keys_for(4), Sampling())
    alone = run(model, params, jnp.zeros((1, 0), jnp.int32), keys_for(4)[2:3], Sampling())
    np.testing.assert_array_equal(together[2], alone[0])
    assert len({tuple(row) for row in np.asarray(together).tolist()}) == 4


def test_in_bfloat16_the_random_stream_is_the_same_at_every_batch_size():
    """At temperature 1e6 only the random stream matters, not the logits, whose last bits depend on the batch.

    Seen to fail with keys split from one key of the batch.
    """
    model = Model(ModelConfig("igpt_tiny", layers=1, embed=16, heads=2), vocabulary=13, image_size=4,
                  precision="bfloat16")
    run, params = jax.jit(generate, static_argnums=(0, 4)), random_parameters(model)
    together, alone = (run(model, params, jnp.zeros((len(keys), 0), jnp.int32), keys, Sampling(1e6))
                       for keys in (keys_for(3), keys_for(3)[2:]))
    np.testing.assert_array_equal(together[2:], alone)


def test_a_narrow_cache_costs_little(model):
    """bfloat16 keys and values under a float32 computation: the same picture up to rounding, pixel by pixel.

    Seen to fail with the cache left in float32: then nothing differs.
    """
    params = random_parameters(model)
    given_BP = jnp.asarray(np.random.default_rng(0).integers(0, 13, (3, 10)), jnp.int32)
    gpt, stepped = model.bind(params), {}
    for dtype in ("float32", "bfloat16"):
        _, cache = decode.prefill(gpt, given_BP, jnp.dtype(dtype))
        cache = [tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))) for x in layer) for layer in cache]
        assert all(x.dtype == dtype for layer in cache for x in layer)
        stepped[dtype] = decode.decode_pixel(gpt, decode.unstacked(gpt), given_BP[:, 0], jnp.int32(11), cache)[0]
    difference = np.abs(stepped["float32"] - stepped["bfloat16"]).max()
    assert 0 < difference < 0.05 * np.abs(stepped["float32"]).max()


def test_a_bfloat16_sampler_caches_float32_on_a_cpu():
    """Unless asked for bfloat16: XLA's CPU compiler would convert the whole cache for each pixel.

    Seen to fail with the cache in the dtype of the computation.
    """
    model = Model(ModelConfig("igpt_tiny", layers=1, embed=16, heads=2), 13, 4, "bfloat16")
    arguments = model, random_parameters(model), jnp.zeros((3, 0), jnp.int32), keys_for(3), Sampling()
    for dtype, held, unheld in ((None, "f32", "bf16"), ("bfloat16", "bf16", None)):
        text = jax.jit(generate, static_argnums=(0, 4, 5)).lower(*arguments, dtype).compile().as_text()
        assert f" {held}[3,2,16,8]" in text and f" {unheld}[3,2,16,8]" not in text


def test_draws_follow_the_distribution():
    """Frequencies of 20,000 draws against softmax, with and without top-k and top-p.

    Seen to fail with the temperature multiplied instead of divided, and with top-p cutting one color early.
    """
    logits_V = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    logits_BV = jnp.broadcast_to(logits_V, (20_000, 4))

    def frequencies(sampling):
        return np.bincount(sampling.draw(logits_BV, keys_for(20_000)), minlength=4) / 20_000

    np.testing.assert_allclose(frequencies(Sampling()), [0.5, 0.25, 0.15, 0.1], atol=0.015)
    squared = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(frequencies(Sampling(temperature=0.5)), squared / squared.sum(), atol=0.015)
    np.testing.assert_allclose(frequencies(Sampling(top_k=2)), [2 / 3, 1 / 3, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(Sampling(top_p=0.8)), [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.015)


@pytest.mark.parametrize("sampling", [Sampling(temperature) for temperature in (0, 1e-300, 1e-46, 1e-38, 1.2e-38)]
                         + [Sampling(top_k=1), Sampling(1e38, top_k=1), Sampling(top_p=1e-46), Sampling(top_p=1e-9),
                            Sampling(1e-38, 5, 0.5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_settings_give_the_most_likely_color(sampling, dtype):
    """The argmax, the first of equals, also of logits that are large or far apart.

    Seen to fail with logits divided before the largest was subtracted, and with top_k by value.
    """
    logits_BV = jnp.tile(jnp.asarray([[1, 2, 9, -3, 9, 2], [-90, -80, -70, -60, -50, -1e30]], dtype), (20, 1))
    if sampling.temperature and not (sampling.top_k or sampling.top_p < 1):
        logits_BV = logits_BV.at[:, 4].add(-0.5)  # without a choice of one, equals are drawn equally often
    drawn_B = jax.jit(sampling.draw)(logits_BV, keys_for(40))
    np.testing.assert_array_equal(drawn_B, jnp.argmax(logits_BV, axis=-1))


def test_top_k_at_any_temperature_keeps_k():
    """Seen to fail with top_k among logits that are all 0 after the division."""
    logits_BV = jnp.broadcast_to(jnp.arange(10.0), (200, 10))
    assert set(np.asarray(Sampling(1e38, top_k=3).draw(logits_BV, keys_for(200)))) == {7, 8, 9}
    assert set(np.asarray(Sampling(1e39, top_k=3).draw(logits_BV, keys_for(200)))) == {7, 8, 9}
    assert set(np.asarray(Sampling(top_k=3).draw(0 * logits_BV, keys_for(200)))) == {0, 1, 2}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0), Sampling(top_k=2), Sampling(top_p=0.5)], ids=str)
def test_logits_that_are_not_finite_give_no_color(sampling):
    """A single NaN or infinity among them; the other images are drawn as usual. Seen to fail with color 0."""
    logits_BV = jnp.zeros((4, 6)).at[:, 3].set(5).at[0, 5].set(jnp.nan).at[1, 2].set(jnp.inf).at[2].set(-jnp.inf)
    drawn_B = sampling.draw(logits_BV, keys_for(4))
    assert drawn_B[:3].tolist() == [decode.NOT_FINITE] * 3 and 0 <= drawn_B[3] < 6


def test_a_split_prefill_gives_the_same_tokens(python):
    """Completions on fsdp, tensor and context axes, drawn and greedy, from 0, 7 and 40 given pixels, equal those of one
    device.

    Seen to fail with the logits taken at the end of the padded prefill.
    """
    python("split_prefill.py")
