"""Softmax attention: one function, one plain reference, and a back-end per platform.

B batch, T query tokens, S key tokens, N heads, H head dim.
"""

import functools
import logging
import re
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from igpt_jax.config import ATTENTION_BACKENDS, UserError, nearest
from igpt_jax.model.attention import context, splash
from igpt_jax.model.attention.blocked import blocked
from igpt_jax.model.attention.reference import SAVED, reference
from igpt_jax.parallel import sharding

__all__ = ["NAMES", "attention", "backend_for", "granule_for", "is_saved"]

log = logging.getLogger(__name__)

CUDNN = "cudnn attention"
NAMES = (SAVED, CUDNN)  # names of attention outputs, for remat policies that go by names
PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "blocked": ("cpu", "gpu", "tpu"), "splash": ("tpu",),
             "cudnn": ("gpu",)}


def attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, *, causal: bool, backend: str) -> jax.Array:
    """softmax(q k^T) v, the softmax in float32 or wider; sequences may be split over the context axis.

    Args:
      q_BTNH, k_BTNH, v_BTNH: queries, keys and values of one dtype. The queries are scaled already (`Block.scaled`).
      causal: query t sees keys 0..t only.
      backend: a name from `ATTENTION_BACKENDS`, resolved by `backend_for`.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    if backend == "reference":
        return checkpoint_name(reference(q_BTNH, k_BTNH, v_BTNH, causal=causal), SAVED)
    if backend == "splash":
        return splash.attention(q_BTNH, k_BTNH, v_BTNH, causal=causal)
    if causal and sharding.context_shards() > 1:
        kernel = context.causal
    else:
        kernel = functools.partial({"blocked": blocked, "cudnn": _cudnn}[backend], causal=causal)

    def on_each_device(q, k, v):
        return kernel(q, *context.gather(k, v))

    if jax.sharding.get_abstract_mesh().empty:
        return on_each_device(q_BTNH, k_BTNH, v_BTNH)
    # XLA's partitioner cannot split a kernel's loop, so each device runs the kernel on its own sequences and heads.
    spec = sharding.spec_for("BTNH")
    return jax.shard_map(on_each_device, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q_BTNH, k_BTNH, v_BTNH)


def _cudnn(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, causal: bool) -> jax.Array:
    out = jax.nn.dot_product_attention(q_BTNH, k_BSNH, v_BSNH, scale=1.0, is_causal=causal, implementation="cudnn")
    return checkpoint_name(out, CUDNN)


def is_saved(primitive: Any, *avals: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: saves the outputs of attention, and the row sums that its backward pass needs."""
    # JAX names neither in its cuDNN kernel. With only our name on the output, the backward pass would run the kernel
    # again for the row sums, so all results of the kernel are saved.
    return primitive.name.startswith("dot_product_attention_fwd") or _by_name(primitive, *avals, **params)


_by_name = jax.checkpoint_policies.save_only_these_names(SAVED)


def backend_for(backend: str, platform: str, precision: str, tokens: int, head_dim: int, context: int = 1,
                capability: str = "") -> str:
    """The back-end that `auto` stands for, or `backend` itself if it can run.

    Args:
      backend: a name from `ATTENTION_BACKENDS`.
      platform: 'cpu', 'gpu' or 'tpu'.
      precision: of the computation; cudnn and splash run in bfloat16 only.
      tokens, head_dim: of the model.
      context: devices that share a sequence.
      capability: of a GPU, such as 9.0; empty: not known.

    Raises:
      UserError: the back-end cannot run here; the message lists those that can.
    """
    reasons = {name: _refusal(name, platform, precision, tokens, head_dim, context, capability) for name in PLATFORMS}
    refused = {name: why for name, why in reasons.items() if why}
    if backend == "auto":
        best = {"cpu": "blocked", "gpu": "cudnn", "tpu": "splash"}[platform]
        if best not in refused:
            return best
        chosen = "reference" if context == 1 else "blocked"
        log.warning("attention: %s %s; %s is used instead.", best, refused[best], chosen)
        return chosen
    if backend not in PLATFORMS:
        raise UserError(f"attention back-end {backend!r} is not known. {nearest(backend, ATTENTION_BACKENDS)}")
    if backend in refused:
        choices = ["auto", *(name for name in PLATFORMS if name not in refused)]
        raise UserError(f"attention={backend} {refused[backend]}. Choose one of: {', '.join(choices)}.")
    return backend


def _refusal(backend: str, platform: str, precision: str, tokens: int, head_dim: int, context: int, capability: str
             ) -> str | None:
    """Why a back-end cannot run; None if it can."""
    if platform not in PLATFORMS[backend]:
        return f"does not run on {platform}"
    if backend in ("cudnn", "splash") and precision != "bfloat16":
        return f"does not compute in precision={precision}"
    if backend == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"takes heads of 8, 16, ... 128, not of {head_dim}"
    if backend == "cudnn" and capability and not (re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8):
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, not {capability}"
    if backend == "cudnn" and context > 1:
        return f"does not split sequences (mesh.context={context})"
    if backend == "splash" and (tokens // context) % splash.LANES:
        return f"takes multiples of {splash.LANES} tokens on each device, not {tokens // context}"
    return None


def granule_for(backend: str) -> int:
    """The number of tokens of a sequence must be a multiple of this, under the current mesh."""
    shards = sharding.context_shards()
    if backend == "splash":
        return splash.LANES * shards
    return 2 * shards if shards > 1 else 1  # the zigzag exchange splits each shard into two halves
