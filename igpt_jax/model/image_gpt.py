"""Image GPT as OpenAI released it: a transformer over pixels in raster order, causal or, like BERT, not.

Sources: "paper" is Chen et al. 2020, "Generative Pretraining from Pixels"; the released code is the authority on
the norm (RMS-style, gain only), the activation (x sigmoid(1.702 x)), the start vector and the absence of biases.

B batch, T tokens (pixels x channels), S key tokens, D embed, N heads, H head dim, F mlp hidden, V vocabulary, L layers,
K classes; Y rows, X columns, C channels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from igpt_jax.config import MeshConfig, ModelConfig, PretrainConfig, precision_on
from igpt_jax.model.attention import NAMES, attention, backend_for, is_saved
from igpt_jax.model.dims import Dims
from igpt_jax.model.layers import Block, dropout, norm, pool, read_out
from igpt_jax.model.objectives import Autoregressive, Objective, objective_of
from igpt_jax.model.parametrization import (
    branch_multiplier,
    head_multiplier,
    position_tables,
    standard_deviations,
)
from igpt_jax.model.products import Product, product_for
from igpt_jax.parallel import compiler_options, sharding
from igpt_jax.parallel.sharding import constrain, gather_weight

_POLICIES = jax.checkpoint_policies
_to_host = _POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=list(NAMES), offload_src="device",
    offload_dst="pinned_host")


def _offload(primitive: Any, *avals: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint`: attention's outputs go to the host's memory, and its row sums stay.

    Row sums are H times smaller, and libtpu 0.0.51 fails to copy those of 32 heads of 9,216 tokens.
    """
    row_sums = primitive.name == "name" and params["name"] in NAMES and avals[0].ndim < 4
    return row_sums or _to_host(primitive, *avals, **params)


REMAT_POLICIES: Mapping[str, Callable] = {  # activations of a block that the forward pass saves, besides its input
    "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, is_saved),
    "attention": is_saved,
    "offload": _offload,
    "full": _POLICIES.nothing_saveable,
}


