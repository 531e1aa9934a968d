"""The checkpoints of one training run: asynchronous saves, retention, restore with fallback."""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from igpt_jax import storage
from igpt_jax.checkpoint import step_folders
from igpt_jax.checkpoint.arrays import barrier, load_arrays, quiet_saves, split_state
from igpt_jax.checkpoint.metadata import EVALUATION, Metadata, read_metadata
from igpt_jax.checkpoint.step_folders import QUARANTINE, steps_in
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.parallel import checksums
from igpt_jax.runtime.exits import Unsaved
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)


ATTEMPTS, LONGEST_PAUSE = 3, 64.0  # of saving what must be saved; seconds between retries of what may wait


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
        self.quiet_saves: Future | None = None
        self._problem, self._retry_at, self._pause = "", 0.0, 1.0
        self.failed_saves = 0
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            step_folders.sweep(self._folder)
        barrier("checkpoints are swept")
        for step in self.steps:
            with contextlib.suppress(Damaged, UserError):  # whoever restores it will say so
                self.note(step, read_metadata(self._folder, step).metrics)

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

    def save(self, state: dict[str, Any], record: Metadata, blocking: bool = False, supersedes: bool = True) -> None:
        """Starts to save; returns once the arrays are copied, so that the next step may overwrite them.

        Args:
          state: the state after `record.steps_done` steps.
          record: written beside it; its metrics decide which checkpoint is the best.
          blocking: wait until it is on disk, and try again where it fails.
          supersedes: older steps may be removed for it; not where it may be worse than they are.

        Raises:
          Unsaved: `blocking`, and it failed three times.
        """
        for attempt in range(ATTEMPTS if blocking else 1):
            if attempt:
                time.sleep(2**attempt)
            self.wait()
            if record.steps_done in self.steps:
                return
            self._start(state, record, supersedes)
            if blocking:
                self.wait()
            if not self._problem:
                return
        if blocking:
            raise Unsaved(f"step {record.steps_done:,} could not be saved: {self._problem}. Make room or mend "
                          f"{self._folder}: the same command then goes on from step {self.latest_step or 0:,}.")

    def _start(self, state: dict[str, Any], record: Metadata, supersedes: bool) -> None:
        params, training = split_state(state)
        record = dataclasses.replace(record, checksums=checksums.of_tree(state))
        try:
            if self._problem and jax.process_index() == 0:
                step_folders.sweep(self._folder)
            with quiet_saves():
                response = ocp.save_checkpointables_async(
                    self._folder / str(record.steps_done), {"params": params, "training": training},
                    custom_metadata=hashes.sealed(record.to_json()))
        except Exception as error:  # whatever the storage's client raises: training goes on
            self._failed(record.steps_done, error)
            return
        self.quiet_saves = self._thread.submit(self._finish, response, record, supersedes)

    def _finish(self, response: Any, record: Metadata, supersedes: bool) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                hashes.write_hashes(self._folder / str(record.steps_done))
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
        if self.quiet_saves:
            self.quiet_saves.result()
            self.quiet_saves = None

    @property
    def retry_due(self) -> bool:
        """Whether the last save failed and it is time to try again. Several processes wait for the next save due."""
        idle = not self.quiet_saves or self.quiet_saves.done()
        return bool(idle and self._problem and time.monotonic() >= self._retry_at) and jax.process_count() == 1

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds to a saved step the figures of an evaluation that came later."""
        if jax.process_index() == 0:
            sealed = hashes.sealed({"metrics": dict(metrics)})
            storage.publish(self._folder / str(step) / EVALUATION, json.dumps(sealed))
        self.note(step, metrics)

    def restore(self, abstract: dict[str, Any], record: Metadata, at: int | None = None
                ) -> tuple[dict[str, Any], Metadata] | None:
        """The newest good state, in the shardings of `abstract`, with its record; None where nothing was saved yet.

        Newer ones that are damaged are moved to WORKDIR/quarantine, each with a line that says what is wrong. The
        returned record holds the changes of settings that `record` accepts. Steps after `at` are passed over.

        Raises:
          UserError: the run that `record` describes is not the one that wrote it; or all steps are damaged.
        """
        for step in reversed([step for step in self.steps if at is None or step <= at]):
            with self._quarantined_if_damaged(step):
                stored = read_metadata(self._folder, step)
                changes = stored.check_resumable(record, self._where)
                if stored.versions and stored.versions != record.versions:
                    log.warning("The checkpoint was written with other versions: the run goes on, but not bit for bit. "
                                "%s", "; ".join(f"{name} {stored.versions.get(name)}, now {now}" for name, now in
                                                record.versions.items() if stored.versions.get(name) != now))
                params, training = split_state(abstract)
                trees = load_arrays(self._folder, step, {"params": params, "training": training}, stored)
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
            barrier(f"step {step} is in quarantine")

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
