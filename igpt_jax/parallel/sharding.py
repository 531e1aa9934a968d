"""From the letters in a name to where its array lives. The only file besides config that names mesh axes.

A dim is known by its letter: B batch, T tokens, D embed, N heads, H head dim, F mlp hidden, V palette, L layers.
A parameter's letters end its name (`query_DNH`); blocks are stacked, so theirs begin with an L that the name omits.
"""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from igpt_jax.config import MeshConfig, UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
CONTEXT = "context"

# Which mesh axes split a dim. A letter that is absent is never split.
PARAMETER_RULES: Mapping[str, tuple[str, ...]] = {"D": ("fsdp", CONTEXT), "N": ("tensor",), "F": ("tensor",)}
ACTIVATION_RULES: Mapping[str, tuple[str, ...]] = {"B": BATCH_AXES, "T": (CONTEXT,), "N": ("tensor",), "F": ("tensor",)}

log = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all).

    Several TPU slices are joined along data, then fsdp: what crosses the slower network between them is the gradient.
    Nodes of GPUs need no such rule: devices count up node by node, and the last axes vary fastest.

    Raises:
      UserError: the sizes do not multiply to the devices, or neither data nor fsdp splits over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    shape = [getattr(sizes, axis) for axis in AXES]
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        # jax.make_mesh would split a side of the torus over two mesh axes on v5e alone.
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES,
                    axis_types=types)
    over_data = math.gcd(slices, sizes.data)
    across = [over_data, slices // over_data, 1, 1]
    if sizes.fsdp % across[1]:
        raise UserError(f"mesh.data={sizes.data} x mesh.fsdp={sizes.fsdp} does not split over {slices} slices. "
                        f"Choose mesh.data={slices}, or a multiple of {slices} for one of them.")
    within = [size // parts for size, parts in zip(shape, across, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def letters_for(name: str, ndim: int) -> str:
    """The letters of a parameter's dims, from its name: ('query_DNH', 4) -> 'LDNH'."""
    letters = name.rsplit("_", 1)[-1]
    return letters if len(letters) == ndim else "L" + letters


def spec_for(letters: str, rules: Mapping[str, tuple[str, ...]] = ACTIVATION_RULES) -> PartitionSpec:
    """The partition of dims `letters` under `rules`."""
    return PartitionSpec(*(rules.get(letter) for letter in letters))


@functools.cache
def _warn_unsplit(name: str, letter: str, size: int, axes: tuple[str, ...], parts: int) -> None:
    log.warning("%s: its dim %s of %d does not divide over %s of %d devices and stays whole on each of them.",
                name, letter, size, " x ".join(axes), parts)


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of a parameter; a dim that does not divide stays whole, with a warning that names the tensor."""
    letters = letters_for(name, len(shape))
    parts = []
    for letter, size in zip(letters, shape, strict=True):
        axes = PARAMETER_RULES.get(letter)
        devices = math.prod(mesh.shape[axis] for axis in axes or ())
        if axes and size == 1:  # summed over, in a factored moment
            axes = None
        elif axes and size % devices:
            _warn_unsplit(name, letter, size, axes, devices)
            axes = None
        parts.append(axes)
    return PartitionSpec(*parts)


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of (abstract) parameters or of their moments, by the parameters' names.

    A leaf that no dictionary names is no parameter's, such as the optimizer's count: it is whole on every device.
    """
    def sharding(path, leaf):
        if not isinstance(path[-1], jax.tree_util.DictKey):
            return replicated(mesh)
        return NamedSharding(mesh, parameter_spec(path[-1].key, leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(sharding, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays that begin with the batch dim."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError where the global batch does not divide over data x fsdp, and into `accumulate` parts."""
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = devices * accumulate
    if batch_size % parts:
        rule = f"mesh.data x mesh.fsdp = {devices} devices" + (f" x accumulate={accumulate}" if accumulate > 1 else "")
        raise UserError(f"batch_size={batch_size} does not divide over {rule}. "
                        f"Choose a multiple of {parts}, such as {max(1, round(batch_size / parts)) * parts}.")


def microbatches_for(batch_size: int, mesh: Mesh, images_per_pass: int) -> int:
    """The fewest equal parts of a batch of which each device holds at most `images_per_pass` images at once."""
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    images = max(1, batch_size // devices)
    return next(parts for parts in range(1, images + 1) if images % parts == 0 and images // parts <= images_per_pass)


def check_model(heads: int, tokens: int, mesh: Mesh) -> None:
    """Raises UserError where the heads do not divide over the tensor axis, or the tokens over the context axis."""
    tensor, context = mesh.shape["tensor"], mesh.shape[CONTEXT]
    if heads % tensor:
        raise UserError(f"model.heads={heads} does not divide over mesh.tensor={tensor}. "
                        f"Choose mesh.tensor={_nearest([n for n in range(1, heads + 1) if heads % n == 0], tensor)}.")
    if context > 1 and tokens % (2 * context):
        choices = [1, *(n for n in range(2, tokens // 2 + 1) if tokens % (2 * n) == 0)]
        raise UserError(f"{tokens} tokens do not divide over mesh.context={context} in two halves each. "
                        f"Choose mesh.context={_nearest(choices, context)}.")


def _nearest(choices: list[int], wanted: int) -> int:
    return min(choices, key=lambda choice: (abs(choice - wanted), choice))


def context_shards() -> int:
    """Over how many devices the current mesh splits each sequence; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT]


def constrain(x: jax.Array, letters: str, rules: Mapping[str, tuple[str, ...]] = ACTIVATION_RULES) -> jax.Array:
    """Pins the layout of an activation inside a jitted function; no effect where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(letters, rules))


def gather_weight(weight: jax.Array, letters: str, dtype: Any) -> jax.Array:
    """A parameter in the compute dtype, cast while still split, so that what travels between devices is `dtype`."""
    return constrain(weight.astype(dtype), letters, PARAMETER_RULES)


def table(params: Any, mesh: Mesh) -> str:
    """One line per parameter: name, shape, partition, bytes on each device."""
    rows, total = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sharding = NamedSharding(mesh, parameter_spec(path[-1].key, leaf.shape, mesh))
        size = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        total += size
        name = "/".join(key.key for key in path)
        rows.append(f"{name:32} {str(leaf.shape):24} {str(tuple(sharding.spec)):40} {size:>14,}")
    return "\n".join([*rows, f"{'total bytes on each device':98} {total:>14,}"])
