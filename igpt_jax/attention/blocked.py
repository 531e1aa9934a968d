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
    """
    B, T, N, H = q_BTNH.shape
    heads_first = [x.transpose(0, 2, 1, 3).reshape(B * N, -1, H) for x in (q_BTNH, k_BSNH, v_BSNH)]
    return _blocked(*heads_first, causal).reshape(B, N, T, H).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(q, k, v, causal):
    return _blocked_forward(q, k, v, causal)[0]


def _scores(q_TH, k_SH, start, end, causal):
    """Scores [end - start, S] of a block of queries, over the S keys that it may see, float32 or wider."""
    wide = jnp.promote_types(q_TH.dtype, jnp.float32)
    S = end if causal else len(k_SH)
    scores_TS = jnp.dot(q_TH[start:end], k_SH[:S].T, preferred_element_type=wide) * q_TH.shape[1] ** -0.5
    if causal:
        scores_TS = jnp.where(jnp.tri(end - start, S, start, dtype=bool), scores_TS, jnp.finfo(wide).min)
    return scores_TS


def _blocks(tokens):
    return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _blocked_forward(q, k, v, causal):
    def head(qkv):
        q_TH, k_SH, v_SH = qkv
        out, log_sums = [], []
        for start, end in _blocks(len(q_TH)):
            scores_TS = _scores(q_TH, k_SH, start, end, causal)
            weights_TS = jnp.exp(scores_TS - scores_TS.max(-1, keepdims=True))
            sums_T1 = weights_TS.sum(-1, keepdims=True)
            out.append(jnp.dot(weights_TS.astype(v_SH.dtype), v_SH[:scores_TS.shape[1]]) / sums_T1)
            log_sums.append(scores_TS.max(-1, keepdims=True) + jnp.log(sums_T1))
        return jnp.concatenate(out).astype(q_TH.dtype), jnp.concatenate(log_sums)

    out, log_sums = (checkpoint_name(x, SAVED) for x in jax.lax.map(head, (q, k, v)))
    return out, (q, k, v, out, log_sums)


def _blocked_backward(causal, saved, d_out):
    def head(arrays):
        q_TH, k_SH, v_SH, out_TH, log_sums_T1, dout_TH = arrays
        wide = log_sums_T1.dtype
        dq, dk_SH, dv_SH = [], jnp.zeros(k_SH.shape, wide), jnp.zeros(v_SH.shape, wide)
        inner_T1 = (dout_TH * out_TH).astype(wide).sum(-1, keepdims=True)
        for start, end in _blocks(len(q_TH)):
            weights_TS = jnp.exp(_scores(q_TH, k_SH, start, end, causal) - log_sums_T1[start:end])
            S = weights_TS.shape[1]
            dweights_TS = jnp.dot(dout_TH[start:end], v_SH[:S].T, preferred_element_type=wide)
            dscores_TS = weights_TS * (dweights_TS - inner_T1[start:end]) * q_TH.shape[1] ** -0.5
            dscores_TS, weights_TS = dscores_TS.astype(q_TH.dtype), weights_TS.astype(q_TH.dtype)
            dq.append(jnp.dot(dscores_TS, k_SH[:S]))
            dk_SH = dk_SH.at[:S].add(jnp.dot(dscores_TS.T, q_TH[start:end], preferred_element_type=wide))
            dv_SH = dv_SH.at[:S].add(jnp.dot(weights_TS.T, dout_TH[start:end], preferred_element_type=wide))
        return jnp.concatenate(dq), dk_SH.astype(k_SH.dtype), dv_SH.astype(v_SH.dtype)

    return jax.lax.map(head, (*saved, d_out))


_blocked.defvjp(_blocked_forward, _blocked_backward)
