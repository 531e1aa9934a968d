"""Shows what decides the speed of a compiled training step, without running it:

    python benchmarks/compiled.py TOPOLOGY [--config KEY=VALUE,...] [--json FILE]

Compiles the training step of `pretrain` for a topology of `plan` (cpu:1, v5e:4x4, h200:8) with the plan job's settings.
TPUs need the extra `plan`, GPUs jax[cuda13]. It reports the dtypes of matrix products, recomputation, transposes and
copies, how many of the collectives' bytes overlap with computation, and how much of the state is updated in place.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu looks for the machine that it is not on

import exits
import jax

from igpt_jax import storage
from igpt_jax.config import PlanConfig, base_config, parse, to_dict
from igpt_jax.parallel import sharding, topology
from igpt_jax.planner import compilation, flops, hlo, program, targets
from igpt_jax.runtime.precision import set_precision

REARRANGES = ("transpose", "copy")
WORTH_COUNTING = 4096  # bytes that an instruction moves


def evidence(config: PlanConfig) -> dict[str, Any]:
    """The figures of one step. Bytes, FLOPs and numbers of instructions are of one device and count every iteration.

    Returns:
      products: matrix products as written, by the dtypes of both sides.
      recomputed: executed FLOPs over those of the same step without remat.
      memory_bytes: read and written; rearranged_bytes: the part of it by transposes and copies outside fusions.
      instructions: number of fusions, transposes, copies and others that move at least 4 KiB, by opcode.
      overlapped_bytes, waiting_bytes: sent by collectives that overlap with computation, and by exposed ones.
      updated_in_place: fraction of the state's bytes whose memory the new state takes.
    """
    target = topology.parse(config.topology)
    mesh = sharding.make_mesh(config.mesh, targets.devices_for(target))
    function, arguments, model = compilation.step_for(config, mesh)
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        lowered = traced.lower()
    compiled, text = compilation.compile_with_text(lowered, target.platform)
    products = collections.Counter(
        " x ".join(re.findall(r"x([a-z]+\d+)>", operands))
        for operands in re.findall(r"stablehlo.dot_general.* : \((.*)\) ->", lowered.as_text()))
    plain = parse("plan", _without_remat(config))
    with jax.set_mesh(mesh):
        once = compilation.step_for(plain, mesh)
        saved = flops.count(once[0].trace(*once[1]).jaxpr, model.causal)
    memory = compiled.memory_analysis()
    state = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
                for leaf in jax.tree.leaves(arguments[0]))
    moved = program.traffic(text, dict(mesh.shape))
    module = hlo.parse(text)
    counts, rearranged = instructions(module)
    return {"products": dict(products), "recomputed": flops.count(traced.jaxpr, model.causal) / saved,
            "memory_bytes": moved.memory_bytes, "rearranged_bytes": rearranged, "instructions": counts,
            "overlapped_bytes": moved.overlapped_bytes,
            "waiting_bytes": sum(moved.collective_bytes.values()) - moved.overlapped_bytes,
            "updated_in_place": min(1.0, memory.alias_size_in_bytes / state)}  # TPUs pad arrays


def _without_remat(config: PlanConfig) -> dict[str, Any]:
    values = to_dict(config)
    return {**values, "model": {**values["model"], "remat": "none"}}


def instructions(module: dict[str, hlo.Computation]) -> tuple[dict[str, int], float]:
    """The number of instructions by opcode, and the bytes that transposes and copies move.

    Instructions inside fusions, and those that move less than WORTH_COUNTING bytes, do not count.
    """
    counts, moved = collections.Counter(), 0.0
    for computation, instruction, times in hlo.executed(module, module["ENTRY"], 1.0):
        size = program.memory_bytes_of(module, computation, instruction)
        if size >= WORTH_COUNTING:
            counts[instruction.base] += round(times)
            moved += times * size * (instruction.base in REARRANGES)
    return dict(counts.most_common()), moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology")
    parser.add_argument("--config", default="", help="settings of plan: model=igpt_s,batch_size=128,mesh.fsdp=8")
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    arguments = parser.parse_args()
    settings = ",".join(filter(None, [arguments.config, f"topology={arguments.topology}"]))
    config = parse("plan", base_config("plan", settings))
    set_precision(config.precision)
    found = evidence(config)
    print(f"{arguments.topology}, {settings}, jax {jax.__version__}")
    wide = {dtypes: count for dtypes, count in found["products"].items() if dtypes != "bf16 x bf16"}
    print(f"matrix products   {sum(found['products'].values())} written, not bfloat16 x bfloat16: {wide or 'none'}")
    print(f"recomputed        {found['recomputed'] - 1:.1%} of the FLOPs")
    print(f"memory            {found['memory_bytes'] / 1e9:.2f} GB moved, {found['rearranged_bytes'] / 1e9:.2f} GB of "
          "it by transposes and copies")
    sent = found["overlapped_bytes"] + found["waiting_bytes"]
    print(f"collectives       {sent / 1e9:.2f} GB sent, {found['overlapped_bytes'] / sent if sent else 1:.0%} "
          "overlapped with computation")
    print(f"state             {found['updated_in_place']:.1%} of its bytes updated in place")
    print("instructions      " + ", ".join(f"{count} {name}" for name, count in found["instructions"].items()))
    if arguments.json:
        found = {"topology": arguments.topology, "config": arguments.config, "jax": jax.__version__, **found}
        storage.publish(storage.path(arguments.json), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.run(main)
