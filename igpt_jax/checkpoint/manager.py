"""Manages the checkpoints of one training run: asynchronous saves, retention, restore with fallback."""

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
from igpt_jax.checkpoint.arrays import (
    AbstractOf,
    barrier,
    from_process_0,
    load_state,
    metadata_for_all,
    of_process_0,
    save_context,
    split_state,
)
from igpt_jax.checkpoint.metadata import EVALUATION, Metadata, read_metadata
from igpt_jax.checkpoint.step_folders import QUARANTINE, steps_in
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.parallel import checksums
from igpt_jax.runtime.exits import Unsaved
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)

ATTEMPTS = 3  # at a save that must succeed
LONGEST_PAUSE = 64.0  # seconds between retries of other saves


class Checkpoints:
    """The checkpoints of one training run, in WORKDIR/checkpoints/STEP. Leaving its context waits for saves.

    Saving is asynchronous. `save` returns once the arrays are copied. A thread then waits for the disk, hashes the
    written files and removes superseded steps. A failed save is logged in one line, counted in `failed_saves`, and
    retried by the caller when `retry_due`.
    """

    def __init__(self, workdir: str, config: PretrainConfig, held_out_fingerprint: str = ""):
        self._workdir, self._folder = workdir, storage.absolute(storage.path(workdir)) / "checkpoints"
        self._keep_newest, self._keep_steps = config.keep_newest, set(config.keep_steps)
        self._held_out = held_out_fingerprint  # of the images that this run is evaluated on; empty: none
        # `Metadata.evaluated_on` of metrics on the images that this run is evaluated on
        self._same_images = {self._held_out, config.data.held_out} - {""}
        self._scores: dict[int, float] = {}  # of the steps evaluated on these images
        self._evaluated: set[int] = set()  # on any images
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish checkpoint")
        self._saving: Future | None = None
        self._problem, self._retry_at, self._pause = "", 0.0, 1.0
        self.failed_saves = 0
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            step_folders.sweep(self._folder)
        barrier("leftovers of killed runs are removed")
        # A resumed run must still know which of the earlier steps is the best, or it would remove it. All processes
        # agree on it, since it decides when to stop early.
        evaluated = from_process_0(self._evaluated_before)
        self._evaluated.update(step for step, _, _ in evaluated)
        # Losses of other images do not compare. A run that evaluates no more keeps the best on its newest images.
        same = self._same_images or {images for _, images, _ in evaluated[-1:]}
        self._scores.update((step, score) for step, images, score in evaluated if images in same)

    def _evaluated_before(self) -> list[tuple[int, str, float]]:
        """(step, `Metadata.evaluated_on`, score) of the evaluated steps on disk, ascending."""
        found = []
        for step in self.steps:
            with contextlib.suppress(Damaged, UserError):  # reported when the step is restored
                stored = read_metadata(self._folder, step)
                if math.isfinite(score := _score(stored.metrics)):
                    found.append((step, stored.evaluated_on, score))
        return found

    @property
    def steps(self) -> list[int]:
        """The finished steps, ascending."""
        return steps_in(self._folder)

    @property
    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The best evaluated step: by held-out accuracy, or by loss without classes. None if no step was evaluated."""
        return max(self._scores, key=self._scores.__getitem__, default=None)

    @property
    def best_saved_step(self) -> int | None:
        """The best of the evaluated steps that are on disk: others may have failed to save, or be in quarantine."""
        return max((step for step in self.steps if step in self._scores), key=self._scores.__getitem__, default=None)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation of the step gave finite metrics."""
        return step in self._evaluated

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of an evaluation to the choice of the best step."""
        if math.isfinite(score := _score(metrics)):
            self._scores[step] = score
            self._evaluated.add(step)

    def save(self, state: dict[str, Any], metadata: Metadata, blocking: bool = False, supersedes: bool = True) -> None:
        """Starts to save. Returns once the arrays are copied, so that the next step may overwrite them.

        Args:
          state: the training state after `metadata.steps_done` steps.
          metadata: saved with the state; its metrics decide which checkpoint is the best.
          blocking: wait until the step is on disk, and retry if the save fails.
          supersedes: whether older steps may be removed after this save; False if this step may be worse.

        Raises:
          Unsaved: `blocking`, and all attempts failed.
        """
        for attempt in range(ATTEMPTS if blocking else 1):
            if attempt:
                time.sleep(2**attempt)  # seconds: a full disk or a bucket out of reach may recover
            # Only one save runs at a time: a second one would hold another copy of the state in host memory.
            self.wait()
            if metadata.steps_done in self.steps:  # for example, a stop right after a regular save
                return
            self._start(state, metadata, supersedes)
            if blocking:
                self.wait()
            if not self._problem:
                return
        if blocking:
            raise Unsaved(f"step {metadata.steps_done:,} could not be saved: {self._problem}. Free disk space, or fix "
                          f"{self._folder}. The same command then resumes from step {self.latest_step or 0:,}.")

    def _start(self, state: dict[str, Any], metadata: Metadata, supersedes: bool) -> None:
        """Copies the arrays, starts to write them, and leaves the rest to `_finish` in the thread."""
        params, training = split_state(state)
        # The checksums are of the arrays on the devices, so that they also reveal errors of copying and writing.
        metadata = dataclasses.replace(metadata, checksums=checksums.of_tree(state),
                                       held_out_fingerprint=self._held_out)
        try:
            if self._problem and jax.process_index() == 0:  # the failed save may have left files
                with contextlib.suppress(Exception):  # then this one fails too, or they do not matter
                    step_folders.sweep(self._folder)
            with save_context():
                response = ocp.save_checkpointables_async(
                    self._folder / str(metadata.steps_done), {"params": params, "training": training},
                    custom_metadata=hashes.sealed(metadata.to_json()))
        except Exception as error:  # storage clients raise many kinds, and none of them may end the training
            self._failed(metadata.steps_done, error)
            return
        self._saving = self._thread.submit(self._finish, response, metadata, supersedes)

    def _finish(self, response: Any, metadata: Metadata, supersedes: bool) -> None:
        """Waits until the step is on disk, hashes its files and removes superseded steps. Runs in the thread."""
        # The order makes a kill harmless at any moment. Orbax writes into a temporary folder and renames it at the end,
        # so a step is whole or absent. Older steps are removed last, so there is always one whole step.
        try:
            response.result()
            if jax.process_index() == 0:
                # Read back from the disk, so that the hashes are of the files as they were written.
                hashes.write_hashes(self._folder / str(metadata.steps_done))
                self.note(metadata.steps_done, metadata.metrics)
            self._problem, self._pause = "", 1.0
        except Exception as error:
            return self._failed(metadata.steps_done, error)
        try:
            if jax.process_index() == 0 and supersedes:
                self._remove_superseded()
        except Exception as error:  # the step is saved all the same; the next save tries again
            log.warning("Steps before %s could not be removed: %s", f"{metadata.steps_done:,}", error)

    def _failed(self, step: int, error: Exception) -> None:
        """Counts and logs a failed save, and sets the time of the next attempt."""
        self.failed_saves += 1
        self._problem = next(iter(str(error).splitlines()), "") or type(error).__name__
        self._retry_at, self._pause = time.monotonic() + self._pause, min(2 * self._pause, LONGEST_PAUSE)
        log.error("Step %s could not be saved: %s. Training continues.", f"{step:,}", self._problem)

    def wait(self) -> None:
        """Waits until the save in progress, if any, has ended."""
        if self._saving:
            self._saving.result()
            self._saving = None

    @property
    def retry_due(self) -> bool:
        """Whether the last save failed and it is time to retry it. Always False with several processes."""
        # Several processes would have to agree on the moment; their next regular save is the retry.
        idle = not self._saving or self._saving.done()
        return bool(idle and self._problem and time.monotonic() >= self._retry_at) and jax.process_count() == 1

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a later evaluation to a saved step."""
        if jax.process_index() == 0:
            sealed = hashes.sealed({"metrics": dict(metrics), "held_out_fingerprint": self._held_out})
            storage.publish(self._folder / str(step) / EVALUATION, json.dumps(sealed))
        self.note(step, metrics)

    def data_offset(self, step: int, metadata: Metadata) -> int | None:
        """The data offset of a step; None where it is damaged, or was trained with other settings than `metadata`'s."""
        with contextlib.suppress(Damaged, UserError):
            stored = read_metadata(self._folder, step)
            return None if stored.check_resumable(metadata, self._workdir) else stored.data_offset
        return None

    def check_resumable(self, metadata: Metadata) -> None:
        """Raises the UserError of `restore` where another run wrote the newest good step; reads no arrays."""
        for step in reversed(of_process_0(self.steps)):
            with contextlib.suppress(Damaged):  # `restore` reports it
                metadata_for_all(self._folder, step).check_resumable(metadata, self._workdir)
                return

    def restore(self, abstract_of: AbstractOf, metadata: Metadata, at: int | None = None
                ) -> tuple[dict[str, Any], Metadata] | None:
        """Restores the newest good step. Damaged steps are logged and moved to WORKDIR/quarantine.

        Args:
          abstract_of: the state of a run with a config, as abstract arrays with the shardings to restore into.
          metadata: describes the run that resumes.
          at: the newest step to consider; None: all.

        Returns:
          (state, its metadata), or None if nothing was saved yet. The metadata lists the accepted changes of settings,
          and has no metrics if they are of other images than this run is evaluated on.

        Raises:
          UserError: another run wrote the checkpoint, or all steps are damaged.
        """
        # A shared disk may show each process other steps, and they would take each other's for damaged.
        steps = [step for step in of_process_0(self.steps) if at is None or step <= at]
        for step in reversed(steps):
            # Damage is raised on all processes or on none, so all of them try the same older step next.
            with self._quarantined_if_damaged(step):
                stored = metadata_for_all(self._folder, step)
                changes = stored.check_resumable(metadata, self._workdir)
                if stored.versions and stored.versions != metadata.versions:
                    log.warning("The checkpoint was written with other versions. The run resumes, but results may "
                                "differ in the last bits: %s",
                                "; ".join(f"{name} {stored.versions.get(name)}, now {now}" for name, now in
                                          metadata.versions.items() if stored.versions.get(name) != now))
                metrics = stored.metrics if stored.evaluated_on in self._same_images else {}
                return (load_state(self._folder, step, abstract_of, metadata, stored),
                        dataclasses.replace(stored, metrics=metrics, changes=(*stored.changes, *changes)))
        quarantine = self._folder.parent / QUARANTINE
        if quarantine.exists() and any(quarantine.iterdir()):
            raise UserError(f"all checkpoints of {self._workdir} are damaged: see {quarantine}. Copy a good one to "
                            f"{self._folder}, or remove {quarantine} to train from the start.")
        return None

    @contextlib.contextmanager
    def _quarantined_if_damaged(self, step: int) -> Iterator[None]:
        """Moves the step to quarantine if the code inside raises Damaged, on all processes, and swallows the error."""
        problem = None
        try:
            yield
        except Damaged as damage:
            problem = str(damage)
        if problem:
            log.error("Checkpoint %s is damaged: %s. It is moved to %s/, and an older one is used.", step, problem,
                      QUARANTINE)
            if jax.process_index() == 0:
                step_folders.quarantine(self._folder, step, problem)
            barrier(f"step {step} is in quarantine")

    def _remove_superseded(self) -> None:
        """Removes all steps but the newest, the named and the best. Call it only after a successful save."""
        for step in set(self.steps[:-self._keep_newest]) - self._keep_steps - {self.best_saved_step}:
            step_folders.remove(self._folder / str(step))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.wait()
        self._thread.shutdown()


def _score(metrics: Mapping[str, float]) -> float:
    """Held-out accuracy, or minus the loss of a run without classes; NaN if it was not evaluated."""
    return metrics.get("eval/accuracy", -metrics.get("eval/nats_per_pixel", math.nan))
