"""Sampling pixel by pixel with cached keys and values, from nothing or from the first pixels of images.

B batch, T tokens of an image, P given tokens, S cached tokens, N heads, H head dim, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from igpt_jax.model.attention import attention, granule_for
from igpt_jax.model.image_gpt import ImageGPT, Model
from igpt_jax.model.layers import Block
from igpt_jax.parallel.sharding import constrain

# A step reads its whole cache, whose length is fixed when the loop is compiled. With one cache for all T positions, an
# early step would read mostly positions that are not written yet. So the loop runs in segments, and the cache grows
# before each: with S segments, a step reads about (1 + 1 / S) / 2 of a full cache on average. Each segment compiles as
# a loop of its own, so more of them take longer to compile for little gain.
SEGMENT, SEGMENTS = 64, 4  # minimum tokens of a segment; maximum number of segments
NOT_FINITE = -1  # drawn instead of a color if the logits are NaN or infinite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a color is drawn from the logits: top-k, then temperature, then top-p."""
    temperature: float | jax.Array = 1.0  # 0, or too small a number for float32: always the most likely color
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def draw(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """Colors [B] int32, each drawn with the image's own key; NOT_FINITE if the largest logit is not finite."""
        logits_BV = logits_BV.astype(jnp.float32)
        largest_B1 = logits_BV.max(axis=-1, keepdims=True)  # NaN where any logit is
        smallest, largest = (float(getattr(jnp.finfo(jnp.float32), name)) for name in ("tiny", "max"))
        given = self.temperature if isinstance(self.temperature, jax.Array) else min(self.temperature, largest)
        temperature = jnp.float32(given)  # an array, so that one compiled program serves any temperature
        scaled_BV = (logits_BV - largest_B1) / jnp.clip(temperature, smallest, largest)  # at most 0
        if 0 < self.top_k < logits_BV.shape[-1] or self.top_p < 1:
            scaled_BV = jnp.where(self._kept(logits_BV, scaled_BV), scaled_BV, -jnp.inf)
        drawn_B = jnp.where(temperature < smallest, jnp.argmax(logits_BV, axis=-1),
                            jax.vmap(jax.random.categorical)(keys_B, scaled_BV))
        return jnp.where(jnp.isfinite(largest_B1[:, 0]), drawn_B, NOT_FINITE).astype(jnp.int32)

    def _kept(self, logits_BV: jax.Array, scaled_BV: jax.Array) -> jax.Array:
        """The colors that can be drawn, bool [B, V]: at most `top_k`, and always the most likely one."""
        # Ranks decide, not values: equal logits are frequent in bfloat16, and a threshold would keep all of them. Of
        # equal logits the first ranks first.
        order_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True)
        sorted_BV, rank_V = jnp.take_along_axis(scaled_BV, order_BV, axis=-1), jnp.arange(logits_BV.shape[-1])
        kept_BV = rank_V < (self.top_k or logits_BV.shape[-1])
        shares_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
        # A color stays if the colors before it hold less than `top_p`. So the color that crosses the threshold stays
        # too: of the shares 0.5, 0.3 and 0.2, top_p = 0.6 keeps two.
        kept_BV &= (jnp.cumsum(shares_BV, axis=-1) - shares_BV < self.top_p) | (rank_V == 0)
        # argsort of a permutation is its inverse: it takes the flags from ranks back to colors.
        return jnp.take_along_axis(kept_BV, jnp.argsort(order_BV, axis=-1), axis=-1)


