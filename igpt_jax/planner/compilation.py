"""Compiles a job's own step for a topology, and returns the compiler's figures as a verdict.

`python -m igpt_jax.planner.compilation FILE` reads a config as JSON on stdin and writes the verdict to FILE. `verdicts`
runs it in a process of its own, because a vendor's compiler may crash.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from igpt_jax.config import PlanConfig, UserError, parse
from igpt_jax.evaluation import exact_loss
from igpt_jax.evaluation.steps import make_eval_step
from igpt_jax.model import sampling
from igpt_jax.model.dims import count_parameters
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding, topology
from igpt_jax.planner import flops, program, targets
from igpt_jax.runtime.precision import set_precision
from igpt_jax.training.steps import abstract_state, jit_train_step

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of compiling one step. Bytes are of one device.

    Attributes:
      status: 'compiled', 'out_of_memory' (the compiler refused), 'refused' (the config cannot run there) or 'failed'.
      message: of the refusal or failure.
      required_bytes: memory of the step: arguments, temporaries, outputs that reuse no argument, and code. If the
        compiler ran out of memory, what it asked for, or 0 if it did not say.
      params_bytes, moments_bytes, averages_bytes, batch_bytes: of the arguments; averages with optimizer.ema.
      checkpoint_bytes: of the whole training state, over all devices together.
      gradients_bytes: of one set of gradients, sharded like the parameters; part of `temporaries_bytes`.
      temporaries_bytes: activations, gradients and all else that lives only during the step.
      flops: of matrix products over all devices, including remat's recomputation.
      memory_bytes: read from and written to memory.
      collective_bytes: sent to other devices, by mesh axes.
      overlapped_bytes: the part of them that travels during computation.
      collectives: number of collectives that run, by kind.
      unknown_loops: number of loops whose length the compiled text does not show.
    """
    status: str
    message: str = ""
    device_kind: str = ""
    devices: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    attention: str = ""
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    required_bytes: int = 0
    params_bytes: int = 0
    moments_bytes: int = 0
    averages_bytes: int = 0
    batch_bytes: int = 0
    checkpoint_bytes: int = 0
    gradients_bytes: int = 0
    temporaries_bytes: int = 0
    flops: float = 0.0
    memory_bytes: float = 0.0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    overlapped_bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    compile_seconds: float = 0.0