class ImageGPT(nnx.Module):
    """The whole model. The letters at the end of a parameter's name are its dims (see `sharding`)."""

    def __init__(self, config: ModelConfig, dims: Dims, causal: bool, key: jax.Array, dtype: Any, parameter_dtype: Any,
                 product: Product, class_layer: int = -1):
        deviations = standard_deviations(config, dims)
        keys = iter(jax.random.split(key, len(deviations)))

        def make(name: str, stacked: str = "") -> jax.Array:
            shape = tuple(getattr(dims, letter) for letter in stacked + name.rsplit("_", 1)[-1])
            if name in deviations:
                return deviations[name] * jax.random.normal(next(keys), shape, parameter_dtype)
            return (jnp.zeros if "head" in name else jnp.ones)(shape, parameter_dtype)

        self.token_embed_VD = nnx.Param(make("token_embed_VD"))
        if causal:
            self.start_D = nnx.Param(make("start_D"))
        for name in position_tables(config):
            setattr(self, name, nnx.Param(make(name)))
        self.blocks = Block(dims, lambda name: make(name, stacked="L"), config.dropout, product,
                            branch_multiplier(config))
        self.final_norm_D = nnx.Param(make("final_norm_D"))
        self.head_VD = nnx.Param(make("head_VD"))
        if dims.K:
            self.class_head_KD = nnx.Param(make("class_head_KD"))
        self.config, self.dims, self.causal, self.dtype, self.class_layer = config, dims, causal, dtype, class_layer
        self.unroll = config.unroll or (dims.L if dims.L <= product.unrolled else 1)

    def embed(self, tokens_BT: jax.Array, hidden_BT: jax.Array | None = None) -> jax.Array:
        """The input of the first block, [B, T, D]: at each position a color plus the position's own embedding.

        In a causal model the color at t is that of pixel t - 1, and the start vector at 0. In other models it is that
        of pixel t, and zero for hidden pixels (released code).
        """
        T = tokens_BT.shape[1]
        if self.causal:
            tokens_BT = jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)))
        colors_BTD = constrain(self._table("token_embed_VD")[constrain(tokens_BT, "BT")], "BTD")
        if self.causal:
            colors_BTD = jnp.where(jnp.arange(T)[:, None] == 0, self._table("start_D"), colors_BTD)
        elif hidden_BT is not None:
            colors_BTD = jnp.where(hidden_BT[..., None], 0, colors_BTD)
        return constrain((colors_BTD + self._positions(T)).astype(self.dtype), "BTD")

    def embed_one(self, token_B: jax.Array, position: jax.Array) -> jax.Array:
        """The input [B, 1, D] of a causal model at `position` >= 1; `token_B` is the color of the pixel before it."""
        x_BD = self._table("token_embed_VD")[token_B] + self._position(position)
        return constrain(x_BD[:, None].astype(self.dtype), "BTD")

    def _positions(self, count: int) -> jax.Array:
        """The embeddings of the first positions, [count, D]."""
        if not self.dims.factored:
            return self._table("position_embed_TD", count)
        row_YD, column_XD, channel_CD = map(self._table, position_tables(self.config))
        sum_YXCD = row_YD[:, None, None] + column_XD[:, None] + channel_CD
        return sum_YXCD.reshape(self.dims.T, self.dims.D)[:count]

    def _position(self, index: jax.Array) -> jax.Array:
        """The embedding of one position, [D]."""
        if not self.dims.factored:
            return self._table("position_embed_TD")[index]
        row_YD, column_XD, channel_CD = map(self._table, position_tables(self.config))
        (row, within), channels = jnp.divmod(index, self.dims.row), self.dims.C
        return row_YD[row] + column_XD[within // channels] + channel_CD[within % channels]

    def _table(self, name: str, rows: int | None = None) -> jax.Array:
        """The first `rows` of an embedding table (None: all), sharded like an activation."""
        # Gathering from a sharded table would reshard the activations. The table stays in the parameters' dtype: its
        # gradient sums over every pixel of a color, where bfloat16 would lose most.
        return constrain(getattr(self, name)[...][:rows], name.rsplit("_", 1)[-1])

    def scan_blocks(self, body: Callable[[Block, Any, Any], tuple[Any, Any]], carry: Any, extra: Any = None,
                    count: int | None = None) -> Any:
        """Runs `body(block, carry, extra of that layer) -> (carry, out)` over the first `count` of the stacked blocks
        (None: all). Their queries are scaled."""
        graph, stacked = nnx.split(self.blocks)
        if count is not None:
            stacked, extra = jax.tree.map(lambda x: x[:count], (stacked, extra))

        def step(carry, layer):
            return body(nnx.merge(graph, layer[0]).scaled(), carry, layer[1])

        if self.config.remat != "none":
            # With one block per turn of the loop, XLA cannot merge the recomputation with the forward pass. With
            # several blocks it could, and would then save the activations after all: `prevent_cse` forbids it.
            step = jax.checkpoint(step, prevent_cse=self.unroll > 1, policy=REMAT_POLICIES[self.config.remat])
        return jax.lax.scan(step, carry, (stacked, extra), unroll=self.unroll)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 or wider: the final norm and the untied head."""
        head_VD = gather_weight(self.head_VD[...], "head_VD", self.dtype)
        # The multiplier goes into the gain: it has D elements, and norms compute in float32.
        gain_D, multiplier = self.final_norm_D[...], head_multiplier(self.config)
        return constrain(read_out(norm(x_BTD, gain_D if multiplier == 1 else multiplier * gain_D), head_VD), "BTV")

    def stream(self, tokens_BT: jax.Array, key: jax.Array | None = None, hidden_BT: jax.Array | None = None,
               read: Callable[[jax.Array, jax.Array], Any] = lambda x_BTD, gain_D: None, count: int | None = None
               ) -> tuple[jax.Array, Any]:
        """The residual stream [B, T, D] after the last block, and the results of `read` before each block, [L, ...].

        Args:
          tokens_BT: int, in raster order.
          key: for dropout; None: no dropout.
          hidden_BT: pixels whose colors are zeroed in a model that is not causal; None: none.
          read: takes the stream before a block and the gain of that block's first norm.
          count: blocks to run, from the first; None: all.
        """
        keys_L = None if key is None else jax.random.split(key, self.dims.L + 1)

        def block(block: Block, x_BTD: jax.Array, key: jax.Array | None):
            o_BTNH = attention(*block.qkv(x_BTD), causal=self.causal, backend=self.config.attention)
            return block.after_attention(x_BTD, o_BTNH, key), read(x_BTD, block.attention_norm_D[...])

        x_BTD = self.embed(tokens_BT, hidden_BT)
        if keys_L is not None:
            x_BTD, keys_L = dropout(x_BTD, self.config.dropout, keys_L[0]), keys_L[1:]
        return self.scan_blocks(block, x_BTD, keys_L, count)

    def __call__(self, tokens_BT: jax.Array, key: jax.Array | None = None, hidden_BT: jax.Array | None = None
                 ) -> jax.Array:
        """Logits [B, T, V] of pixel t at position t: from the pixels before it, or, if the model is not causal, from
        all that are not hidden. Arguments as of `stream`."""
        return self.outputs(tokens_BT, key, hidden_BT)[0]

    def outputs(self, tokens_BT: jax.Array, key: jax.Array | None = None, hidden_BT: jax.Array | None = None
                ) -> tuple[jax.Array, jax.Array | None]:
        """Logits [B, T, V] of the pixels and [B, K] of the classes (None without a class head).

        Arguments are those of `stream`. The class head reads the mean over positions of the normalized stream at
        `class_layer` (paper, Section 2.3: after the last block).
        """
        layer = self.class_layer % (self.dims.L + 1)  # -1 is the last
        if not self.dims.K or layer == self.dims.L:
            x_BTD, _ = self.stream(tokens_BT, key, hidden_BT)
            feature_BD = pool(x_BTD, self.final_norm_D[...])
        else:
            x_BTD, features_LBD = self.stream(tokens_BT, key, hidden_BT, read=pool)
            feature_BD = features_LBD[layer]
        if not self.dims.K:
            return self.logits(x_BTD), None
        multiplier = head_multiplier(self.config)
        feature_BD = feature_BD if multiplier == 1 else multiplier * feature_BD
        return self.logits(x_BTD), feature_BD @ constrain(self.class_head_KD[...], "KD").T


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of the parameters and of computation."""
    parameters: Any
    compute: Any

    @classmethod
    def of(cls, name: str) -> "Precision":
        return cls(parameters=jnp.dtype("float64" if name == "float64" else "float32"), compute=jnp.dtype(name))


class Model:
    """ImageGPT as pure functions of a plain dict of arrays. All other code uses this, not the module."""

    def __init__(self, config: ModelConfig, vocabulary: int, image_size: int, precision: str,
                 mesh: Mesh | None = None, objective: Objective | None = None, classes: int = 0,
                 class_layer: int = -1, options: str = "", reduce_dtype: str = "float32", channels: int = 1):
        """
        Args:
          config: sizes and choices. Attention `auto` becomes the back-end of the mesh's platform.
          vocabulary: number of different tokens.
          image_size: height and width, pixels.
          precision: a name from `config.PRECISIONS`, or auto.
          mesh: devices to run on; None: one device of the default platform.
          objective: decides whether attention is causal; None: autoregressive.
          classes: outputs of the class head; 0: no class head.
          class_layer: layer of the stream that the class head reads, 0 (the embedding) to L; -1: the last.
          options: `compiler_options` of the config. `self.compiler_options` are those to compile this model with.
          reduce_dtype: in which gradients are summed over devices; see `products.Product`.
          channels: tokens per pixel.

        Raises:
          UserError: the heads or tokens do not divide over the mesh, the attention back-end cannot run there, or the
            compiler refuses an option.
        """
        self.dims = Dims.of(config, vocabulary, image_size, classes, channels)
        self.objective, self._class_layer = objective or Autoregressive(), class_layer
        self.causal = self.objective.causal
        mesh = mesh or sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        sharding.check_model(self.dims.N, self.dims.T, mesh)
        device = mesh.devices.flat[0]
        precision = precision_on(precision, device.platform)
        self.precision = Precision.of(precision)
        backend = backend_for(config.attention, device.platform, precision, self.dims.T, self.dims.H,
                              mesh.shape[sharding.CONTEXT], getattr(device, "compute_capability", ""))
        self.compiler_options = compiler_options.resolve(mesh, options)
        self._product = product_for(device, precision, reduce_dtype)
        self.cache_dtype = self._product.cache_dtype or self.precision.compute
        self.config = dataclasses.replace(config, attention=backend)
        self._graph = nnx.split(jax.eval_shape(lambda: self._build(jax.random.key(0))))[0]

    @classmethod
    def of(cls, config: PretrainConfig, vocabulary: int, image_size: int, mesh: Mesh, classes: int = 0,
           precision: str = "", attention: str = "", options: str | None = None) -> "Model":
        """The model that a training job's config describes; the last three arguments override the config's."""
        sizes = dataclasses.replace(config.model, attention=attention) if attention else config.model
        class_layer = config.model.class_layer if config.finetuning else -1
        return cls(sizes, vocabulary, image_size, precision or config.precision, mesh, objective_of(config), classes,
                   class_layer, config.compiler_options if options is None else options,
                   config.mesh.reduce_dtype, config.channels)

    def _build(self, key: jax.Array) -> ImageGPT:
        return ImageGPT(self.config, self.dims, self.causal, key, self.precision.compute, self.precision.parameters,
                        self._product, self._class_layer)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters. Jitted with `out_shardings`, each device makes only its own shards."""
        return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

    def abstract_parameters(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters, without computing any."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def bind(self, params: dict[str, Any]) -> ImageGPT:
        """The module with these parameters, for use inside a jitted function."""
        return nnx.merge(self._graph, params)

    def logits(self, params: dict[str, Any], tokens_BT: jax.Array, key: jax.Array | None = None,
               hidden_BT: jax.Array | None = None) -> jax.Array:
        """See `ImageGPT.__call__`."""
        return self.bind(params)(tokens_BT, key, hidden_BT)

    def outputs(self, params: dict[str, Any], tokens_BT: jax.Array, key: jax.Array | None = None,
                hidden_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """See `ImageGPT.outputs`."""
        return self.bind(params).outputs(tokens_BT, key, hidden_BT)
