"""Attention for TPUs: JAX's Pallas splash kernel, which skips the blocks that the mask leaves empty.

B batch, T query tokens, S key tokens, N heads, H head dim.
"""

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding, PartitionSpec

from igpt_jax.model.attention import context
from igpt_jax.model.attention.reference import SAVED
from igpt_jax.parallel import sharding

LANES = 128  # the tokens of a block are a multiple of this
LARGEST_BLOCK = 1024


class CausalMask(splash_attention_mask._ComputableMask):
    """A causal mask for queries in the order of the zigzag exchange (see `context`)."""

    def __init__(self, tokens: int, shards: int):
        super().__init__((tokens, tokens), lambda query, key: query >= key)
        self.q_sequence = np.concatenate([context.positions(device, shards, tokens) for device in range(shards)]
                                         ).astype(np.int32)
        self._key = tokens, shards

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CausalMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash((CausalMask, self._key))


def block_for(tokens: int) -> int:
    """The largest multiple of 128 up to 1,024 that divides `tokens`: large blocks keep the matrix units busy."""
    return max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if tokens % size == 0)


def _kernel(heads: int, tokens: int, shards: int, head_shards: int, causal: bool, interpret: bool):
    # A causal mask covers the whole sequence and is sharded over its queries, since each device has other positions.
    # A full mask is the same for any queries, so it covers one device's and is replicated.
    mask = CausalMask(tokens, shards) if causal else splash_attention_mask.FullMask((tokens // shards, tokens))
    q, kv = block_for(tokens // shards), block_for(tokens)
    # One backward kernel reads queries, keys, values and gradients once and computes the scores once, where two do so
    # twice. It writes a part of the queries' gradient for each block of keys, so that it pays for a single block.
    fused = kv == tokens
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=None if fused else q,
        block_kv_dq=None if fused else kv, use_fused_bwd_kernel=fused)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=head_shards,
        q_seq_shards=shards if causal else 1, residual_checkpoint_name=SAVED, interpret=interpret)


def attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, *, causal: bool, interpret: bool = False
              ) -> jax.Array:
    """See `igpt_jax.model.attention.attention`; the tokens of each device are a multiple of 128.

    Args:
      interpret: run the kernel's program on any platform, slowly, for tests.
    """
    _, T, N, _ = q_BTNH.shape
    mesh = jax.sharding.get_abstract_mesh()
    shards = sharding.context_shards()
    exchanged = causal and shards > 1

    def on_each_device(kernel, q_BTNH, k_BTNH, v_BTNH):
        k_BSNH, v_BSNH = context.gather(k_BTNH, v_BTNH)
        q_BTNH = context.zigzag_exchange(q_BTNH) if exchanged else q_BTNH
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSNH, v_BSNH))
        out_BTNH = jax.vmap(kernel)(q, k, v).transpose(0, 2, 1, 3)
        return context.zigzag_exchange(out_BTNH) if exchanged else out_BTNH

    if mesh.empty:
        return on_each_device(_kernel(N, T, 1, 1, causal, interpret), q_BTNH, k_BTNH, v_BTNH)
    spec = sharding.spec_for("BTNH")
    head_shards = mesh.shape["tensor"]
    kernel = _kernel(N, T, shards, head_shards, causal, interpret)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(spec[2], spec[1] if causal else None)))
    return jax.shard_map(on_each_device, in_specs=(kernel_spec, *(spec,) * 3), out_specs=spec, check_vma=False)(
        kernel, q_BTNH, k_BTNH, v_BTNH)