def generate(model: Model, params: dict[str, Any], given_BP: jax.Array, keys_B: jax.Array,
             sampling: Sampling, cache_dtype: Any = None) -> jax.Array:
    """Completes images in raster order.

    Args:
      model, params: the model.
      given_BP: the first P tokens, int32, 0 <= P <= T; P = 0 samples from nothing.
      keys_B: one PRNG key per image. An image depends on its own key only, not on the other images of the batch.
      sampling: how to draw colors.
      cache_dtype: dtype of the cached keys and values; None: that of `products.Product`.

    Returns:
      int32 [B, T]: the given pixels, then the drawn ones. They are NOT_FINITE where the logits are not finite.
    """
    B, P = given_BP.shape
    T = model.dims.T
    if P == T:
        return given_BP
    if B == 1:
        # A single image is drawn twice. XLA's CPU compiler drops a batch dim of 1 and then copies the whole cache at
        # every step.
        pair = generate(model, params, given_BP.repeat(2, axis=0), keys_B.repeat(2), sampling, cache_dtype)
        return pair[:1]
    gpt = model.bind(params)
    ends = segments(P, T)
    logits_BV, cache = prefill(gpt, given_BP, cache_dtype or model.cache_dtype)
    draw, step = _draw_and_step(gpt, keys_B, sampling)
    tokens_BT = jnp.pad(given_BP, ((0, 0), (0, T - P)))
    # With P = 2 and T = 6, `prefill` gives the logits of pixel 2. Steps 2, 3 and 4 draw one pixel each and give the
    # logits of pixels 3, 4 and 5. Pixel 5 is drawn at the end.
    for start, end in zip([P, *ends], ends, strict=False):
        cache = [tuple(_with_room(x, end + 1) for x in layer) for layer in cache]
        tokens_BT, logits_BV, cache = jax.lax.fori_loop(start, end, step, (tokens_BT, logits_BV, cache))
    return draw(T - 1, tokens_BT, logits_BV)


# Keys and values of each layer, [B, N, S, H].
Cache = list[tuple[jax.Array, jax.Array]]
Carry = tuple[jax.Array, jax.Array, Cache]  # tokens [B, T]; logits [B, V] of the pixel to draw next; cache


def begin(model: Model, params: dict[str, Any], tokens_BT: jax.Array, given: jax.Array) -> Carry:
    """Reads the first `given` pixels of images. The carry's cache has room for all T positions.

    `given`, less than T, is an array: one compiled program serves any number of given pixels. It reads all T pixels,
    and the causal mask hides those from `given` on. B must be at least 2 (see `generate`).
    """
    logits_BV, cache = prefill(model.bind(params), tokens_BT[:, :-1], model.cache_dtype, given)
    return tokens_BT, logits_BV, cache


def extend(model: Model, params: dict[str, Any], carry: Carry, start: jax.Array, end: jax.Array, keys_B: jax.Array,
           sampling: Sampling) -> Carry:
    """Draws the pixels from `start`, where `begin` or the last `extend` ended, to before `end`, at most T.

    The same keys draw the same pixels as in `generate`.
    """
    _, step = _draw_and_step(model.bind(params), keys_B, sampling)
    return jax.lax.fori_loop(start, end, step, carry)


def _draw_and_step(gpt: ImageGPT, keys_B: jax.Array, sampling: Sampling) -> tuple[Callable, Callable]:
    """draw(position, tokens_BT, logits_BV) -> tokens_BT, and step(position, carry) -> carry: it draws the pixel at
    `position` from the logits of the step before, and computes those of the next pixel."""
    # A step takes the time to read all weights and the cache once. Weights are cast and sliced layer by layer before
    # the loop: inside it, each slice of a stacked array would be a copy. The cache is [B, N, S, H]: keys and values of
    # a head are contiguous, as its products read them.
    blocks = unstacked(gpt)

    def draw(position: jax.Array, tokens_BT: jax.Array, logits_BV: jax.Array) -> jax.Array:
        # Folding in the position, instead of splitting the key at each draw, makes the random numbers of a pixel the
        # same however many pixels are given.
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
        return tokens_BT.at[:, position].set(sampling.draw(logits_BV, keys))

    def step(position: jax.Array, carry: Carry) -> Carry:
        tokens_BT, logits_BV, cache = carry
        tokens_BT = draw(position, tokens_BT, logits_BV)
        following = jnp.minimum(position + 1, gpt.dims.T - 1)  # after the last pixel, the result is not used
        logits_BV, cache = decode_pixel(gpt, blocks, tokens_BT[:, position], following, cache)
        return tokens_BT, logits_BV, cache

    return draw, step


