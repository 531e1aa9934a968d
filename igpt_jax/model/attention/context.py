"""Causal attention of sequences that are split over the context axis, with the same work on every device.

Each of C devices holds one shard of a sequence: device c holds halves 2c and 2c + 1 of its 2C halves. Later queries see
more keys, so the last device would have the most work. Therefore device c trades its second half for that of device
C - 1 - c (the zigzag exchange), and then holds halves 2c and 2C - 1 - 2c. A query in half i sees the keys of halves 0
to i, so these two see 2c + 1 + 2C - 2c = 2C + 1 halves of keys, whatever c is. With C = 4:

    device            0      1      2      3
    before        0 1    2 3    4 5    6 7
    after         0 7    2 5    4 3    6 1

Keys and values are gathered, so each device holds whole sequences of them, one layer at a time.

B batch, T query tokens of a device, S key tokens, N heads, H head dim; R blocks of queries, t queries and s keys of a
block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.model.attention.reference import SAVED
from igpt_jax.parallel import sharding

BLOCK = 512  # maximum tokens of a block of queries or keys


def gather(*split_BTNH: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values of whole sequences, gathered from the devices' shards (inside shard_map)."""
    if sharding.context_shards() == 1:
        return split_BTNH
    return tuple(jax.lax.all_gather(x, sharding.CONTEXT, axis=1, tiled=True) for x in split_BTNH)


def zigzag_exchange(x_BTNH: jax.Array) -> jax.Array:
    """Trades second halves with the mirror device; a second call trades them back (inside shard_map)."""
    shards = sharding.context_shards()
    first, second = jnp.split(x_BTNH, 2, axis=1)
    # c and C - 1 - c trade places, so the permutation is its own inverse. First halves stay, which keeps half of the
    # queries off the network.
    # With an odd number of devices the middle one is its own mirror and keeps both halves, which are right for it.
    second = jax.lax.ppermute(second, sharding.CONTEXT, [(c, shards - 1 - c) for c in range(shards)])
    return jnp.concatenate([first, second], axis=1)


def positions(device: int, shards: int, tokens: int) -> np.ndarray:
    """Positions in the sequence of a device's queries after the exchange, int [tokens / shards]."""
    half = tokens // (2 * shards)
    return np.concatenate([np.arange(half) + half * index for index in (2 * device, 2 * (shards - device) - 1)])


