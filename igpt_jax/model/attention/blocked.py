"""Blocked attention for CPUs. B batch, T query tokens, S key tokens, N heads, H head dim."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.model.attention.reference import SAVED

BLOCK = 128  # query tokens per block: 64 to 256 are within noise of each other, 512 is slower


def blocked(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, causal: bool) -> jax.Array:
    """Attention of one sequence and head at a time, so that each product is a plain matrix product in cache.

    If causal, a block of queries meets only the keys that it may see, which saves half the work. The backward pass
    recomputes the weights from the scores and the saved row sums (FlashAttention, Dao et al. 2022, Algorithm 4).

    Example: 512 causal tokens are four blocks of queries. They meet 128, 256, 384 and 512 keys, which is 10 of the 16
    pairs of blocks. With 1,024 tokens it is 36 of 64.
    """
    # The layout follows from what XLA's CPU compiler is fast at: [M, K] x [K, N] as the arrays lie, with a large M. At
    # M = 128 a product takes twice as long as at M = 1,024 with the same work; with a first factor [K, M] six times as
    # long. So scores are [S, T], keys before queries: M is then the number of keys, not a block's 128 queries. Arrays
    # that a product needs transposed are transposed once, before the loop over blocks.
    #
    # The loop over heads returns float32. Were its results bfloat16, each turn would convert those of all other turns
    # to float32 and back.
    return _blocked(q_BTNH, k_BSNH, v_BSNH, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(q_BTNH, k_BSNH, v_BSNH, causal):
    return _blocked_forward(q_BTNH, k_BSNH, v_BSNH, causal)[0]


def _by_head(x_BTNH):
    """[B, T, N, H] as [B N, T, H] and as [B N, H, T]; bfloat16 arrives as the integers of its bits."""
    # As bfloat16, XLA's CPU compiler would convert the array to float32 before it is moved, and leave it so.
    bits_BTNH = jax.lax.bitcast_convert_type(x_BTNH, jnp.uint16) if x_BTNH.dtype == jnp.bfloat16 else x_BTNH
    B, T, N, H = x_BTNH.shape
    # Without the barrier, XLA would merge both transposes into one that reads memory in strides of N H.
    x_TH = jax.lax.optimization_barrier(bits_BTNH.transpose(0, 2, 1, 3).reshape(B * N, T, H))
    return x_TH, x_TH.swapaxes(1, 2)


def _together(x_TH, like_BTNH):
    """The inverse of `_by_head` for values: [B N, T, H] as [B, T, N, H], in the dtype of `like_BTNH`."""
    B, T, N, H = like_BTNH.shape
    return x_TH.reshape(B, N, T, H).transpose(0, 2, 1, 3).astype(like_BTNH.dtype)


def _map_heads(head, dtype, moved, *others):
    """`head(*moved, *others)` for each sequence and head in turn; `moved` come from `_by_head` and become `dtype`."""
    def turn(arrays):
        moved, others = arrays
        values = [jax.lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x for x in moved]
        return head(*values, *others)

    # A loop, not a batched product: the scores of one head and block of queries stay in cache, at 1,024 keys 512 KiB.
    # The barrier keeps the bitcast inside the loop. Outside it, the arrays would be float32 after all.
    return jax.lax.map(turn, (jax.lax.optimization_barrier(moved), others))


def _product(a, b):
    """a b, accumulated and returned in float32 or wider."""
    return jnp.dot(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _add_to_first(total_SH, part_SH):
    """Adds `part_SH` to the first rows of `total_SH`."""
    # All rows are added without `.at[:]`, which scatters with an empty index: jaxlib 0.11.2 segfaults over one inside
    # `shard_map`.
    S = len(part_SH)
    return total_SH + part_SH if S == len(total_SH) else total_SH.at[:S].add(part_SH)


def _scores(k_SH, q_HT, start, end, causal):
    """Scores [S, end - start] of queries `start` to `end` over the S keys that they may see, float32 or wider."""
    S = end if causal else len(k_SH)
    scores_ST = _product(k_SH[:S], q_HT[:, start:end])
    if causal:
        hidden_ST = jnp.arange(S)[:, None] > jnp.arange(start, end)
        scores_ST = jnp.where(hidden_ST, jnp.finfo(scores_ST.dtype).min, scores_ST)
    return scores_ST


def _blocks(tokens):
    return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _blocked_forward(q_BTNH, k_BSNH, v_BSNH, causal):
    def head(q_HT, k_SH, v_HS):
        out, log_sums = [], []
        for start, end in _blocks(q_HT.shape[1]):
            scores_ST = _scores(k_SH, q_HT, start, end, causal)
            largest_T = scores_ST.max(0)
            weights_ST = jnp.exp(scores_ST - largest_T)
            sums_T = weights_ST.sum(0)
            out.append(_product(v_HS[:, :len(scores_ST)], weights_ST.astype(v_HS.dtype)) / sums_T)
            log_sums.append(largest_T + jnp.log(sums_T))  # the backward pass needs this alone to redo the softmax
        return jnp.concatenate(out, 1), jnp.concatenate(log_sums)

    (_, q_HT), (k_SH, _), (_, v_HS) = map(_by_head, (q_BTNH, k_BSNH, v_BSNH))
    out_HT, log_sums = _map_heads(head, q_BTNH.dtype, (q_HT, k_SH, v_HS))
    out_BTNH = checkpoint_name(_together(out_HT.swapaxes(1, 2), q_BTNH), SAVED)
    return out_BTNH, (q_BTNH, k_BSNH, v_BSNH, out_BTNH, checkpoint_name(log_sums, SAVED))


def _blocked_backward(causal, saved, dout_BTNH):
    q_BTNH, k_BSNH, v_BSNH, out_BTNH, log_sums = saved
    # The gradient of a softmax: dscores = weights (dweights - inner), where inner = sum over keys of weights dweights,
    # which equals the inner product of the output and its gradient.
    inner_BTN = (dout_BTNH.astype(log_sums.dtype) * out_BTNH).sum(-1)
    inner = inner_BTN.swapaxes(1, 2).reshape(log_sums.shape)

    def head(q_TH, q_HT, k_SH, k_HS, v_SH, dout_TH, dout_HT, log_sums_T, inner_T):
        dq, dk_SH, dv_SH = [], jnp.zeros(k_SH.shape, inner.dtype), jnp.zeros(v_SH.shape, inner.dtype)
        for start, end in _blocks(len(q_TH)):
            # exp(score - log of the sum of exp(scores)) is the softmax's weight, so neither maximum nor sum is computed
            # again.
            weights_ST = jnp.exp(_scores(k_SH, q_HT, start, end, causal) - log_sums_T[start:end])
            S = len(weights_ST)
            dweights_ST = _product(v_SH[:S], dout_HT[:, start:end])
            dscores_ST = weights_ST * (dweights_ST - inner_T[start:end])
            dscores_ST, weights_ST = dscores_ST.astype(q_TH.dtype), weights_ST.astype(q_TH.dtype)
            # A block of queries is complete after its turn. Keys meet several blocks, so their gradients add up over
            # the loop.
            dq.append(_product(k_HS[:, :S], dscores_ST))
            dk_SH = _add_to_first(dk_SH, _product(dscores_ST, q_TH[start:end]))
            dv_SH = _add_to_first(dv_SH, _product(weights_ST, dout_TH[start:end]))
        return jnp.concatenate(dq, 1), dk_SH, dv_SH

    moved = (*_by_head(q_BTNH), *_by_head(k_BSNH), _by_head(v_BSNH)[0], *_by_head(dout_BTNH))
    dq_HT, dk_SH, dv_SH = _map_heads(head, q_BTNH.dtype, moved, log_sums, inner)
    return _together(dq_HT.swapaxes(1, 2), q_BTNH), _together(dk_SH, k_BSNH), _together(dv_SH, v_BSNH)


_blocked.defvjp(_blocked_forward, _blocked_backward)