def compile_step(config: PlanConfig) -> Verdict:
    """Compiles `config.step` for `config.topology` in this process.

    Raises:
      UserError: topology, mesh, batch and model do not fit together, or a vendor's compiler is missing.
    """
    target = topology.parse(config.topology)
    mesh = sharding.make_mesh(config.mesh, targets.devices_for(target))
    function, arguments, model = step_for(config, mesh)
    state = arguments[0]
    params = state["params"] if config.step == "train" else state
    known = {"device_kind": mesh.devices.flat[0].device_kind, "devices": mesh.size, "mesh": dict(mesh.shape),
             "attention": model.config.attention, "compiler_options": model.compiler_options,
             "parameters": count_parameters(params), "params_bytes": _shard_bytes(params),
             "batch_bytes": _shard_bytes(arguments[1:])}
    if config.step == "train":
        known |= {"moments_bytes": _shard_bytes(state["optimizer"]), "gradients_bytes": _shard_bytes(params),
                  "averages_bytes": _shard_bytes(state.get("ema", {})),
                  "checkpoint_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))}
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        known["flops"] = flops.count(traced.jaxpr, model.causal)
        lowered = traced.lower()
    start = time.perf_counter()
    try:
        compiled, text = compile_with_text(lowered, mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        return _compile_error(str(error), known)
    seconds = time.perf_counter() - start
    memory, moved = compiled.memory_analysis(), program.traffic(text, dict(mesh.shape))
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Only TPUs hold the program in device memory.
    code = memory.generated_code_size_in_bytes if mesh.devices.flat[0].platform == "tpu" else 0
    required = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new_outputs + code
    return Verdict("compiled", required_bytes=required, temporaries_bytes=memory.temp_size_in_bytes,
                   memory_bytes=moved.memory_bytes, collective_bytes=moved.collective_bytes,
                   overlapped_bytes=moved.overlapped_bytes, collectives=moved.collectives,
                   unknown_loops=moved.unknown_loops, compile_seconds=seconds, **known)


def compile_with_text(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
    """Compiles a program. Returns it and its optimized text, for TPUs from a dump, since `as_text` fails on some."""
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if platform == "tpu" else None
        compiled = lowered.compile(dump)
        return compiled, _dumped(folder) if dump else compiled.as_text()


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Without JAX's compilation cache: its programs lack parts of their text, and leave no dump."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def step_for(config: PlanConfig, mesh: Mesh) -> tuple[Callable, tuple[Any, ...], Model]:
    """The job's own jitted step, its arguments as shapes with shardings, and the model. Allocates nothing."""
    sharding.check_batch(config.batch_size, mesh, config.accumulate if config.step == "train" else 1)
    model = Model.of(config, config.vocabulary, config.image_size, mesh)
    if config.step == "sample" and not model.causal:
        raise UserError("step=sample: only an autoregressive model can be sampled from. Set objective=autoregressive.")

    def array(shape: tuple[int, ...], dtype: Any, sharded: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharded)

    by_image, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    tokens_BT = array((config.batch_size, model.dims.T), jnp.int32, by_image)
    state = abstract_state(model, config, mesh)
    if config.step == "train":
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jit_train_step(model, config, mesh, max(0, config.optimizer.warmup_steps))
        return step, (state, tokens_BT, array(key.shape, key.dtype, everywhere)), model
    if config.step == "evaluate":
        step = exact_loss.jit_over_batches(make_eval_step(model), model, mesh)
        return step, (state["params"], tokens_BT, array((config.batch_size,), jnp.int32, by_image)), model

    def sample(params: Any, given_BP: jax.Array, index_B: jax.Array) -> jax.Array:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), index_B)
        return sampling.generate(model, params, given_BP, keys_B, sampling.Sampling())

    nothing_BP = array((config.batch_size, 0), jnp.int32, by_image)
    index_B = array((config.batch_size,), jnp.int32, by_image)
    step = jax.jit(sample, out_shardings=everywhere, compiler_options=model.compiler_options)
    return step, (state["params"], nothing_BP, index_B), model


def _shard_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += itemsize * math.prod(shape)
    return total


def _dumped(folder: str) -> str:
    """The text of the step's module, the largest of those in a dump."""
    files = glob.glob(os.path.join(glob.escape(folder), "*.after_optimizations.txt"))
    with open(max(files, key=os.path.getsize), encoding="utf-8") as file:
        return file.read()


def _compile_error(message: str, known: dict[str, Any]) -> Verdict:
    """A verdict from the compiler's error message, with the memory that it asked for."""
    line = " ".join(message.split())[:500]
    if "RESOURCE_EXHAUSTED" not in message:
        return Verdict("failed", line, **known)
    asked = re.search(r"(?:[Uu]sed |required[\w ]*\()([\d.]+)([KMGT])", message)
    required = int(float(asked[1]) * UNITS[asked[2]]) if asked else 0
    if "for HLO temporaries" in message:  # the arguments come on top
        required += sum(known.get(f"{name}_bytes", 0) for name in ("params", "moments", "averages", "batch"))
    return Verdict("out_of_memory", line, required_bytes=required, **known)


def main(file: str) -> None:
    """Reads a PlanConfig as JSON on stdin, writes its Verdict as JSON to `file`."""
    config = parse("plan", json.load(sys.stdin))
    set_precision(config.precision)
    try:
        verdict = compile_step(config)
    except UserError as error:
        verdict = Verdict("refused", str(error))
    with open(file, "w", encoding="utf-8") as out:
        json.dump(dataclasses.asdict(verdict), out)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1])