def causal(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    """Causal attention of a device's shard of queries over all keys, on any platform (inside shard_map).

    Scores are made block by block and never held whole (FlashAttention, Dao et al. 2022, Algorithms 2 and 4).
    """
    return zigzag_exchange(_flash(zigzag_exchange(q_BTNH), k_BSNH, v_BSNH))


def _schedule(tokens: int, shards: int) -> tuple[int, np.ndarray]:
    """Tokens of a block, and the pairs of blocks that each device computes, int32 [shards, pairs, 3].

    A pair is (row, query, key): the query block's row on its device, and the positions of both blocks in the sequence,
    in blocks. Only pairs with an unmasked score are listed, and every device has the same number of them: one program
    with a loop of fixed length serves all devices, each with its own list.

    Example: four blocks on two devices, after the exchange. Both have five pairs:

        device 0, blocks 0 and 3:   (0, 0, 0)                        (1, 3, 0) (1, 3, 1) (1, 3, 2) (1, 3, 3)
        device 1, blocks 2 and 1:   (0, 2, 0) (0, 2, 1) (0, 2, 2)    (1, 1, 0) (1, 1, 1)
    """
    half = tokens // (2 * shards)
    # A block never crosses from one half into the other, because positions jump there. So its size divides a half.
    block = max(size for size in range(1, min(half, BLOCK) + 1) if half % size == 0)
    pairs = [[(row, query, key) for row, query in enumerate(positions(device, shards, tokens)[::block] // block)
              for key in range(query + 1)] for device in range(shards)]
    return block, np.asarray(pairs, np.int32)


def _scores(q_BNtH, k_BNsH, query, key, wide):
    """Scores [B, N, t, s] of the blocks at positions `query` and `key`, masked where a key lies after its query."""
    t = q_BNtH.shape[2]
    scores = jnp.einsum("BNtH,BNsH->BNts", q_BNtH, k_BNsH, preferred_element_type=wide)
    seen_ts = (query * t + jnp.arange(t))[:, None] >= key * t + jnp.arange(t)
    return jnp.where(seen_ts, scores, jnp.finfo(wide).min)


def _in_blocks(x_BTNH: jax.Array, block: int) -> jax.Array:
    """[R, B, N, t, H]: blocks first, so that the loop indexes them."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T // block, block, N, H).transpose(1, 0, 3, 2, 4)


def _joined(x_RBNtH: jax.Array) -> jax.Array:
    """The inverse of `_in_blocks`, [B, T, N, H]."""
    R, B, N, t, H = x_RBNtH.shape
    return x_RBNtH.transpose(1, 0, 3, 2, 4).reshape(B, R * t, N, H)


def _own_pairs(k_BSNH: jax.Array) -> tuple[int, jax.Array]:
    """Tokens of a block, and this device's pairs [pairs, 3]."""
    # Every device runs this same program. The table of all lists is a constant in it, and the device's number picks
    # one.
    block, pairs = _schedule(k_BSNH.shape[1], sharding.context_shards())
    return block, jnp.asarray(pairs)[jax.lax.axis_index(sharding.CONTEXT)]


# The gradient is written by hand. JAX's own would save the scores and weights of every pair of blocks for the backward
# pass, which are together the whole [T, S] matrix that the blocks exist to avoid.
@jax.custom_vjp
def _flash(q_BTNH, k_BSNH, v_BSNH):
    return _flash_forward(q_BTNH, k_BSNH, v_BSNH)[0]


def _flash_forward(q_BTNH, k_BSNH, v_BSNH):
    block, pairs = _own_pairs(k_BSNH)
    q, k, v = (_in_blocks(x, block) for x in (q_BTNH, k_BSNH, v_BSNH))
    wide = jnp.promote_types(q.dtype, jnp.float32)

    # Online softmax. Per query: the weighted sum of values, the largest score so far, the sum of weights. Where a later
    # block has a larger score, what was summed before it shrinks by exp(old largest - new largest).
    def add_pair(carry, pair):
        sums, tops, totals = carry
        row, query, key = pair
        scores = _scores(q[row], k[key], query, key, wide)
        top = jnp.maximum(tops[row], scores.max(-1, keepdims=True))
        weights, shrink = jnp.exp(scores - top), jnp.exp(tops[row] - top)
        new = jnp.einsum("BNts,BNsH->BNtH", weights.astype(v.dtype), v[key], preferred_element_type=wide)
        return (sums.at[row].set(sums[row] * shrink + new), tops.at[row].set(top),
                totals.at[row].set(totals[row] * shrink + weights.sum(-1, keepdims=True))), None

    start = jnp.zeros(q.shape, wide), *(jnp.full((*q.shape[:-1], 1), x, wide) for x in (jnp.finfo(wide).min, 0))
    (sums, tops, totals), _ = jax.lax.scan(add_pair, start, pairs)
    out_BTNH = checkpoint_name(_joined((sums / totals).astype(q.dtype)), SAVED)
    log_sums = checkpoint_name(tops + jnp.log(totals), SAVED)
    return out_BTNH, (q_BTNH, k_BSNH, v_BSNH, out_BTNH, log_sums)


def _flash_backward(saved, d_out):
    block, pairs = _own_pairs(saved[1])
    q, k, v, out, d_out = (_in_blocks(x, block) for x in (*saved[:4], d_out))
    log_sums = saved[4]
    wide = log_sums.dtype
    # The gradient of a softmax subtracts, per query, the mean of d_weights under the weights. It equals the inner
    # product of the output and its gradient, which needs no scores (Dao et al. 2022, Appendix B.2).
    inner = (d_out * out).astype(wide).sum(-1, keepdims=True)
    einsum = functools.partial(jnp.einsum, preferred_element_type=wide)

    # The weights are recomputed from the scores and the saved logarithm of their sum. This device's gradients of keys
    # and values come from its own queries only; the transpose of `gather` adds up those of all devices.
    def add_pair(carry, pair):
        dq, dk, dv = carry
        row, query, key = pair
        weights = jnp.exp(_scores(q[row], k[key], query, key, wide) - log_sums[row])
        d_weights = einsum("BNtH,BNsH->BNts", d_out[row], v[key])
        d_scores = (weights * (d_weights - inner[row])).astype(q.dtype)
        # A query block meets several key blocks and a key block several query blocks, so all three gradients are sums.
        return (dq.at[row].add(einsum("BNts,BNsH->BNtH", d_scores, k[key])),
                dk.at[key].add(einsum("BNts,BNtH->BNsH", d_scores, q[row])),
                dv.at[key].add(einsum("BNts,BNtH->BNsH", weights.astype(q.dtype), d_out[row]))), None

    gradients, _ = jax.lax.scan(add_pair, tuple(jnp.zeros(x.shape, wide) for x in (q, k, v)), pairs)
    return tuple(_joined(x).astype(d_out.dtype) for x in gradients)


_flash.defvjp(_flash_forward, _flash_backward)
