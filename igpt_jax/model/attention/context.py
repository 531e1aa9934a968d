"""Causal attention of sequences that are split over the devices of the context axis, each with the same work.

Device c of C holds chunk c of a sequence, as two halves: 2c and 2c + 1 of 2C. Later queries see more keys, so it trades
its second half for that of device C - 1 - c: it then holds halves 2c and 2C - 1 - 2c, which see 2C + 1 halves of keys
together, whatever c is. Keys and values are gathered; only a layer's own are whole at a time.

B batch, T query tokens of a device, S key tokens, N heads, H head dim; R blocks of queries, t queries of a block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.model.attention.reference import SAVED
from igpt_jax.parallel import sharding

BLOCK = 512  # most tokens of a block of queries or keys


def gather(*split_BTNH: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values of whole sequences, from the parts that the devices hold (inside shard_map)."""
    if sharding.context_shards() == 1:
        return split_BTNH
    return tuple(jax.lax.all_gather(x, sharding.CONTEXT, axis=1, tiled=True) for x in split_BTNH)


def zigzag_exchange(x_BTNH: jax.Array) -> jax.Array:
    """Trades second halves with the mirror device; a second call gives back (inside shard_map)."""
    parts = sharding.context_shards()
    own, other = jnp.split(x_BTNH, 2, axis=1)
    other = jax.lax.ppermute(other, sharding.CONTEXT, [(c, parts - 1 - c) for c in range(parts)])
    return jnp.concatenate([own, other], axis=1)


def positions(device: int, parts: int, tokens: int) -> np.ndarray:
    """Where in the sequence the queries of a device lie after the trade, int32 [tokens / parts]."""
    half = tokens // (2 * parts)
    return np.concatenate([np.arange(half) + half * index for index in (2 * device, 2 * (parts - device) - 1)])


def causal(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    """Causal attention of a device's queries (before the trade) over all keys (inside shard_map).

    Any platform; memory grows with the block, not with S (FlashAttention, Dao et al. 2022, Algorithms 2 and 4).
    """
    return zigzag_exchange(_flash(zigzag_exchange(q_BTNH), k_BSNH, v_BSNH))


def _schedule(tokens: int, parts: int) -> tuple[int, np.ndarray]:
    """Tokens of a block, and the work of each device: int32 [parts, items, 3] of query block, its place, key block."""
    half = tokens // (2 * parts)
    block = max(size for size in range(1, min(half, BLOCK) + 1) if half % size == 0)
    work = [[(row, place, key) for row, place in enumerate(positions(device, parts, tokens)[::block] // block)
             for key in range(place + 1)] for device in range(parts)]
    return block, np.asarray(work, np.int32)


def _scores(q_BNtH, k_BNsH, place, key, wide):
    """Scores [B, N, t, s] of two blocks, masked where a key lies after its query."""
    t = q_BNtH.shape[2]
    scores = jnp.einsum("BNtH,BNsH->BNts", q_BNtH, k_BNsH, preferred_element_type=wide) * q_BNtH.shape[3] ** -0.5
    seen_ts = (place * t + jnp.arange(t))[:, None] >= key * t + jnp.arange(t)
    return jnp.where(seen_ts, scores, jnp.finfo(wide).min)


def _in_blocks(x_BTNH: jax.Array, block: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T // block, block, N, H).transpose(1, 0, 3, 2, 4)


def _joined(x_RBNtH: jax.Array) -> jax.Array:
    R, B, N, t, H = x_RBNtH.shape
    return x_RBNtH.transpose(1, 0, 3, 2, 4).reshape(B, R * t, N, H)


def _work(k_BSNH: jax.Array) -> tuple[int, jax.Array]:
    block, work = _schedule(k_BSNH.shape[1], sharding.context_shards())
    return block, jnp.asarray(work)[jax.lax.axis_index(sharding.CONTEXT)]


@jax.custom_vjp
def _flash(q_BTNH, k_BSNH, v_BSNH):
    return _flash_forward(q_BTNH, k_BSNH, v_BSNH)[0]


def _flash_forward(q_BTNH, k_BSNH, v_BSNH):
    block, work = _work(k_BSNH)
    q, k, v = (_in_blocks(x, block) for x in (q_BTNH, k_BSNH, v_BSNH))
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def item(carry, at):
        sums, tops, totals = carry
        row, place, key = at
        scores = _scores(q[row], k[key], place, key, wide)
        top = jnp.maximum(tops[row], scores.max(-1, keepdims=True))
        weights, shrink = jnp.exp(scores - top), jnp.exp(tops[row] - top)
        new = jnp.einsum("BNts,BNsH->BNtH", weights.astype(v.dtype), v[key], preferred_element_type=wide)
        return (sums.at[row].set(sums[row] * shrink + new), tops.at[row].set(top),
                totals.at[row].set(totals[row] * shrink + weights.sum(-1, keepdims=True))), None

    start = jnp.zeros(q.shape, wide), *(jnp.full((*q.shape[:-1], 1), x, wide) for x in (jnp.finfo(wide).min, 0))
    (sums, tops, totals), _ = jax.lax.scan(item, start, work)
    out_BTNH = checkpoint_name(_joined((sums / totals).astype(q.dtype)), SAVED)
    log_sums = checkpoint_name(tops + jnp.log(totals), SAVED)
    return out_BTNH, (q_BTNH, k_BSNH, v_BSNH, out_BTNH, log_sums)


def _flash_backward(saved, d_out):
    block, work = _work(saved[1])
    q, k, v, out, d_out = (_in_blocks(x, block) for x in (*saved[:4], d_out))
    log_sums = saved[4]
    wide = log_sums.dtype
    inner = (d_out * out).astype(wide).sum(-1, keepdims=True)
    einsum = functools.partial(jnp.einsum, preferred_element_type=wide)

    def item(carry, at):
        dq, dk, dv = carry
        row, place, key = at
        weights = jnp.exp(_scores(q[row], k[key], place, key, wide) - log_sums[row])
        d_weights = einsum("BNtH,BNsH->BNts", d_out[row], v[key])
        d_scores = (weights * (d_weights - inner[row]) * q.shape[-1] ** -0.5).astype(q.dtype)
        return (dq.at[row].add(einsum("BNts,BNsH->BNtH", d_scores, k[key])),
                dk.at[key].add(einsum("BNts,BNtH->BNsH", d_scores, q[row])),
                dv.at[key].add(einsum("BNts,BNtH->BNsH", weights.astype(q.dtype), d_out[row]))), None

    gradients, _ = jax.lax.scan(item, tuple(jnp.zeros(x.shape, wide) for x in (q, k, v)), work)
    return tuple(_joined(x).astype(d_out.dtype) for x in gradients)


_flash.defvjp(_flash_forward, _flash_backward)
