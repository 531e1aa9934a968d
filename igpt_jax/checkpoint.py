"""Checkpoints: Orbax's files, each step self-describing, so that other jobs need nothing but its path.

A step holds two trees, `params` and `training` (the rest of the state), so that jobs other than training read the
parameters alone, straight into their own mesh; and a record (JSON) of the config, the palette and the data.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from igpt_jax import orbax_s3, sharding, storage
from igpt_jax.config import ModelConfig, PretrainConfig, UserError, parse, to_dict
from igpt_jax.model import Model
from igpt_jax.steps import State

FORMAT = 1
COMMITTED = "commit_success.txt"  # Orbax writes it into a step last, on every kind of storage
# Keys that may differ between a checkpoint and the run that goes on from it: they change neither the model nor what
# it sees. `steps` may differ too where neither the schedule nor the warm-up depends on it. (The record compares image
# size and palette themselves.)
FREE_KEYS = frozenset({"data.store", "data.held_out", "data.reader", "data.prefetch", "data.stage", "model.attention",
                       "model.remat", "accumulate", "image_size", "palette", "log_every_steps", "eval_every_steps",
                       "checkpoint_every_steps", "keep_newest", "keep_steps", "max_skipped_updates"})

log = logging.getLogger(__name__)
orbax_s3.teach()


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself."""
    config: PretrainConfig
    palette_VC: np.ndarray  # float32 [V, 3] in [-1, 1]
    image_size: int
    data_fingerprint: str
    steps_done: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # those of an evaluation at this step

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "config": to_dict(self.config), "palette": self.palette_VC.tolist(),
                "image_size": self.image_size, "data_fingerprint": self.data_fingerprint,
                "steps_done": self.steps_done, "metrics": dict(self.metrics)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Record":
        if value.get("format") != FORMAT:
            raise UserError(f"a checkpoint of format {value.get('format')!r} cannot be read here: format {FORMAT} is "
                            "the one that this version knows. Use the version that wrote it.")
        return cls(config=parse("pretrain", value["config"]), palette_VC=np.asarray(value["palette"], np.float32),
                   image_size=value["image_size"], data_fingerprint=value["data_fingerprint"],
                   steps_done=value["steps_done"], metrics=value["metrics"])

    def check_continues(self, new: "Record", where: str) -> None:
        """Raises UserError, naming each difference, where the run `new` is not the one that wrote this checkpoint."""
        optimizer = self.config.optimizer
        independent = optimizer.schedule == "constant" and optimizer.warmup_steps >= 0
        free = FREE_KEYS | ({"steps"} if independent else set())
        mine, others = _flat(to_dict(self.config)), _flat(to_dict(new.config))
        differences = [f"{key}={others[key]!r} (checkpoint: {mine[key]!r})" for key in mine
                       if mine[key] != others[key] and key not in free and not key.startswith("mesh.")]
        if self.image_size != new.image_size:
            differences.append(f"images of {new.image_size} pixels (checkpoint: {self.image_size})")
        if not np.array_equal(self.palette_VC, new.palette_VC):
            differences.append("another palette")
        if self.data_fingerprint != new.data_fingerprint:
            differences.append("another pixel store or split")
        if differences:
            raise UserError(f"the run in {where} was started with other settings: {'; '.join(differences)}. "
                            "Give the same, or a new --workdir.")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


class Checkpoints:
    """The checkpoints of one training run, in WORKDIR/checkpoints/STEP. Leaving its context waits for saves."""

    def __init__(self, workdir: str, config: PretrainConfig):
        policies = ocp.training.preservation_policies
        self._where = workdir
        self._orbax = ocp.training.Checkpointer(
            storage.absolute(storage.path(workdir)) / "checkpoints",
            # The loop decides when to save; Orbax's own default silently skips steps while a save runs.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([
                policies.LatestN(config.keep_newest),
                policies.CustomSteps(config.keep_steps),
                policies.BestN(get_metric_fn=lambda metrics: metrics["eval/nats_per_pixel"], reverse=True, n=1,
                               keep_checkpoints_without_metrics=False),
            ]),
            cleanup_tmp_directories=True)

    @property
    def latest_step(self) -> int | None:
        """Finished steps of the newest checkpoint, or None."""
        return self._orbax.latest.step if self._orbax.latest else None

    def save(self, state: State, record: Record) -> None:
        """Starts to save; returns once the arrays are copied, so that the next step may overwrite them.

        Args:
          state: the state after `record.steps_done` steps.
          record: written beside it; its metric `eval/nats_per_pixel` decides which checkpoint is the best.
        """
        if self.latest_step == record.steps_done:
            return
        params, training = _split(state)
        response = self._orbax.save_checkpointables_async(
            record.steps_done, {"params": params, "training": training}, force=True,
            metrics=dict(record.metrics) or None, custom_metadata=record.to_json())
        if response is None:
            raise RuntimeError(f"Orbax declined to save step {record.steps_done} in {self._where}.")

    def restore(self, abstract: State, record: Record) -> tuple[State, Record]:
        """The newest state, in the shardings of `abstract`, and its record.

        Raises:
          UserError: the run that `record` describes is not the one that wrote it.
        """
        step = self.latest_step
        stored = Record.from_json(self._orbax.checkpointables_metadata(step).custom_metadata)
        stored.check_continues(record, self._where)
        params, training = _split(abstract)
        trees = self._orbax.load_checkpointables(step, {"params": params, "training": training})
        return {"params": trees["params"], **trees["training"]}, stored

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._orbax.close()


