"""Sampling pixel by pixel with cached keys and values: from nothing, or going on from the first pixels of pictures.

B batch, T tokens of an image, P given tokens, S cached tokens, N heads, H head dim, V palette, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from igpt_jax.attention import attention, granule_for
from igpt_jax.model import Block, ImageGPT, Model
from igpt_jax.sharding import constrain

SEGMENT = 256  # tokens: the loop runs in segments, each reading only the part of the cache that it can have written


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a colour is drawn from the logits: temperature first, then the k most likely, then the share p."""
    temperature: float = 1.0  # 0: always the most likely colour
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def draw(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """Colours [B] int32; each image draws with its own key."""
        if self.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        logits_BV = logits_BV.astype(jnp.float32) / self.temperature
        if 0 < self.top_k < logits_BV.shape[-1]:
            kth_B1 = jax.lax.top_k(logits_BV, self.top_k)[0][:, -1:]
            logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
        if self.top_p < 1:
            sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
            before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) - jax.nn.softmax(sorted_BV)
            least_B1 = jnp.min(jnp.where(before_BV < self.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
            logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def generate(model: Model, params: dict[str, Any], given_BP: jax.Array, keys_B: jax.Array,
             sampling: Sampling) -> jax.Array:
    """Completes images in raster order.

    Args:
      model, params: the model.
      given_BP: int32 palette indices of the first P pixels, 0 <= P <= T; P = 0 samples from nothing.
      keys_B: one PRNG key per image: an image's pixels depend on its own key only, not on the batch around it.
      sampling: how to draw.

    Returns:
      int32 [B, T]: the given pixels and those drawn after them.
    """
    B, P = given_BP.shape
    T = model.dims.T
    if P == T:
        return given_BP
    gpt = model.bind(params)
    logits_BV, cache = _prefill(gpt, given_BP)
    tokens_BT = jnp.pad(given_BP, ((0, 0), (0, T - P)))

    def draw(position, tokens_BT, logits_BV):
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
        return tokens_BT.at[:, position].set(sampling.draw(logits_BV, keys))

    # Pixel `position` is drawn from the logits at hand; fed back in, it gives the logits of the next one.
    start = P
    while start < T - 1:
        end = min(-(-(start + 1) // SEGMENT) * SEGMENT, T - 1)

        def step(position, carry, cached=end + 1):
            tokens_BT, logits_BV, cache = carry
            tokens_BT = draw(position, tokens_BT, logits_BV)
            logits_BV, cache = _decode(gpt, tokens_BT[:, position], position + 1, cache, cached)
            return tokens_BT, logits_BV, cache

        tokens_BT, logits_BV, cache = jax.lax.fori_loop(start, end, step, (tokens_BT, logits_BV, cache))
        start = end
    return draw(T - 1, tokens_BT, logits_BV)


def _prefill(gpt: ImageGPT, given_BP: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Logits [B, V] of pixel P, and the keys and values [L, B, T, N, H] with the first P + 1 positions filled."""
    P = given_BP.shape[1]
    granule = granule_for(gpt.config.attention)
    tokens = min(-(-(P + 1) // granule) * granule, gpt.dims.T)  # what lies after pixel P is not seen by it
    room = (0, gpt.dims.T - tokens)

    def block(block: Block, x_BTD: jax.Array, _):
        q_BTNH, k_BTNH, v_BTNH = block.qkv(x_BTD)
        o_BTNH = attention(q_BTNH, k_BTNH, v_BTNH, causal=True, backend=gpt.config.attention)
        kept = tuple(jnp.pad(x, ((0, 0), room, (0, 0), (0, 0))) for x in (k_BTNH, v_BTNH))
        return block.after_attention(x_BTD, o_BTNH), kept

    x_BTD, cache = gpt.scan_blocks(block, gpt.embed(jnp.pad(given_BP, ((0, 0), (0, tokens - P)))))
    return gpt.logits(x_BTD[:, P:P + 1])[:, 0], tuple(constrain(x, "LBSNH") for x in cache)


def _decode(gpt: ImageGPT, token_B: jax.Array, position: jax.Array, cache: tuple[jax.Array, jax.Array],
            cached: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Logits [B, V] at `position`, whose input is the colour of the pixel before it, and the cache with that position.

    Reads the first `cached` positions of the cache; those after `position` do not count.
    """
    seen_S = jnp.arange(cached) <= position

    def block(block: Block, carry, layer: jax.Array):
        x_B1D, cache = carry
        q_B1NH, *kv = block.qkv(x_B1D)
        cache = tuple(constrain(jax.lax.dynamic_update_slice(whole, new[None], (layer, 0, position, 0, 0)), "LBSNH")
                      for whole, new in zip(cache, kv, strict=True))
        k_BSNH, v_BSNH = (jax.lax.dynamic_index_in_dim(whole[:, :, :cached], layer, keepdims=False) for whole in cache)
        wide = jnp.promote_types(q_B1NH.dtype, jnp.float32)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q_B1NH, k_BSNH, preferred_element_type=wide) * gpt.dims.H ** -0.5
        weights = jax.nn.softmax(jnp.where(seen_S, scores, jnp.finfo(wide).min), axis=-1).astype(v_BSNH.dtype)
        o_B1NH = jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)
        return (block.after_attention(x_B1D, o_B1NH), cache), None

    x_B1D = gpt.embed_one(token_B, position)
    (x_B1D, cache), _ = gpt.scan_blocks(block, (x_B1D, cache), jnp.arange(gpt.dims.L))
    return gpt.logits(x_B1D)[:, 0], cache
