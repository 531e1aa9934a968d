"""The mesh of devices, and the sharding of every array, derived from the letters in its name.

Letters of dims: B batch, T tokens, D embed, N heads, H head dim, F MLP hidden, V vocabulary, L layers. A parameter's
letters end its name (`query_DNH`). Blocks are stacked, so their parameters have a first dim L that the name omits.

Example: `blocks/query_DNH` has shape [L, D, N, H] and the letters LDNH. PARAMETER_RULES shard D over the mesh axes
fsdp and context, and N over tensor, and have no entry for L and H. So its sharding is
PartitionSpec(None, ("fsdp", "context"), ("tensor",), None). A new parameter needs no sharding of its own: a name with
the right letters is enough. The optimizer's moments have their parameter's name, and so its sharding.

The specs of all parameters and activations come from this file.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from igpt_jax.config import MeshConfig, UserError
from igpt_jax.parallel.trees import by_name

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
CONTEXT = "context"

# The mesh axes that shard a dim. A letter that is absent is never sharded.
#
# Parameters are sharded along D over fsdp (fully sharded data parallel): each layer's weights are gathered when they
# are used. The devices of the context axis share sequences and need the same weights, so they share the state as well.
# Heads and the MLP's hidden dim are split over tensor in parameters and activations alike, so that these products need
# no gather. D of an activation is never sharded: the fsdp axis already splits its batch.
#
# V, T, H and L are absent on purpose. A vocabulary has some hundred tokens, so its tables are small. A head stays
# whole, because a score is a sum over all of H. One loop visits the stacked layers in turn, so a split L would send
# each layer from one device to all others.
PARAMETER_RULES: Mapping[str, tuple[str, ...]] = {"D": ("fsdp", CONTEXT), "N": ("tensor",), "F": ("tensor",)}
ACTIVATION_RULES: Mapping[str, tuple[str, ...]] = {"B": BATCH_AXES, "T": (CONTEXT,), "N": ("tensor",), "F": ("tensor",)}

log = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all).

    Several TPU slices are joined along data, then fsdp, so that only gradients (and with fsdp, weights) cross the
    slower network between slices. GPU nodes need no such rule: devices are numbered node by node, and the last mesh
    axes vary fastest.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or data x fsdp does not split over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    shape = [getattr(sizes, axis) for axis in AXES]
    types = (AxisType.Auto,) * len(AXES)
    # Example without slices: 2 nodes of 8 GPUs with data=2, fsdp=2 and tensor=4. Each tensor group is four GPUs of one
    # node, each fsdp group is on one node too, and only data crosses the network.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        # jax.make_mesh splits a side of the torus over two mesh axes on v5e only, and refuses such meshes elsewhere.
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES,
                    axis_types=types)
    # `across` says how many slices each axis spans: as many as data can take, the rest along fsdp.
    # Example: 4 slices with data=2 and fsdp=64. data can span gcd(4, 2) = 2 of them, and fsdp spans the other factor of
    # 2. So across = [2, 2, 1, 1], and inside each slice the mesh is [1, 32, 1, 1].
    over_data = math.gcd(slices, sizes.data)
    across = [over_data, slices // over_data, 1, 1]
    if sizes.fsdp % across[1]:
        raise UserError(f"mesh.data={sizes.data} x mesh.fsdp={sizes.fsdp} does not split over {slices} slices. "
                        f"Choose mesh.data={slices}, or a multiple of {slices} for one of them.")
    within = [size // count for size, count in zip(shape, across, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def letters_for(name: str, ndim: int) -> str:
    """The letters of a parameter's dims, from its name: ('query_DNH', 4) -> 'LDNH'."""
    # A stack of layers has one dim more than its name has letters. The names of tables and heads have a letter for each
    # dim, so they get no L.
    letters = name.rsplit("_", 1)[-1]
    return letters if len(letters) == ndim else "L" + letters


def spec_for(letters: str, rules: Mapping[str, tuple[str, ...]] = ACTIVATION_RULES) -> PartitionSpec:
    """The PartitionSpec of an array with the dims `letters` under `rules`: "BTNH" -> batch over data x fsdp, ..."""
    return PartitionSpec(*(rules.get(letter) for letter in letters))


