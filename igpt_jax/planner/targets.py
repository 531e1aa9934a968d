"""Compile-only devices: the devices of a topology, described by the vendor's compiler on a machine without them.

TPUs come from libtpu, GPUs from jax[cuda13] and the description below, CPUs from this process's own devices.
"""

import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from igpt_jax.config import UserError
from igpt_jax.parallel.topology import Target

# GpuTargetConfigProto of XLA (xla/stream_executor/device_description.proto): NVIDIA's data sheets and CUDA's limits by
# compute capability.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  fpus_per_core: {fpus}
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}  shared_memory_per_block_optin: {optin}
  core_count: {cores}  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}  l2_cache_size: {cache}  clock_rate_ghz: {clock}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 10 }}  device_description_str: "{kind}"
"""
_AMPERE = {"fpus": 64, "shared": 167936, "optin": 166912, "cores": 108, "cache": 41943040, "clock": 1.41, "major": 8}
_HOPPER = {"fpus": 128, "shared": 233472, "optin": 232448, "cores": 132, "cache": 52428800, "clock": 1.98, "major": 9}


def devices_for(target: Target) -> list[Any]:
    """The devices of `target`. Unless they are attached, TPUs and GPUs can only be compiled for.

    Raises:
      UserError: the vendor's compiler is not installed, or does not know the topology.
    """
    if target.platform == "attached":
        return jax.devices()
    if target.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < target.devices:
            raise UserError(f"topology={target.name}: this process has {len(devices)} CPU devices.")
        return devices[:target.devices]
    return list((_tpu if target.platform == "tpu" else _gpu)(target).devices)


def _tpu(target: Target) -> topologies.TopologyDescription:
    if not importlib.util.find_spec("libtpu"):
        raise UserError(f"topology={target.name} needs Google's TPU compiler. Run `pip install '.[plan]'`, or "
                        "`pip install libtpu`.")
    name, _, _ = target.name.partition("*")
    # v4 and v5p chips (3-D topologies) have two cores, which real machines show as one device.
    options = {"chip_config_name": "megacore"} if len(target.shape) == 3 else {}
    if target.groups > 1:
        options["num_slices"] = target.groups
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology={target.name} is not a TPU slice: {str(error).splitlines()[0]}") from None


def _gpu(target: Target) -> topologies.TopologyDescription:
    try:
        import jax_plugins.xla_cuda13 as plugin
    except ImportError:
        raise UserError(f"topology={target.name} needs NVIDIA's compiler, in an environment of its own (4.4 GB): "
                        "`python -m venv cuda && cuda/bin/pip install '.[cuda]'`, then set "
                        "--config.python=cuda/bin/python") from None
    plugin._load_nvidia_libraries()  # XLA looks for cuDNN and others while it compiles
    chip = target.chip
    limits = _AMPERE if chip.name.startswith("A100") else _HOPPER
    text = _GPU.format(**limits, bandwidth=chip.hbm_bandwidth, memory=chip.hbm_bytes, kind=chip.device_kinds[0])
    return topologies.get_topology_desc("", platform="cuda", target_config=text,
                                        topology=f"1x{target.groups}x{target.shape[0]}")
