"""Metrics writers besides metrics.jsonl: TensorBoard always, Weights & Biases if `wandb` names a project."""

import contextlib
import importlib.util
import io
import logging
import os
import re
import secrets
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping

import jax

from igpt_jax import storage
from igpt_jax.config import PretrainConfig, UserError, to_dict
from igpt_jax.metrics.logging import Writer, say
from igpt_jax.storage import side_files

TENSORBOARD_FLUSH_SECONDS = 30.0
WANDB_START_SECONDS, WANDB_FINISH_SECONDS = 60.0, 15.0  # longest waits of a run; `wandb sync` sends the rest later
WANDB_ID = "wandb_id"  # file in the workdir: the id of the W&B run that all restarts write to


def check_installed(config: PretrainConfig) -> None:
    """Raises UserError if the config asks for a back-end that is not installed: on all processes, or on none."""
    if config.wandb:
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:  # a folder ./wandb, which W&B itself leaves, is not the package
            raise UserError(f"wandb={config.wandb!r}: Weights & Biases is not installed. "
                            "Install it with: pip install '.[wandb]'")


def open_writers(config: PretrainConfig, workdir: str) -> list[Writer]:
    """The back-ends of a run. Processes other than process 0 have none."""
    if jax.process_index():
        return []
    folder = storage.path(workdir)
    writers = [Harmless("TensorBoard", lambda: TensorBoard(os.fspath(folder / "tensorboard")))]
    if config.wandb:
        writers.append(Harmless("Weights & Biases", lambda: WeightsAndBiases(config, folder)))
    return writers


class Harmless:
    """A back-end that cannot harm training: its first failure is reported in one line and turns it off."""

    def __init__(self, name: str, open_backend: Callable[[], Writer]):
        self._name, self._backend = name, None
        with self._harmless():
            self._backend = open_backend()

    def write(self, step: int, unix_time: float, values: Mapping[str, float]) -> None:
        if self._backend:
            with self._harmless():
                self._backend.write(step, unix_time, values)

    def close(self) -> None:
        if self._backend:
            with self._harmless():
                self._backend.close()
            self._backend = None

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: no back-end is worth a run
            self._backend = None
            say(f"{self._name} is off for this run: {' '.join(str(error).split())}. metrics.jsonl continues.")


# TensorBoard.

class _BucketFile:
    """A file as tensorboardX expects it, for gs:// and s3://. Each flush publishes the whole content again."""

    def __init__(self, path: str):
        self._path, self._data = storage.path(path), io.BytesIO()

    def write(self, data: bytes) -> None:
        self._data.write(data)

    def flush(self) -> None:
        storage.publish(self._path, self._data.getvalue())

    close = flush


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Inside this context, importing `module` fails unless it was imported before."""
    hide = module not in sys.modules
    if hide:
        sys.modules[module] = None
    try:
        yield
    finally:
        if hide:
            del sys.modules[module]


class TensorBoard:
    """TensorBoard scalars in `folder`.

    The caller's thread writes the events. tensorboardX's SummaryWriter would pass them to its own thread. If that
    thread dies, for example on a full disk, its queue fills up and the training loop waits forever.
    """

    def __init__(self, folder: str):
        with _hidden("torch"):  # tensorboardX would import it needlessly, which takes seconds
            from tensorboardX import event_file_writer, record_writer, summary
            from tensorboardX.proto import event_pb2

        logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns about each NaN
        bucket = types.SimpleNamespace(open=_BucketFile, directory_check=lambda folder: None)
        for scheme in storage.SCHEMES:
            record_writer.register_writer_factory(scheme.removesuffix("://"), bucket)
        record_writer.directory_check(folder)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(f"{folder}/events")
        self._flushed = time.monotonic()

    def write(self, step: int, unix_time: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.write_event(self._event(wall_time=unix_time, step=step, summary=self._scalar(name, value)))
        if time.monotonic() - self._flushed > TENSORBOARD_FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


# Weights & Biases.

class WeightsAndBiases:
    """One W&B run per workdir, over all restarts. W&B's own process sends the data.

    `step` is logged as a metric and is the x-axis of all others. W&B's own step cannot be used: it only increases, and
    a run that resumes from a checkpoint repeats some steps. W&B's files are in the workdir, or in ./wandb if the
    workdir is in a bucket.
    """

    def __init__(self, config: PretrainConfig, folder: storage.Path):
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False,
                                  init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_FINISH_SECONDS)
        offline = wandb.setup(settings).settings.mode != "online"
        if not offline and not wandb.login(prompt=False, verify=False):  # a prompt would block the run
            raise UserError("nobody is logged in. Run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline")
        entity, _, project = config.wandb.rpartition("/")
        self._run = wandb.init(project=project, entity=entity or None, id=_wandb_id(folder), name=folder.name,
                               resume=None if offline else "allow",
                               dir=os.fspath(folder) if storage.is_local(folder) else None, config=to_dict(config))
        self._run.define_metric("*", step_metric="step")
        say("Weights & Biases: " + (f"offline; send it later with: wandb sync {self._run.settings.sync_dir}" if offline
                                    else self._run.url))

    def write(self, step: int, unix_time: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: storage.Path) -> str:
    """The id in a workdir's file WANDB_ID. Creates the file if there is none."""
    file = folder / WANDB_ID
    if file.exists():
        text = storage.read(file).decode(errors="replace").strip()
        if re.fullmatch(r"[\w-]{1,128}", text, re.ASCII):
            return text
        side_files.set_aside(file)
    text = secrets.token_hex(8)
    storage.publish(file, text)
    return text
