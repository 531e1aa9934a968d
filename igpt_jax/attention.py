"""Softmax attention: one function, one plain reference, and a back-end per platform.

B batch, T query tokens, S key tokens, N heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from igpt_jax.config import ATTENTION_BACKENDS, nearest
from igpt_jax.sharding import ACTIVATION_RULES, spec_for

BLOCK = 128  # query tokens per block on CPU: 64 to 256 are within noise of each other, 512 is slower
SAVED = "attention"  # the name under which remat policies know what attention gives


def attention(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, causal: bool, backend: str) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, the softmax in float32 or wider.

    Args:
      q_BTNH, k_BSNH, v_BSNH: queries, keys and values of one dtype.
      causal: query t sees keys 0..t only.
      backend: a name from `ATTENTION_BACKENDS`, resolved by `backend_for`.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    if backend == "reference":
        return checkpoint_name(reference(q_BTNH, k_BSNH, v_BSNH, causal=causal), SAVED)
    return _on_each_device(blocked, q_BTNH, k_BSNH, v_BSNH, causal=causal)


def backend_for(backend: str, platform: str) -> str:
    """The back-end that `auto` means on `platform` ('cpu', 'gpu', 'tpu'); any other name stands as it is."""
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention back-end {backend!r} is not known. {nearest(backend, ATTENTION_BACKENDS)}")
    if backend != "auto":
        return backend
    return "blocked" if platform == "cpu" else "reference"


def reference(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, causal: bool) -> jax.Array:
    """The plain formula, for any platform; holds all scores [B, N, T, S] at once."""
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=wide) * q_BTNH.shape[-1] ** -0.5
    if causal:
        T, S = scores_BNTS.shape[-2:]
        scores_BNTS = jnp.where(jnp.tri(T, S, S - T, dtype=bool), scores_BNTS, jnp.finfo(wide).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


def blocked(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, *, causal: bool) -> jax.Array:
    """For CPUs: one sequence and head at a time, so that each product is a plain matrix product in cache.

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


def _on_each_device(kernel, *qkv: jax.Array, causal: bool) -> jax.Array:
    """Runs a kernel on each device's own sequences and heads: the partitioner cannot split its loop by itself."""
    def run(q, k, v):
        return kernel(q, k, v, causal=causal)

    if jax.sharding.get_abstract_mesh().empty:
        return run(*qkv)
    spec: PartitionSpec = spec_for("BTNH", ACTIVATION_RULES)
    return jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(*qkv)