# Cached, because the same parameter is looked up for its value, for each of its moments and for abstract states. The
# user should read one warning per parameter.
@functools.cache
def _warn_replicated(name: str, letter: str, size: int, axes: tuple[str, ...], devices: int) -> None:
    log.warning("%s: its dim %s of %d does not divide over %s of %d devices and is replicated on them.",
                name, letter, size, " x ".join(axes), devices)


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of a parameter. A dim that does not divide is replicated, with a warning that names it."""
    letters = letters_for(name, len(shape))
    spec = []
    for letter, size in zip(letters, shape, strict=True):
        # A dim that does not divide is no error: replication gives the same result and only costs memory. check_model
        # refuses the two cases where the computation itself could not be split.
        axes = PARAMETER_RULES.get(letter)
        devices = math.prod(mesh.shape[axis] for axis in axes or ())
        if axes and size == 1:  # a factored second moment keeps the parameter's letters, with size 1 where it is a sum
            axes = None
        elif axes and size % devices:
            _warn_replicated(name, letter, size, axes, devices)
            axes = None
        spec.append(axes)
    return PartitionSpec(*spec)


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of (abstract) parameters or of their moments, by the parameters' names.

    Leaves that are not entries of a dictionary, such as the optimizer's step count, are replicated.
    """
    def sharding(path, leaf):
        if not isinstance(path[-1], jax.tree_util.DictKey):
            return replicated(mesh)
        return NamedSharding(mesh, parameter_spec(path[-1].key, leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(sharding, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first dim is the batch: over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of devices that share a batch: data x fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def whole_batch(images: int, mesh: Mesh) -> int:
    """The smallest batch of at least `images` that divides over data x fsdp."""
    shards = batch_shards(mesh)
    return -(-images // shards) * shards


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError where the global batch does not divide over data x fsdp and `accumulate` microbatches."""
    devices = batch_shards(mesh)
    multiple = devices * accumulate
    if batch_size % multiple:
        rule = f"mesh.data x mesh.fsdp = {devices} devices" + (f" x accumulate={accumulate}" if accumulate > 1 else "")
        raise UserError(f"batch_size={batch_size} does not divide over {rule}. "
                        f"Choose a multiple of {multiple}, such as "
                        f"{max(1, round(batch_size / multiple)) * multiple}.")


def check_model(heads: int, tokens: int, mesh: Mesh) -> None:
    """Raises UserError where the heads do not divide over the tensor axis, or the tokens over the context axis.

    Each device of the context axis holds two halves of its tokens, since the zigzag exchange trades one of them.
    """
    tensor, context = mesh.shape["tensor"], mesh.shape[CONTEXT]
    if heads % tensor:
        raise UserError(f"model.heads={heads} does not divide over mesh.tensor={tensor}. "
                        f"Choose mesh.tensor={_nearest([n for n in range(1, heads + 1) if heads % n == 0], tensor)}.")
    if context > 1 and tokens % (2 * context):
        choices = [1, *(n for n in range(2, tokens // 2 + 1) if tokens % (2 * n) == 0)]
        raise UserError(f"{tokens} tokens do not divide into two equal halves per device of mesh.context={context}. "
                        f"Choose mesh.context={_nearest(choices, context)}.")


def _nearest(choices: list[int], wanted: int) -> int:
    return min(choices, key=lambda choice: (abs(choice - wanted), choice))


def context_shards() -> int:
    """The number of devices that share each sequence: the size of the context axis of the mesh that `jax.set_mesh`
    has set; 1 where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT]


def constrain(x: jax.Array, letters: str, rules: Mapping[str, tuple[str, ...]] = ACTIVATION_RULES) -> jax.Array:
    """Constrains the sharding of an activation inside a jitted function; no effect where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(letters, rules))


def gather_weight(weight: jax.Array, name: str, dtype: Any) -> jax.Array:
    """A parameter in the compute dtype. It is cast before it is gathered, so that devices exchange `dtype`."""
    # The constraint gives the cast array the parameter's own sharding. Without it XLA may gather float32 and cast then,
    # which moves twice the bytes of bfloat16.
    return constrain(weight.astype(dtype), letters_for(name, weight.ndim), PARAMETER_RULES)


def gathered(weight: jax.Array, name: str, at_once: Callable[[int], bool]) -> jax.Array:
    """A parameter from `gather_weight`. XLA gathers it where a product needs it. If it is shared by a number of devices
    for which `at_once` is false, it is gathered here, in two stages."""
    mesh = jax.sharding.get_abstract_mesh()
    if at_once(weight_shards()):
        return weight
    spec = parameter_spec(name, weight.shape, mesh)
    if PARAMETER_RULES["D"] not in spec:  # its dim does not divide and is replicated
        return weight
    dim = spec.index(PARAMETER_RULES["D"])

    def on_each_device(part: jax.Array) -> jax.Array:
        for axis in reversed(PARAMETER_RULES["D"]):
            for groups in reversed(_stages(mesh.shape[axis], at_once)):
                part = jax.lax.all_gather(part, axis, axis=dim, axis_index_groups=groups, tiled=True)
        return part

    whole = PartitionSpec(*(*spec[:dim], None, *spec[dim + 1:]))
    return jax.shard_map(on_each_device, in_specs=spec, out_specs=whole, check_vma=False)(weight)


def weight_shards() -> int:
    """The largest number of devices along one axis that share a weight: fsdp or context; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else max(mesh.shape[axis] for axis in PARAMETER_RULES["D"])


def gradient_shards() -> int:
    """The number of devices over which a weight's gradient is summed: data x fsdp x context; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in (*BATCH_AXES, CONTEXT))


def summed_gradient(gradient: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, x_letters: str, d: jax.Array,
                    d_letters: str, name: str, shape: tuple[int, ...], at_once: Callable[[int], bool]) -> jax.Array:
    """The sum over devices of `gradient(x, d)` of their parts of x and d, in the sharding of the parameter `name`.

    Each device receives the sum of its own part alone (reduce-scatter), in the dtype that `gradient` returns.

    Args:
      gradient: of the activation x and the gradient d, whose dims the letters name.
      shape: of the parameter.
      at_once: whether so many devices scatter in one stage; otherwise they do in two.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = parameter_spec(name, shape, mesh)

    def on_each_device(x: jax.Array, d: jax.Array) -> jax.Array:
        part = gradient(x, d)
        axes = [axis for axis in (*BATCH_AXES, CONTEXT) if mesh.shape[axis] > 1]
        scattered = [axis for axis in axes if axis in PARAMETER_RULES["D"] and PARAMETER_RULES["D"] in spec]
        if scattered:
            # Along the first dim: along others, libtpu sums arrays whole (all-reduce), which sends twice as much.
            dim = spec.index(PARAMETER_RULES["D"])
            part = jnp.moveaxis(part, dim, 0)
            for axis in scattered:
                for groups in _stages(mesh.shape[axis], at_once):
                    part = jax.lax.psum_scatter(part, axis, axis_index_groups=groups, tiled=True)
            part = jnp.moveaxis(part, 0, dim)
        rest = [axis for axis in axes if axis not in scattered]
        return jax.lax.psum(part, rest) if rest else part

    parts = tuple(_divisible_spec(letters, each.shape, mesh) for letters, each in ((x_letters, x), (d_letters, d)))
    return jax.shard_map(on_each_device, in_specs=parts, out_specs=spec, check_vma=False)(x, d)


def _stages(devices: int, at_once: Callable[[int], bool]) -> list[list[list[int]] | None]:
    """Groups of devices for each stage of a reduce-scatter over one axis; None is all of them at once.

    With 8 devices in two stages, groups 0 2 4 6 and 1 3 5 7 scatter quarters, and then 0 1, 2 3, 4 5 and 6 7 the halves
    of these. So device i ends with eighth i.
    """
    if at_once(devices):
        return [None]
    inner = max(n for n in range(1, math.isqrt(devices) + 1) if devices % n == 0)
    return [[list(range(first, devices, inner)) for first in range(inner)],
            [list(range(first, first + inner)) for first in range(0, devices, inner)]]


def _divisible_spec(letters: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The PartitionSpec of an activation; dims that do not divide are replicated."""
    rules = (ACTIVATION_RULES.get(letter, ()) for letter in letters)
    return PartitionSpec(*(axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
                           for axes, size in zip(rules, shape, strict=True)))


def table(params: Any, mesh: Mesh) -> str:
    """One line per parameter: name, shape, PartitionSpec, bytes on each device."""
    rows, total = [], 0
    for name, leaf in by_name(params).items():
        sharding = NamedSharding(mesh, parameter_spec(name.rsplit("/")[-1], leaf.shape, mesh))
        size = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        total += size
        rows.append(f"{name:32} {str(leaf.shape):24} {str(tuple(sharding.spec)):40} {size:>14,}")
    return "\n".join([*rows, f"{'total bytes on each device':98} {total:>14,}"])
