"""Exact nats per pixel of one or many checkpoints over a whole split, each over any mesh and at any batch size.

Writes evaluation.json, a row per checkpoint.
"""

import glob
import math
from typing import Any

import jax

from igpt_jax import checkpoint, evaluation, palette, runtime, sharding, storage, telemetry
from igpt_jax.config import EvaluateConfig, UserError
from igpt_jax.data import open_split
from igpt_jax.data.store import Split
from igpt_jax.data.tokens import TokenFile


def run(config: EvaluateConfig, workdir: str) -> dict[str, Any]:
    """Evaluates each checkpoint. Returns `nats_per_pixel` by checkpoint, and the number of `examples`.

    Raises:
      UserError: a checkpoint or the data is missing, or they do not fit each other or the mesh.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    rows = []
    for where in _checkpoints(config.checkpoints):
        model, params, record = checkpoint.load_model(where, mesh, config.precision, config.attention)
        split = _examples(config, record)
        table = palette.lookup_table(record.palette_VC)
        nats = evaluation.make_evaluate(model, mesh, config.batch_size, table)(params, split)
        rows.append({"checkpoint": where, "steps": record.steps_done, "split": config.tokens or config.data.split,
                     "examples": split.count, "nats_per_pixel": nats, "bits_per_pixel": nats / math.log(2)})
        telemetry.say(f"{where}: step {record.steps_done:,}, {nats:.6f} nats per pixel over {split.count:,} images")
        if jax.process_index() == 0:  # after each, so that nothing is lost where a later one cannot be read
            storage.publish(storage.path(workdir) / "evaluation.json", runtime.to_json(rows))
    return {"nats_per_pixel": {row["checkpoint"]: row["nats_per_pixel"] for row in rows},
            "examples": {row["checkpoint"]: row["examples"] for row in rows}}


def _examples(config: EvaluateConfig, record: checkpoint.Record) -> Split | TokenFile:
    if config.tokens:
        split = TokenFile(config.tokens, record.image_size, len(record.palette_VC))
    else:
        split = open_split(config.data.store or record.config.data.store, config.data.split, record.image_size)
    split.count = min(split.count, config.limit or split.count)
    return split


def _checkpoints(typed: str) -> list[str]:
    """DIR/checkpoints/STEP of all that a comma list of workdirs, steps and globs names, each once, by step.

    A glob may match what is no finished checkpoint, such as one that a run is just writing; it is passed over.
    """
    found = set()
    for pattern in filter(None, map(str.strip, typed.split(","))):
        matches = [str(path) for path in storage.matching(pattern)]
        finished = [match for match in matches if checkpoint.is_checkpoint(match)]
        found |= {checkpoint.locate(match) for match in (finished if glob.has_magic(pattern) else matches)}
    if not found:
        raise UserError(f"checkpoints={typed!r} names no finished checkpoint. "
                        "Set --config.checkpoints to workdirs of pretrain or steps of one.")
    return [str(storage.path(folder) / str(step)) for folder, step in sorted(found)]