def _split(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    return state["params"], {name: value for name, value in state.items() if name != "params"}


def locate(typed: str) -> tuple[str, int]:
    """(directory of steps, step) of a workdir (its newest step) or of one step of it. Raises UserError."""
    if not typed:
        raise UserError("checkpoint is empty. Name a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    path = storage.path(typed)
    if path.name.isdigit() and (path / COMMITTED).exists():
        return str(path.parent), int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").exists() else path
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"checkpoint {typed!r} holds no checkpoint. "
                        "Name a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    return str(folder), steps[-1]


def is_checkpoint(typed: str) -> bool:
    """Whether `locate` finds a finished step."""
    try:
        return bool(locate(typed))
    except UserError:
        return False


def steps_in(folder: Any) -> list[int]:
    """The finished steps in a directory of checkpoints, ascending; what is still being written does not count."""
    folder = storage.path(folder)
    if not folder.exists():
        return []
    steps = (child for child in folder.iterdir() if child.name.isdigit())
    return sorted(int(step.name) for step in steps if (step / COMMITTED).exists())


def _step_path(folder: str, step: int) -> storage.epath.Path:
    return storage.absolute(storage.path(folder)) / str(step)


def load_record(typed: str) -> Record:
    """What the checkpoint `typed` says of itself. Raises UserError where there is none."""
    folder, step = locate(typed)
    metadata = ocp.checkpointables_metadata(_step_path(folder, step))
    return Record.from_json(metadata.custom_metadata)


def load_model(typed: str, mesh: Mesh, precision: str, attention: str = "auto") -> tuple[Model, dict[str, Any], Record]:
    """The model of a checkpoint with its parameters alone, read straight into `mesh`, and the checkpoint's record.

    Args:
      typed: a workdir of pretrain (its newest step), or one step of it.
      mesh: where the parameters go, by the same rules as in training.
      precision: of the computation; parameters come as float32 (float64 in that mode).
      attention: the back-end, whatever the training used.

    Raises:
      UserError: no checkpoint there.
    """
    folder, step = locate(typed)
    record = load_record(typed)
    config: ModelConfig = dataclasses.replace(record.config.model, attention=attention)
    model = Model(config, len(record.palette_VC), record.image_size, precision, mesh)
    abstract = model.abstract_parameters()
    abstract = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                            abstract, sharding.parameter_shardings(abstract, mesh))
    with _partial_load():  # what the model has no place for, such as a class head, stays on disk
        params = ocp.load_checkpointables(_step_path(folder, step), {"params": abstract})["params"]
    return model, params, record


def _partial_load(read_bytes: int | None = None) -> ocp.Context:
    """To read in: parameters that are not asked for are left out; at most `read_bytes` are on their way at once."""
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    context.memory_options.read_concurrent_bytes = read_bytes
    return context


# One parameter at a time, for converting weights larger than memory. Paths are keys of the tree: ("blocks", "up_DF").

def parameter_shapes(typed: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of the parameters that the checkpoint `typed` holds, by path. Raises UserError where there is none."""
    tree = ocp.checkpointables_metadata(_step_path(*locate(typed))).metadata["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}


def load_parameter(typed: str, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """One parameter of the checkpoint `typed`, float32, in the host's memory."""
    leaf: Any = np.empty(shape, np.float32)
    for name in reversed(path):
        leaf = {name: leaf}
    with _partial_load(64 * 2**20):
        tree = ocp.load_checkpointables(_step_path(*locate(typed)), {"params": leaf})["params"]
    return jax.tree.leaves(tree)[0]


def save_parameters(workdir: str, params: dict[str, Any], record: Record) -> None:
    """Writes WORKDIR/checkpoints/STEP with parameters alone; arrays of mapped files stay out of memory.

    Its arrays are files of their own, in chunks of 16 MiB: Orbax's usual single database holds all that it is to write
    in memory until the end.
    """
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False
    context.array_options.saving.storage_options.chunk_byte_size = 16 * 2**20
    context.memory_options.write_concurrent_bytes = 64 * 2**20
    context.memory_options.deepcopy_host_arrays = False
    with context, _quiet():
        ocp.save_checkpointables(_step_path(str(storage.path(workdir) / "checkpoints"), record.steps_done),
                                 {"params": params}, custom_metadata=record.to_json(), overwrite=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that there is no database to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
