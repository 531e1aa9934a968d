"""Checkpoints: Orbax's files, each step self-describing and checked, so that other jobs need nothing but its path.

A step holds two trees, `params` and `training` (the rest of the state), so that jobs other than training read the
parameters alone, straight into their own mesh; and a record (JSON) of the config, the palette and the data.

What is read is believed only where it is what was written. The record has a CRC and holds a checksum of each array,
taken on the devices before anything was written and compared after restoring, on whatever mesh. SHA256SUMS, written
last, names the file that is damaged (`sha256sum -c SHA256SUMS` reads it too). A damaged step is moved to quarantine/
and the newest good one is used.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from igpt_jax import __version__, checksum, integrity, orbax_s3, sharding, step_folders, storage
from igpt_jax.config import ModelConfig, PretrainConfig, UserError, flat, parse, to_dict
from igpt_jax.integrity import Damaged
from igpt_jax.model import Model
from igpt_jax.step_folders import NUMBER, QUARANTINE, directory_of_steps, is_step, step_path, steps_in
from igpt_jax.steps import State

FORMAT = 2
WITHOUT_CHECKSUMS = 1  # the format that had none: still read, with a warning
RECORD = "_CHECKPOINT_METADATA"  # Orbax's file of a step that holds ours
EVALUATION = "evaluation.json"  # figures that came after the step was saved
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
ATTEMPTS, LONGEST_PAUSE = 3, 64.0  # of saving what must be saved; seconds between retries of what may wait
# Keys that may differ between a checkpoint and the run that goes on from it: they change neither the model nor what
# it sees. `steps` may differ too where neither the schedule nor the warm-up depends on it. (The record compares image
# size and palette themselves.)
FREE_KEYS = frozenset({"data.store", "data.held_out", "data.reader", "data.prefetch", "data.stage", "model.attention",
                       "model.remat", "model.unroll", "accumulate", "images_per_pass", "image_size", "palette",
                       "log_every_steps", "eval_every_steps", "checkpoint_every_steps", "keep_newest", "keep_steps",
                       "data.test", "patience", "wandb",
                       "max_skipped_updates", "skip_divergence", "accept_changes", "stall_seconds",
                       "compare_replicas_every_steps", "replay_check", "profile"})

log = logging.getLogger(__name__)
orbax_s3.teach()
# Orbax prints the stack of each failed save. What failed is told here, in one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class NoneGood(UserError):
    """What was named as a checkpoint is damaged, and there is no other step to use in its place; or not finite."""


class Unsaved(Exception):
    """A state that had to be saved could not be. The message says why, and which step is the newest on disk."""


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide what it computes."""
    return {"igpt_jax": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself."""
    config: PretrainConfig  # or FinetuneConfig
    palette_VC: np.ndarray  # float32 [V, 3] in [-1, 1]
    image_size: int
    data_fingerprint: str
    steps_done: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # those of an evaluation at this step
    data_offset: int = 0  # step s reads the examples of step s + data_offset of the order
    changes: tuple[Mapping[str, Any], ...] = ()  # accepted: {"step", "key", "from", "to"}
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by array; `Checkpoints.save` fills it in
    classes: int = 0  # of its class head; 0: it has none

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "format": FORMAT, "config": to_dict(self.config), "palette_VC": self.palette_VC.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Record":
        fields = {name: part for name, part in value.items() if name != "format"}
        if value.get("format") == WITHOUT_CHECKSUMS:
            fields = {**fields, "palette_VC": fields.pop("palette"), "versions": {}}
        elif value.get("format") != FORMAT:
            raise UserError(f"a checkpoint of format {value.get('format')!r} cannot be read here: format {FORMAT} is "
                            "the one that this version knows. Use the version that wrote it.")
        return cls(**{**fields, "config": parse(value["config"]["job"], value["config"]),
                      "palette_VC": np.asarray(fields["palette_VC"], np.float32)})

    def check_continues(self, new: "Record", where: str) -> tuple[Mapping[str, Any], ...]:
        """The accepted changes from the run that wrote this checkpoint to the run `new`.

        Raises:
          UserError: they differ in what `new.config.accept_changes` does not name; tells each difference.
        """
        optimizer = self.config.optimizer
        independent = optimizer.schedule == "constant" and optimizer.warmup_steps >= 0
        free = FREE_KEYS | ({"steps"} if independent else set())
        mine, others = flat(to_dict(self.config)), flat(to_dict(new.config))
        changes = {key: (mine[key], others[key]) for key in mine
                   if mine[key] != others[key] and key not in free and not key.startswith("mesh.")}
        if self.image_size != new.image_size:
            changes["image_size"] = (self.image_size, new.image_size)
        if not np.array_equal(self.palette_VC, new.palette_VC):
            changes["palette"] = (_digest(self.palette_VC), _digest(new.palette_VC))
        if self.data_fingerprint != new.data_fingerprint:
            changes["data"] = (self.data_fingerprint, new.data_fingerprint)
        refused = [f"{key}={after!r} (checkpoint: {before!r})" for key, (before, after) in changes.items()
                   if key not in new.config.accept_changes]
        if refused:
            raise UserError(f"the run in {where} was started with other settings: {'; '.join(refused)}. Give the "
                            "same, name the keys in --config.accept_changes, or give a new --workdir.")
        return tuple({"step": self.steps_done, "key": key, "from": before, "to": after}
                     for key, (before, after) in changes.items())


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one training run, in WORKDIR/checkpoints/STEP. Leaving its context waits for saves.

    Saving is asynchronous: `save` returns once the arrays are copied; a thread waits for the disk, hashes what is on
    it, and then removes superseded steps. A save that failed is told in one line, shows in `failed_saves`, and is
    tried again when `retry_due`.
    """

    def __init__(self, workdir: str, config: PretrainConfig):
        self._where, self._folder = workdir, storage.absolute(storage.path(workdir)) / "checkpoints"
        self._keep_newest, self._keep_steps = config.keep_newest, set(config.keep_steps)
        self._scores: dict[int, float] = {}  # of the evaluated steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish checkpoint")
        self._saving: Future | None = None
        self._problem, self._retry_at, self._pause = "", 0.0, 1.0
        self.failed_saves = 0
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            step_folders.sweep(self._folder)
        _meet("checkpoints are swept")
        for step in self.steps:
            with contextlib.suppress(Damaged, UserError):  # whoever restores it will say so
                self.note(step, _read_record(self._folder, step).metrics)

    @property
    def steps(self) -> list[int]:
        """All that there are, ascending."""
        return steps_in(self._folder)

    @property
    def latest_step(self) -> int | None:
        """Finished steps of the newest checkpoint, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The best of the evaluated steps by held-out accuracy, without classes by loss; None where there is none."""
        return max(self._scores, key=self._scores.__getitem__, default=None)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation of a step gave finite figures."""
        return step in self._scores

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Lets the figures of an evaluation count in the choice of the best step."""
        score = metrics.get("eval/accuracy", -metrics.get("eval/nats_per_pixel", math.nan))
        if math.isfinite(score):
            self._scores[step] = score

    def save(self, state: State, record: Record, surely: bool = False, supersedes: bool = True) -> None:
        """Starts to save; returns once the arrays are copied, so that the next step may overwrite them.

        Args:
          state: the state after `record.steps_done` steps.
          record: written beside it; its metrics decide which checkpoint is the best.
          surely: wait until it is on disk, and try again where it fails.
          supersedes: older steps may be removed for it; not where it may be worse than they are.

        Raises:
          Unsaved: `surely`, and it failed three times.
        """
        for attempt in range(ATTEMPTS if surely else 1):
            if attempt:
                time.sleep(2**attempt)
            self.wait()
            if record.steps_done in self.steps:
                return
            self._start(state, record, supersedes)
            if surely:
                self.wait()
            if not self._problem:
                return
        if surely:
            raise Unsaved(f"step {record.steps_done:,} could not be saved: {self._problem}. Make room or mend "
                          f"{self._folder}: the same command then goes on from step {self.latest_step or 0:,}.")

    def _start(self, state: State, record: Record, supersedes: bool) -> None:
        params, training = _split(state)
        record = dataclasses.replace(record, checksums=checksum.of_tree(state))
        try:
            if self._problem and jax.process_index() == 0:
                step_folders.sweep(self._folder)
            with _saving():
                response = ocp.save_checkpointables_async(
                    self._folder / str(record.steps_done), {"params": params, "training": training},
                    custom_metadata=integrity.sealed(record.to_json()))
        except Exception as error:  # whatever the storage's client raises: training goes on
            self._failed(record.steps_done, error)
            return
        self._saving = self._thread.submit(self._finish, response, record, supersedes)

    def _finish(self, response: Any, record: Record, supersedes: bool) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                integrity.write_hashes(self._folder / str(record.steps_done))
                self.note(record.steps_done, record.metrics)
                if supersedes:
                    self._remove_superseded()
            self._problem, self._pause = "", 1.0
        except Exception as error:
            self._failed(record.steps_done, error)

    def _failed(self, step: int, error: Exception) -> None:
        self.failed_saves += 1
        self._problem = next(iter(str(error).splitlines()), "") or type(error).__name__
        self._retry_at, self._pause = time.monotonic() + self._pause, min(2 * self._pause, LONGEST_PAUSE)
        log.error("Step %s could not be saved: %s. Training goes on.", f"{step:,}", self._problem)

    def wait(self) -> None:
        """Returns when nothing is being saved any more."""
        if self._saving:
            self._saving.result()
            self._saving = None

    @property
    def retry_due(self) -> bool:
        """Whether the last save failed and it is time to try again. Several processes wait for the next save due."""
        idle = not self._saving or self._saving.done()
        return bool(idle and self._problem and time.monotonic() >= self._retry_at) and jax.process_count() == 1

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds to a saved step the figures of an evaluation that came later."""
        if jax.process_index() == 0:
            sealed = integrity.sealed({"metrics": dict(metrics)})
            storage.publish(self._folder / str(step) / EVALUATION, json.dumps(sealed))
        self.note(step, metrics)

    def restore(self, abstract: State, record: Record, at: int | None = None) -> tuple[State, Record] | None:
        """The newest good state, in the shardings of `abstract`, with its record; None where nothing was saved yet.

        Newer ones that are damaged are moved to WORKDIR/quarantine, each with a line that says what is wrong. The
        returned record holds the changes of settings that `record` accepts. Steps after `at` are passed over.

        Raises:
          UserError: the run that `record` describes is not the one that wrote it; or all steps are damaged.
        """
        for step in reversed([step for step in self.steps if at is None or step <= at]):
            with self._quarantined_if_damaged(step):
                stored = _read_record(self._folder, step)
                changes = stored.check_continues(record, self._where)
                if stored.versions and stored.versions != record.versions:
                    log.warning("The checkpoint was written with other versions: the run goes on, but not bit for bit. "
                                "%s", "; ".join(f"{name} {stored.versions.get(name)}, now {now}" for name, now in
                                                record.versions.items() if stored.versions.get(name) != now))
                params, training = _split(abstract)
                trees = _load(self._folder, step, {"params": params, "training": training}, stored)
                return ({"params": trees["params"], **trees["training"]},
                        dataclasses.replace(stored, changes=(*stored.changes, *changes)))
        quarantine = self._folder.parent / QUARANTINE
        if quarantine.exists() and any(quarantine.iterdir()):
            raise UserError(f"all checkpoints of {self._where} are damaged: see {quarantine}. Put a good copy into "
                            f"{self._folder}, or remove {quarantine} to train from the start.")
        return None

    @contextlib.contextmanager
    def _quarantined_if_damaged(self, step: int) -> Iterator[None]:
        """Moves a step away where the code inside raises Damaged on any process; then nothing is raised."""
        problem = None
        try:
            yield
        except Damaged as damage:
            problem = str(damage)
        if problem:
            log.error("Checkpoint %s is damaged: %s. It goes to %s/, and an older one is used.", step, problem,
                      QUARANTINE)
            if jax.process_index() == 0:
                step_folders.quarantine(self._folder, step, problem)
            _meet(f"step {step} is in quarantine")

    def _remove_superseded(self) -> None:
        """Keeps the newest, the named and the best steps. Runs after a save has succeeded, so one always stays."""
        steps = self.steps
        best = max((step for step in steps if step in self._scores), key=self._scores.__getitem__, default=None)
        for step in set(steps[:-self._keep_newest]) - self._keep_steps - {best}:
            step_folders.remove(self._folder / str(step))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.wait()
        self._thread.shutdown()


def _saving() -> ocp.Context:
    """For saving. Where the folders of a step cannot be made, Orbax's threads wait five minutes for them and hold their
    copies of the arrays as long. So one process makes them first; several would wait for the one that failed."""
    context = ocp.Context()
    context.async_options.create_directories_asynchronously = jax.process_count() > 1
    return context


def _split(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    return state["params"], {name: value for name, value in state.items() if name != "params"}


def _meet(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def _float64(needed: bool) -> Iterator[None]:
    """Lets 64-bit types be read, in Orbax's threads too: `jax.enable_x64` holds for one thread only."""
    former = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", former or needed)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", former)


