"""Image GPT as OpenAI released it: a transformer over palette indices in raster order, causal or, as BERT, not.

Sources: "paper" is Chen et al. 2020, "Generative Pretraining from Pixels"; the released code is the authority on
the norm (RMS-style, gain only), the activation (x sigmoid(1.702 x)), the start vector and the absence of biases.

B batch, T tokens (pixels), S key tokens, D embed, N heads, H head dim, F mlp hidden, V palette, L layers, K classes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from igpt_jax import sharding
from igpt_jax.attention import NAMES, attention, backend_for, is_saved
from igpt_jax.config import MeshConfig, ModelConfig
from igpt_jax.sharding import constrain, gather_weight

NORM_EPSILON = 1e-5  # inside the root, as released

_POLICIES = jax.checkpoint_policies
REMAT_POLICIES: Mapping[str, Callable] = {  # what the forward pass keeps of each block, besides its input
    "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, is_saved),
    "attention": is_saved,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(NAMES), offload_src="device",
        offload_dst="pinned_host"),
    "full": _POLICIES.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Dims:
    """The sizes of a model, by their letters."""
    L: int
    D: int
    N: int
    H: int
    F: int
    V: int
    T: int
    K: int = 0

    @classmethod
    def of(cls, config: ModelConfig, palette_size: int, image_size: int, classes: int = 0) -> "Dims":
        return cls(L=config.layers, D=config.embed, N=config.heads, H=config.embed // config.heads, F=config.mlp,
                   V=palette_size, T=image_size ** 2, K=classes)

    @property
    def parameter_count(self) -> int:
        """L (12 D^2 + 2 D) + 2 V D + T D + 2 D + K D for an MLP of 4 D: blocks, colours, positions, start and norm,
        classes. A model that is not causal has no start vector: D fewer.
        """
        blocks = self.L * (4 * self.D ** 2 + 2 * self.D * self.F + 2 * self.D)
        return blocks + (2 * self.V + self.T + 2 + self.K) * self.D


def _standard_deviations(init: str, d: Dims) -> dict[str, float]:
    """Standard deviations of the initial weights; norms start at 1 and the head at 0 in both schemes.

    released: the initialisers in OpenAI's code. paper: Section 3.3 refers to Sparse Transformers (Child et al. 2019,
    Section 6): 0.125 / sqrt(fan in), and the last matrix of each residual branch divided by sqrt(2 L) besides.
    """
    if init == "released":
        return {"token_embed_VD": 0.02, "start_D": 0.02, "position_embed_TD": 0.01,
                "query_DNH": d.D ** -0.5, "key_DNH": d.D ** -0.5, "value_DNH": d.D ** -0.5,
                "out_NHD": (d.D * d.L) ** -0.5, "up_DF": 0.02, "down_FD": 0.02}
    narrow, wide, branch = 0.125 * d.D ** -0.5, 0.125 * d.F ** -0.5, (2 * d.L) ** -0.5
    return {"token_embed_VD": narrow, "start_D": narrow, "position_embed_TD": narrow,
            "query_DNH": narrow, "key_DNH": narrow, "value_DNH": narrow, "out_NHD": narrow * branch,
            "up_DF": narrow, "down_FD": wide * branch}


def _wide(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def norm(x_BTD: jax.Array, gain_D: jax.Array) -> jax.Array:
    """gain * x / sqrt(mean(x^2) + 1e-5), computed in float32 or wider; no mean is subtracted (released code)."""
    x = _wide(x_BTD)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    return (x * scale * gain_D).astype(x_BTD.dtype)


@jax.custom_vjp
def activation(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), computed in float32 or wider and rounded once: bfloat16 would make the factor 1.703.

    The backward pass keeps x alone, and computes the sigmoid again.
    """
    wide = _wide(x)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def _activation_backward(x: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    wide = _wide(x)
    share = jax.nn.sigmoid(1.702 * wide)
    return ((d * share * (1 + 1.702 * wide * (1 - share))).astype(x.dtype),)


activation.defvjp(lambda x: (activation(x), x), _activation_backward)


def pool(x_BTD: jax.Array, gain_D: jax.Array | None = None) -> jax.Array:
    """The mean [B, D] over positions of the stream, after the norm of this gain if there is one; float32 or wider."""
    wide_BTD = _wide(x_BTD)
    return (wide_BTD if gain_D is None else norm(wide_BTD, gain_D)).mean(axis=1)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of x and scales the rest up; no effect without a key or rate."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def project(x: jax.Array, weight: jax.Array, contracted: int = 1, rounded_late: bool = False) -> jax.Array:
    """Contracts the last dims of x with the first of the weight, as one plain product of two matrices.

    The same as an einsum over [B, T, ...], which XLA's CPU compiler runs 2.5 times slower in the training step. Where
    sequences are split over devices, B and T stay apart: as one dim they could not be split both.

    Args:
      rounded_late: see `_product_rounded_late`.
    """
    if sharding.context_parts() > 1:
        return jnp.tensordot(x, weight, contracted)
    rows, columns = x.shape[:x.ndim - contracted], weight.shape[contracted:]
    product = _product_rounded_late if rounded_late else jnp.matmul
    return product(x.reshape(math.prod(rows), -1), weight.reshape(-1, math.prod(columns))).reshape(*rows, *columns)


@jax.custom_vjp
def _product_rounded_late(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """a b, and so its gradients: added up in float32 and then rounded to bfloat16, which other compilers do anyhow.

    XLA's CPU compiler has fast products of bfloat16 only with float32 results, and [M, K] x [K, N] as they lie: others
    it makes in float32, at half the speed.
    """
    return _wide_product(a_MK, b_KN).astype(a_MK.dtype)


def _wide_product(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    return jnp.matmul(a_MK, b_KN, preferred_element_type=jnp.float32)


def _product_rounded_late_backward(saved: tuple[jax.Array, jax.Array], d_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    a_MK, b_KN = saved
    return (_wide_product(d_MN, _transposed(b_KN)).astype(a_MK.dtype),
            _wide_product(_transposed(a_MK), d_MN).astype(b_KN.dtype))


def _transposed(x: jax.Array) -> jax.Array:
    """The transpose, as an array of its own: XLA would fold it into the product. Its new dim undoes the column-major
    layout that JAX asks for a transpose, with which the product would be made in float32."""
    return jax.lax.optimization_barrier(x.T[None])[0]


_product_rounded_late.defvjp(lambda a_MK, b_KN: (_product_rounded_late(a_MK, b_KN), (a_MK, b_KN)),
                             _product_rounded_late_backward)


@jax.custom_vjp
def _read_out(n_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Logits [B, T, V] in float32 or wider. Their gradient takes part in products as any other activation's does, in
    the dtype of n: left in float32 it made two float32 products of each step, the slowest on matrix units."""
    wide = jnp.promote_types(n_BTD.dtype, jnp.float32)
    return jnp.einsum("BTD,VD->BTV", n_BTD, head_VD, preferred_element_type=wide)


def _read_out_backward(saved: tuple[jax.Array, jax.Array], d_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
    n_BTD, head_VD = saved
    d_BTV = d_BTV.astype(n_BTD.dtype)
    return jnp.einsum("BTV,VD->BTD", d_BTV, head_VD), jnp.einsum("BTV,BTD->VD", d_BTV, n_BTD)


_read_out.defvjp(lambda n_BTD, head_VD: (_read_out(n_BTD, head_VD), (n_BTD, head_VD)), _read_out_backward)


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)). Holds the stacked weights [L, ...] of all blocks when built."""

    def __init__(self, dims: Dims, make: Callable[[str], jax.Array], dtype: Any, rate: float, rounded_late: bool):
        self.attention_norm_D = nnx.Param(make("attention_norm_D"))
        self.query_DNH = nnx.Param(make("query_DNH"))
        self.key_DNH = nnx.Param(make("key_DNH"))
        self.value_DNH = nnx.Param(make("value_DNH"))
        self.out_NHD = nnx.Param(make("out_NHD"))
        self.mlp_norm_D = nnx.Param(make("mlp_norm_D"))
        self.up_DF = nnx.Param(make("up_DF"))
        self.down_FD = nnx.Param(make("down_FD"))
        self.dtype, self.rate, self.rounded_late = dtype, rate, rounded_late

    def _weight(self, name: str) -> jax.Array:
        return gather_weight(getattr(self, name)[...], name.rsplit("_", 1)[-1], self.dtype)

    def _project(self, x: jax.Array, name: str, contracted: int = 1) -> jax.Array:
        return project(x, self._weight(name), contracted, self.rounded_late)

    def qkv(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, N, H] of the normalised residual stream."""
        n_BTD = norm(x_BTD, self.attention_norm_D[...])
        return tuple(constrain(self._project(n_BTD, name), "BTNH")
                     for name in ("query_DNH", "key_DNH", "value_DNH"))

    def after_attention(self, x_BTD: jax.Array, o_BTNH: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The rest of the block: projects the heads back, adds them, and adds the MLP."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        out_BTD = self._project(o_BTNH, "out_NHD", contracted=2)
        x_BTD = constrain(x_BTD + dropout(out_BTD, self.rate, attention_key), "BTD")
        hidden_BTF = self._project(norm(x_BTD, self.mlp_norm_D[...]), "up_DF")
        hidden_BTF = constrain(activation(hidden_BTF), "BTF")
        out_BTD = self._project(hidden_BTF, "down_FD")
        return constrain(x_BTD + dropout(out_BTD, self.rate, mlp_key), "BTD")


class ImageGPT(nnx.Module):
    """The whole model. Parameters are known by name; their last letters are their dims (see `sharding`)."""

    def __init__(self, config: ModelConfig, dims: Dims, causal: bool, key: jax.Array, dtype: Any, parameter_dtype: Any,
                 rounded_late: bool):
        deviations = _standard_deviations(config.init, dims)
        keys = iter(jax.random.split(key, len(deviations)))

        def make(name: str, stacked: str = "") -> jax.Array:
            shape = tuple(getattr(dims, letter) for letter in stacked + name.rsplit("_", 1)[-1])
            if name in deviations:
                return deviations[name] * jax.random.normal(next(keys), shape, parameter_dtype)
            return (jnp.zeros if "head" in name else jnp.ones)(shape, parameter_dtype)

        self.token_embed_VD = nnx.Param(make("token_embed_VD"))
        if causal:
            self.start_D = nnx.Param(make("start_D"))
        self.position_embed_TD = nnx.Param(make("position_embed_TD"))
        self.blocks = Block(dims, lambda name: make(name, stacked="L"), dtype, config.dropout, rounded_late)
        self.final_norm_D = nnx.Param(make("final_norm_D"))
        self.head_VD = nnx.Param(make("head_VD"))
        if dims.K:
            self.class_head_KD = nnx.Param(make("class_head_KD"))
        self.config, self.dims, self.causal, self.dtype = config, dims, causal, dtype

    def embed(self, tokens_BT: jax.Array, hidden_BT: jax.Array | None = None) -> jax.Array:
        """[B, T, D]: position t holds its own place, and the colour of pixel t - 1 (position 0: the start vector).

        Where the model is not causal, the colour of pixel t itself: of hidden pixels, zeros (released code).
        """
        T = tokens_BT.shape[1]
        if self.causal:
            tokens_BT = jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)))
        colours_BTD = constrain(self._table("token_embed_VD")[constrain(tokens_BT, "BT")], "BTD")
        if self.causal:
            colours_BTD = jnp.where(jnp.arange(T)[:, None] == 0, self._table("start_D"), colours_BTD)
        elif hidden_BT is not None:
            colours_BTD = jnp.where(hidden_BT[..., None], 0, colours_BTD)
        return constrain((colours_BTD + self._table("position_embed_TD", T)).astype(self.dtype), "BTD")

    def embed_one(self, token_B: jax.Array, position: jax.Array) -> jax.Array:
        """[B, 1, D]: the input at `position` >= 1, where the pixel before it has colour `token_B`."""
        x_BD = self._table("token_embed_VD")[token_B] + self._table("position_embed_TD")[position]
        return constrain(x_BD[:, None].astype(self.dtype), "BTD")

    def _table(self, name: str, rows: int | None = None) -> jax.Array:
        """A table (its first `rows`) split like the activations it is added to: looking up split rows would move those.

        It stays in the parameters' dtype: its gradient adds up every pixel of a colour, where bfloat16 loses most.
        """
        return constrain(getattr(self, name)[...][:rows], name.rsplit("_", 1)[-1])

    def scan_blocks(self, body: Callable[[Block, Any, Any], tuple[Any, Any]], carry: Any, extra: Any = None) -> Any:
        """Runs `body(block, carry, extra of that layer) -> (carry, out)` over the stacked blocks, first to last."""
        graph, stacked = nnx.split(self.blocks)

        def step(carry, layer):
            return body(nnx.merge(graph, layer[0]), carry, layer[1])

        if self.config.remat != "none":
            # Across a loop's turns the compiler merges nothing; without a loop it would keep what is to be made again.
            step = jax.checkpoint(step, prevent_cse=self.config.unroll > 1, policy=REMAT_POLICIES[self.config.remat])
        return jax.lax.scan(step, carry, (stacked, extra), unroll=self.config.unroll)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 or wider: the final norm and the untied head."""
        head_VD = gather_weight(self.head_VD[...], "VD", self.dtype)
        return constrain(_read_out(norm(x_BTD, self.final_norm_D[...]), head_VD), "BTV")

    def stream(self, tokens_BT: jax.Array, key: jax.Array | None = None, hidden_BT: jax.Array | None = None,
               read: Callable[[jax.Array, jax.Array], Any] = lambda x_BTD, gain_D: None) -> tuple[jax.Array, Any]:
        """The residual stream [B, T, D] after the last block, and what `read` gives of it before each block, [L, ...].

        Args:
          tokens_BT: int palette indices in raster order.
          key: for dropout; None: no dropout.
          hidden_BT: pixels whose colours a model that is not causal does not see; None: it sees all.
          read: takes the stream before a block and the gain of that block's first norm.
        """
        keys_L = None if key is None else jax.random.split(key, self.dims.L + 1)

        def block(block: Block, x_BTD: jax.Array, key: jax.Array | None):
            o_BTNH = attention(*block.qkv(x_BTD), causal=self.causal, backend=self.config.attention)
            return block.after_attention(x_BTD, o_BTNH, key), read(x_BTD, block.attention_norm_D[...])

        x_BTD = self.embed(tokens_BT, hidden_BT)
        if keys_L is not None:
            x_BTD, keys_L = dropout(x_BTD, self.config.dropout, keys_L[0]), keys_L[1:]
        return self.scan_blocks(block, x_BTD, keys_L)

    def __call__(self, tokens_BT: jax.Array, key: jax.Array | None = None, hidden_BT: jax.Array | None = None
                 ) -> jax.Array:
        """Logits [B, T, V] that predict pixel t at t: from the pixels before it; where the model is not causal, from
        all that are not hidden. Arguments as of `stream`."""
        return self.outputs(tokens_BT, key, hidden_BT)[0]

    def outputs(self, tokens_BT: jax.Array, key: jax.Array | None = None, hidden_BT: jax.Array | None = None
                ) -> tuple[jax.Array, jax.Array | None]:
        """Logits [B, T, V] of the pixels, and [B, K] of the classes (None without a class head), as `stream` is told.

        The class head reads the mean over positions of the normalised stream at `model.class_layer` (paper, Section
        2.3: after the last block).
        """
        place = self.config.class_layer % (self.dims.L + 1)  # -1 is the last
        if not self.dims.K or place == self.dims.L:
            x_BTD, _ = self.stream(tokens_BT, key, hidden_BT)
            feature_BD = pool(x_BTD, self.final_norm_D[...])
        else:
            x_BTD, features_LBD = self.stream(tokens_BT, key, hidden_BT, read=pool)
            feature_BD = features_LBD[place]
        classes_BK = feature_BD @ constrain(self.class_head_KD[...], "KD").T if self.dims.K else None
        return self.logits(x_BTD), classes_BK


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of stored parameters and of computation."""
    parameters: Any
    compute: Any

    @classmethod
    def of(cls, name: str) -> "Precision":
        return cls(parameters=jnp.dtype("float64" if name == "float64" else "float32"), compute=jnp.dtype(name))


class Model:
    """ImageGPT as pure functions of a plain dict of arrays: what everything outside this file uses."""

    def __init__(self, config: ModelConfig, palette_size: int, image_size: int, precision: str,
                 mesh: Mesh | None = None, masked_share: float = 0.0, classes: int = 0):
        """
        Args:
          config: sizes and choices; attention `auto` becomes the back-end of the mesh's platform.
          palette_size: colours, the vocabulary.
          image_size: height and width, pixels.
          precision: a name from `config.PRECISIONS`.
          mesh: where it will run; None: one device of the default platform.
          masked_share: share of pixels that are hidden from it and that it predicts, as BERT does: it then has no start
            vector and its attention looks both ways; 0: autoregressive.
          classes: of its class head; 0: it has none.

        Raises:
          UserError: the heads or tokens do not divide over the mesh, or the attention back-end cannot run there.
        """
        self.dims = Dims.of(config, palette_size, image_size, classes)
        self.masked_share, self.causal = masked_share, masked_share == 0
        self.precision = Precision.of(precision)
        mesh = mesh or sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        sharding.check_model(self.dims.N, self.dims.T, mesh)
        platform = mesh.devices.flat[0].platform
        backend = backend_for(config.attention, platform, precision, self.dims.T, self.dims.H,
                              mesh.shape[sharding.CONTEXT])
        self._rounded_late = platform == "cpu" and precision == "bfloat16"
        self.config = dataclasses.replace(config, attention=backend)
        self._graph = nnx.split(jax.eval_shape(lambda: self._build(jax.random.key(0))))[0]

    def _build(self, key: jax.Array) -> ImageGPT:
        return ImageGPT(self.config, self.dims, self.causal, key, self.precision.compute, self.precision.parameters,
                        self._rounded_late)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters; jit it with shardings to make them in place."""
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


def count_parameters(params: Any) -> int:
    """The number of scalars in a tree of (abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
