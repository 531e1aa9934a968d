"""Attention for CPUs, block by block. B batch, T query tokens, S key tokens, N heads, H head dim."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.attention.reference import SAVED

BLOCK = 128  # query tokens per block: 64 to 256 are within noise of each other, 512 is slower


def blocked(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, causal: bool) -> jax.Array:
    """One sequence and head at a time, so that each product is a plain matrix product in cache.

    A block of queries meets only the keys that it may see, which saves half the work. The backward pass recomputes
    the weights from the scores and the saved row sums (FlashAttention, Dao et al. 2022, Algorithm 4).

    Keys come before queries in the scores, and what a product needs the other way round is transposed before the loop:
    XLA's CPU compiler is fast at [M, K] x [K, N] only, and from M = 32 on; at M = 128 it takes twice as long as at
    1,024 with the same work, and a first factor [K, M] six times as long. What a turn of the loop gives stays float32:
    of bfloat16, all that other turns gave would be converted there and back.
    """
    B, T, N, H = q_BTNH.shape
    heads_first = [x.transpose(0, 2, 1, 3).reshape(B * N, -1, H) for x in (q_BTNH, k_BSNH, v_BSNH)]
    return _blocked(*heads_first, causal).reshape(B, N, T, H).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(q, k, v, causal):
    return _blocked_forward(q, k, v, causal)[0]


def _product(a, b):
    """Added up and left in float32 or wider."""
    return jnp.dot(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _scores(k_SH, q_HT, start, end, causal):
    """Scores [S, end - start] of a block of queries, over the S keys that it may see, float32 or wider."""
    S = end if causal else len(k_SH)
    scores_ST = _product(k_SH[:S], q_HT[:, start:end]) * k_SH.shape[1] ** -0.5
    if causal:
        hidden_ST = jnp.arange(S)[:, None] > jnp.arange(start, end)
        scores_ST = jnp.where(hidden_ST, jnp.finfo(scores_ST.dtype).min, scores_ST)
    return scores_ST


def _blocks(tokens):
    return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _turned(x):
    return x.swapaxes(1, 2)


def _blocked_forward(q, k, v, causal):
    def head(arrays):
        q_HT, k_SH, v_HS = arrays
        out, log_sums = [], []
        for start, end in _blocks(q_HT.shape[1]):
            scores_ST = _scores(k_SH, q_HT, start, end, causal)
            largest_T = scores_ST.max(0)
            weights_ST = jnp.exp(scores_ST - largest_T)
            sums_T = weights_ST.sum(0)
            out.append(_product(v_HS[:, :len(scores_ST)], weights_ST.astype(v_HS.dtype)) / sums_T)
            log_sums.append(largest_T + jnp.log(sums_T))
        return jnp.concatenate(out, 1), jnp.concatenate(log_sums)

    out, log_sums = jax.lax.map(head, (_turned(q), k, _turned(v)))
    out, log_sums = checkpoint_name(_turned(out).astype(q.dtype), SAVED), checkpoint_name(log_sums, SAVED)
    return out, (q, k, v, out, log_sums)


def _blocked_backward(causal, saved, d_out):
    q, k, v, out, log_sums = saved
    inner = (d_out.astype(log_sums.dtype) * out).sum(-1)

    def head(arrays):
        q_TH, q_HT, k_SH, k_HS, v_SH, dout_TH, dout_HT, log_sums_T, inner_T = arrays
        dq, dk_SH, dv_SH = [], jnp.zeros(k_SH.shape, inner.dtype), jnp.zeros(v_SH.shape, inner.dtype)
        for start, end in _blocks(len(q_TH)):
            weights_ST = jnp.exp(_scores(k_SH, q_HT, start, end, causal) - log_sums_T[start:end])
            S = len(weights_ST)
            dweights_ST = _product(v_SH[:S], dout_HT[:, start:end])
            dscores_ST = weights_ST * (dweights_ST - inner_T[start:end]) * k_SH.shape[1] ** -0.5
            dscores_ST, weights_ST = dscores_ST.astype(q_TH.dtype), weights_ST.astype(q_TH.dtype)
            dq.append(_product(k_HS[:, :S], dscores_ST))
            dk_SH = dk_SH.at[:S].add(_product(dscores_ST, q_TH[start:end]))
            dv_SH = dv_SH.at[:S].add(_product(weights_ST, dout_TH[start:end]))
        return jnp.concatenate(dq, 1), dk_SH, dv_SH

    dq, dk, dv = jax.lax.map(head, (q, _turned(q), k, _turned(k), v, d_out, _turned(d_out), log_sums, inner))
    return _turned(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_blocked.defvjp(_blocked_forward, _blocked_backward)