# What is on disk against what was written.

def _read_record(folder: Any, step: int) -> Record:
    """What a step says of itself. Raises Damaged, which a step of another number is too, or UserError for a format that
    is not known."""
    path = step_path(folder, step)
    value = integrity.read_json(path / RECORD)
    try:
        value = value["custom_metadata"]
        old = value.get("format") == WITHOUT_CHECKSUMS
        record = Record.from_json(value if old else integrity.unsealed(value, RECORD))
    except (TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{RECORD} is not a record: {error!r}") from None
    if record.steps_done != step:
        raise Damaged(f"its record is that of step {record.steps_done}")
    try:
        return dataclasses.replace(record, metrics={**record.metrics, **_later_metrics(path)})
    except Damaged as damage:  # the step itself is good
        log.error("%s: %s. Its figures are not used.", path, damage)
        return record


def _later_metrics(path: Any) -> Mapping[str, float]:
    """The figures of a step that came after it was saved; none where none came. Raises Damaged."""
    if not (path / EVALUATION).exists():
        return {}
    try:
        return dict(integrity.unsealed(integrity.read_json(path / EVALUATION), EVALUATION)["metrics"])
    except (TypeError, KeyError, AttributeError, ValueError):
        raise Damaged(f"{EVALUATION} holds no figures") from None


def _load(folder: Any, step: int, trees: dict[str, Any], record: Record) -> dict[str, Any]:
    """The arrays of a step, in the shardings of the abstract `trees`, checked. Raises Damaged, on all processes."""
    path, problem, loaded, hashed = step_path(folder, step), None, {}, False
    try:
        hashed = jax.process_index() == 0 and integrity.check_hashes(path, unread={"params", "training"} - set(trees))
        try:
            loaded = ocp.load_checkpointables(path, trees)
        except Exception as error:
            # All files are what they were: then it is no damage, but no memory left, or no network.
            if hashed or isinstance(error, OSError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise Damaged(f"it cannot be read: {next(iter(str(error).splitlines()), repr(error))}") from error
    except Damaged as damage:
        problem = str(damage)
    if jax.process_count() > 1:
        bad_P = multihost_utils.process_allgather(np.int32(problem is not None))
        problem = problem or (f"process {bad_P.argmax()} says so" if bad_P.any() else None)
    if not problem and record.checksums:
        state = {name: tree for name, tree in loaded.items() if name != "training"} | loaded.get("training", {})
        if array := checksum.difference(record.checksums, checksum.of_tree(state)):
            problem = f"the array {array} is not what was saved"
    if problem:
        raise Damaged(problem)
    if not record.checksums:
        log.warning("Checkpoint %s has no checksums of its arrays: %s.", path,
                    "its files alone are as they were written" if hashed else "it is used as it is")
    return loaded


def verify(typed: str, step: int, mesh: Mesh) -> dict[str, Any]:
    """Reads a whole step, compares all that it can be compared with, and leaves it where it is.

    Args:
      typed: the directory of steps.
      step: to read.
      mesh: its devices hold the arrays, split wherever they divide.

    Returns:
      `problem`: None, or what is damaged; `bytes` of its files; `arrays` compared; and the seconds that both took,
      `hash_seconds` and `array_seconds`.
    """
    path, found = step_path(typed, step), {"problem": None, "arrays": 0, "hash_seconds": 0.0, "array_seconds": 0.0}
    everywhere = tuple(mesh.axis_names)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        dim = next((dim for dim, size in enumerate(leaf.shape) if size % mesh.size == 0 and size), None)
        spec = PartitionSpec(*(everywhere if d == dim else None for d in range(len(leaf.shape))))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    try:
        record = _read_record(typed, step)
        _later_metrics(path)
        start = time.perf_counter()
        integrity.check_hashes(path)
        found["hash_seconds"] = time.perf_counter() - start
        files = integrity.files_of(path) if storage.is_local(path) else None
        found["bytes"] = files and sum((path / file).stat().length for file in files)
        try:
            with _float64(True):
                trees = ocp.checkpointables_metadata(path).metadata
                trees = jax.tree.map(place, {name: trees[name] for name in ("params", "training") if name in trees})
                start = time.perf_counter()
                _load(typed, step, trees, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"its metadata cannot be read: {error}") from None
        found["array_seconds"] = time.perf_counter() - start
        found["arrays"] = len(record.checksums)
    except Damaged as damage:
        found["problem"] = str(damage)
    return found


# For other jobs.

def steps_of(typed: str) -> tuple[str, list[int]]:
    """(directory of steps, steps ascending) of a workdir, of such a directory, or of one step. Raises UserError."""
    if not typed:
        raise UserError("checkpoint is empty. Name a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    path = storage.path(typed)
    storage.absolute(path)  # refuses what cannot be read
    if is_step(path):
        path = step_folders.resolved(path)
        if not NUMBER.fullmatch(path.name):
            raise UserError(f"checkpoint {typed!r} is a step in a folder of another name. Rename it to its number.")
        return str(path.parent), [int(path.name)]
    folder = directory_of_steps(path)
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"checkpoint {typed!r} holds no checkpoint. "
                        "Name a workdir of pretrain, or one step of it (DIR/checkpoints/STEP).")
    return str(folder), steps


def locate(typed: str) -> tuple[str, int]:
    """(directory of steps, step) of a workdir (its newest step) or of one step of it. Raises UserError."""
    folder, steps = steps_of(typed)
    return folder, steps[-1]


def is_checkpoint(typed: str) -> bool:
    """Whether `locate` finds a finished step."""
    try:
        return bool(locate(typed))
    except UserError:
        return False


def load_record(typed: str) -> Record:
    """What the checkpoint `typed` says of itself. Raises UserError where there is none."""
    return _newest_good(typed, _read_record)


def identity(typed: str) -> str:
    """A digest that changes with any parameter of the step `typed`. Raises UserError where it is none.

    The record holds the arrays' checksums; of a checkpoint without these, SHA256SUMS stands for its arrays.
    """
    path = step_path(*locate(typed))
    data = storage.read(path / RECORD)
    if not load_record(typed).checksums and (path / integrity.HASHES).exists():
        data += storage.read(path / integrity.HASHES)
    return hashlib.sha256(data).hexdigest()[:16]


def require_objective(record: Record, objective: str, typed: str) -> None:
    """Raises UserError where the checkpoint `typed` was not trained with `objective`."""
    if record.config.objective != objective:
        raise UserError(f"checkpoint {typed} was trained with objective={record.config.objective}, not {objective}. "
                        f"Say so: --config.objective={record.config.objective}, or give another checkpoint.")


def load_model(typed: str, mesh: Mesh, precision: str, attention: str = "auto") -> tuple[Model, dict[str, Any], Record]:
    """The model of a checkpoint with its parameters alone, read straight into `mesh`, and the checkpoint's record.

    Args:
      typed: a workdir of pretrain (its newest good step), or one step of it.
      mesh: where the parameters go, by the same rules as in training.
      precision: of the computation; parameters come as float32 (float64 in that mode).
      attention: the back-end, whatever the training used.

    Raises:
      UserError: no checkpoint there, or none that is what was written; or its weights are not finite.
    """
    def load(folder: str, step: int) -> tuple[Model, dict[str, Any], Record]:
        record = _read_record(folder, step)
        config: ModelConfig = dataclasses.replace(record.config.model, attention=attention)

        def model_for(precision: str) -> Model:
            return Model(config, len(record.palette_VC), record.image_size, precision, mesh,
                         record.config.hidden_share, record.classes)

        # Checked in the dtype in which they were saved: what they are cast to has another checksum.
        with _float64(record.config.precision == "float64"):
            abstract = model_for(record.config.precision).abstract_parameters()
            abstract = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                                    abstract, sharding.parameter_shardings(abstract, mesh))
            with partial_load():  # what the model has no place for, such as a class head, stays on disk
                params = _load(folder, step, {"params": abstract}, record)["params"]
        model = model_for(precision)
        params = jax.tree.map(lambda p, like: p.astype(like.dtype), params, model.abstract_parameters())
        if arrays := checksum.not_finite(params):
            raise NoneGood(f"checkpoint {step_path(folder, step)}: its weights are not finite (NaN or infinity in "
                           f"{arrays[0]}, {len(arrays)} of {len(checksum.flat(params))} arrays). The training that "
                           "saved them diverged. Name an earlier step (DIR/checkpoints/STEP).")
        return model, params, record

    return _newest_good(typed, load)


def _newest_good(typed: str, read: Any) -> Any:
    """`read(folder, step)` of the checkpoint `typed`; where that is a workdir, of its newest step that is good."""
    folder, steps = steps_of(typed)
    for step in reversed(steps):
        try:
            return read(folder, step)
        except Damaged as damage:
            problem = f"checkpoint {step_path(folder, step)} is damaged: {damage}"
            if step != steps[0]:
                log.error("%s. An older one is used.", problem)
    raise NoneGood(f"{problem}. Name another step.")


def partial_load() -> ocp.Context:
    """For reading: parameters that are not asked for are left out."""
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    return context