def segments(given: int, tokens: int) -> list[int]:
    """The positions at which the segments end.

    They are multiples of the segment length greater than `given`, and the last position, whose pixel is drawn after the
    loop: no logits follow it.
    """
    length = max(SEGMENT, -(-tokens // SEGMENTS))
    return [*range((given // length + 1) * length, tokens - 1, length), tokens - 1] if given < tokens - 1 else []


def unstacked(gpt: ImageGPT) -> list[Block]:
    """The blocks one by one, their matrices in the compute dtype."""
    graph, stacked = nnx.split(gpt.blocks)

    def layer(index: int) -> Block:
        block = nnx.merge(graph, jax.tree.map(lambda w: w[index], stacked)).scaled()
        return jax.tree.map(lambda w: w.astype(gpt.dtype) if w.ndim > 1 else w, block)

    return [layer(index) for index in range(gpt.dims.L)]


def _with_room(x_BNSH: jax.Array, positions: int) -> jax.Array:
    """The cache, padded with zeros to `positions` positions."""
    return constrain(jnp.pad(x_BNSH, ((0, 0), (0, 0), (0, positions - x_BNSH.shape[2]), (0, 0))), "BNSH")


def prefill(gpt: ImageGPT, given_BP: jax.Array, cache_dtype: Any, last: jax.Array | None = None
            ) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of pixel `last` (None: P), and the keys and values of the first P + 1 positions."""
    P = given_BP.shape[1]
    granule = granule_for(gpt.config.attention)
    # The back-end may need a multiple of several tokens. The causal mask hides the padding from position P.
    # P + 1 positions, because the input is shifted: position 0 sees the start vector, and position P sees pixel P - 1.
    tokens = min(-(-(P + 1) // granule) * granule, gpt.dims.T)
    backend = gpt.config.attention if tokens > 1 else "reference"  # cuDNN may refuse a single key

    def block(block: Block, x_BTD: jax.Array, _):
        q_BTNH, k_BTNH, v_BTNH = block.qkv(x_BTD)
        o_BTNH = attention(q_BTNH, k_BTNH, v_BTNH, causal=True, backend=backend)
        keys_and_values = tuple(x[:, :P + 1].transpose(0, 2, 1, 3).astype(cache_dtype) for x in (k_BTNH, v_BTNH))
        return block.after_attention(x_BTD, o_BTNH), keys_and_values

    x_BTD, (k_LBNSH, v_LBNSH) = gpt.scan_blocks(block, gpt.embed(jnp.pad(given_BP, ((0, 0), (0, tokens - P)))))
    x_B1D = x_BTD[:, P:P + 1] if last is None else jax.lax.dynamic_slice_in_dim(x_BTD, last, 1, axis=1)
    return gpt.logits(x_B1D)[:, 0], list(zip(k_LBNSH, v_LBNSH, strict=True))


def decode_pixel(gpt: ImageGPT, blocks: list[Block], token_B: jax.Array, position: jax.Array,
                 cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits [B, V] at `position`, and the cache with that position written.

    The input is `token_B`, the color of the pixel before. Later positions of the cache are ignored.
    """
    x_B1D, written = gpt.embed_one(token_B, position), []
    for block, kv_BNSH in zip(blocks, cache, strict=True):
        q_B1NH, *new_B1NH = block.qkv(x_B1D)
        written.append(tuple(_written(x, new, position) for x, new in zip(kv_BNSH, new_B1NH, strict=True)))
        x_B1D = block.after_attention(x_B1D, _attend(q_B1NH, *written[-1], position))
    return gpt.logits(x_B1D)[:, 0], written


def _written(x_BNSH: jax.Array, new_B1NH: jax.Array, position: jax.Array) -> jax.Array:
    """The cache with the new keys or values at `position`."""
    return jax.lax.dynamic_update_slice_in_dim(x_BNSH, new_B1NH.transpose(0, 2, 1, 3).astype(x_BNSH.dtype), position, 2)


def _attend(q_B1NH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, position: jax.Array) -> jax.Array:
    """Attention [B, 1, N, H] of the query at `position` over the cache up to there, softmax in float32 or wider.

    Products are those of the wider dtype of query and cache.
    """
    # The whole segment is read and later positions are masked. Their number changes with each step, and a slice of
    # changing length would be another program.
    dtype = jnp.promote_types(q_B1NH.dtype, k_BNSH.dtype)
    q_BNH = q_B1NH[:, 0].astype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    scores_BNS = jnp.einsum("BNH,BNSH->BNS", q_BNH, k_BNSH.astype(dtype), preferred_element_type=wide)
    seen_S = jnp.arange(k_BNSH.shape[2]) <= position
    scores_BNS = jnp.where(seen_S, scores_BNS, jnp.finfo(wide).min)
    weights_BNS = jax.nn.softmax(scores_BNS, axis=-1).astype(dtype)
    return jnp.einsum("BNS,BNSH->BNH", weights_BNS, v_BNSH.astype(dtype)).astype(q_B1NH.dtype)[:, None]
