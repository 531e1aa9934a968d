"""Checkpoint metadata: what a step says about the run that wrote it, and whether a run may resume from it."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from igpt_jax import storage
from igpt_jax.checkpoint.step_folders import step_path
from igpt_jax.config import PretrainConfig, UserError, flat, key_attributes, parse, to_dict
from igpt_jax.data import open_data
from igpt_jax.data.codecs import Codec, codec_of
from igpt_jax.runtime.versions import versions
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)


FORMAT = 2
WITHOUT_CHECKSUMS = 1  # the first format, which is still read, with a warning
METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's file in a step; ours is its `custom_metadata`
EVALUATION = "evaluation.json"  # metrics of an evaluation after the step was saved


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a checkpoint step: all that another job needs to use its arrays."""
    config: PretrainConfig  # or FinetuneConfig
    palette_VC: np.ndarray  # float32 [V, 3] in [-1, 1]; [0, 3] with another codec than a palette
    image_size: int  # pixels per side
    data_fingerprint: str
    steps_done: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of an evaluation at this step
    data_offset: int = 0  # step s reads the examples of step s + data_offset of the order
    changes: tuple[Mapping[str, Any], ...] = ()  # accepted on resuming: {"step", "key", "from", "to"}
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by array; `Checkpoints.save` fills it in
    classes: int = 0  # of the class head; 0: no class head
    warmup_steps: int = -1  # of this run; -1: an older version wrote it, and only its config may say
    held_out_fingerprint: str = ""  # of the images that `metrics` are of; empty: see `evaluated_on`
    data_chunks: str = ""  # images per chunk of each store, which the order follows; empty: an older version wrote it

    @functools.cached_property
    def codec(self) -> Codec:
        """Between the pixels of images and the model's tokens."""
        return codec_of(self.config.codec, self.palette_VC)

    @property
    def sizes(self) -> tuple:
        """What decides the shapes and dtypes of the arrays, besides the keys of the model and the optimizer."""
        float64 = self.config.precision == "float64"
        return self.image_size, self.config.codec, len(self.palette_VC), self.classes, float64

    @property
    def evaluated_on(self) -> str:
        """The images that `metrics` are of: their fingerprint, or the split's name where an older version wrote it."""
        return self.held_out_fingerprint or self.config.data.held_out

    def to_json(self) -> dict[str, Any]:
        """The metadata as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "format": FORMAT, "config": to_dict(self.config), "palette_VC": self.palette_VC.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Metadata":
        """The inverse of `to_json`; also reads format 1. Raises UserError for an unknown format."""
        fields = {name: part for name, part in value.items() if name != "format"}
        if value.get("format") == WITHOUT_CHECKSUMS:
            # Format 1 recorded no versions. The field's default would be the versions that run now, not those that
            # wrote the step.
            fields = {**fields, "palette_VC": fields.pop("palette"), "versions": {}}
        elif value.get("format") != FORMAT:
            raise UserError(f"checkpoint format {value.get('format')!r} is unknown; this version reads formats "
                            f"{WITHOUT_CHECKSUMS} and {FORMAT}. Use the version of igpt_jax that wrote it.")
        return cls(**{**fields, "config": parse(value["config"]["job"], {"codec": "palette"} | value["config"]),
                      "palette_VC": np.asarray(fields["palette_VC"], np.float32).reshape(-1, 3)})

    def check_resumable(self, new: "Metadata", workdir: str) -> tuple[Mapping[str, Any], ...]:
        """Checks that the run `new` may resume from this checkpoint of `workdir`. Returns the accepted changes.

        Raises:
          UserError: settings differ that `new.config.accept_changes` does not name; lists each of them.
        """
        # Each key states in `config/` whether a resumed run may change it. Versions are not compared: a month-long run
        # may need an upgrade, so `restore` only warns about them.
        free = {"free", "schedule"} if self._same_rates(new) else {"free"}
        mine, others = flat(to_dict(self.config)), flat(to_dict(new.config))
        resume = key_attributes(new.config.job, "resume")
        changes = {key: (mine[key], others[key]) for key in resume
                   if resume[key] not in free and mine[key] != others[key]}
        # The next three are compared by content, since the path of a store or palette may hold other data by now.
        if self.image_size != new.image_size:
            changes["image_size"] = (self.image_size, new.image_size)
        if not np.array_equal(self.palette_VC, new.palette_VC):
            changes["palette"] = (_digest(self.palette_VC), _digest(new.palette_VC))
        if self.data_fingerprint != new.data_fingerprint:
            changes["data"] = (self.data_fingerprint, new.data_fingerprint)
        elif self.data_chunks and self.data_chunks != new.data_chunks:
            changes["data"] = tuple(f"the same images in chunks of {run.data_chunks}" for run in (self, new))
        refused = [f"{key}={after!r} (checkpoint: {before!r})" for key, (before, after) in changes.items()
                   if key not in new.config.accept_changes]
        if refused:
            past = any(resume.get(key) == "schedule" for key in changes)
            reason = f" The first {self.steps_done:,} steps would have had other learning rates." if past else ""
            longer = (" --config.accept_changes=steps stretches the schedule to the new number of steps."
                      if "steps" in changes else "")
            raise UserError(f"the run in {workdir} was started with other settings: {'; '.join(refused)}.{reason} Use "
                            "the same settings, name the keys in --config.accept_changes, or give a new --workdir."
                            f"{longer}")
        return tuple({"step": self.steps_done, "key": key, "from": before, "to": after}
                     for key, (before, after) in changes.items())

    def _same_rates(self, new: "Metadata") -> bool:
        """Whether the steps up to this checkpoint have the same learning rates in the run `new`.

        They have if both warm-ups are equal and neither schedule has left its peak. A warm-up of one epoch (-1) is
        shortened to fit `steps`, so its resolved length counts.
        """
        warmups = [run.config.optimizer.warmup_steps if run.warmup_steps < 0 else run.warmup_steps
                   for run in (self, new)]
        return warmups[0] == warmups[1] >= 0 and all(
            run.config.optimizer.constant_until(run.config.steps) >= self.steps_done for run in (self, new))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def read_metadata(folder: Any, step: int) -> Metadata:
    """The metadata of a step in the directory `folder`, with the metrics of a later evaluation.

    Raises:
      Damaged: it is not what was written, or it belongs to another step.
      UserError: its format is unknown.
    """
    path = step_path(folder, step)
    value = hashes.read_json(path / METADATA_FILE)
    try:
        value = value["custom_metadata"]
        old = value.get("format") == WITHOUT_CHECKSUMS  # that format had no CRC either
        metadata = Metadata.from_json(value if old else hashes.unsealed(value, METADATA_FILE))
    except (TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{METADATA_FILE} holds no metadata of ours: {error!r}") from None
    # A folder that somebody renamed is whole by its checksums, but a run would resume at the wrong step.
    if metadata.steps_done != step:
        raise Damaged(f"its metadata is that of step {metadata.steps_done}")
    try:
        return dataclasses.replace(metadata, **later_evaluation(path))
    except Damaged as damage:  # the arrays do not depend on these metrics
        log.error("%s: %s. Its metrics are not used.", path, damage)
        return metadata


def require_objective(metadata: Metadata, objective: str, checkpoint: str) -> None:
    """Raises UserError if `checkpoint` was not trained with `objective`."""
    if metadata.config.objective != objective:
        raise UserError(f"checkpoint {checkpoint} was trained with objective={metadata.config.objective}, not "
                        f"{objective}. Set --config.objective={metadata.config.objective}, or give another checkpoint.")


def require_parameters(metadata: Metadata, parameters: str, checkpoint: str) -> None:
    """Raises UserError if `parameters` are ema and `checkpoint` holds no moving average of its parameters."""
    if parameters == "ema" and not metadata.config.optimizer.ema:
        raise UserError(f"parameters=ema: checkpoint {checkpoint} holds no moving average, since its run had "
                        "optimizer.ema=0. Set --config.parameters=raw, or give another checkpoint.")


def store_of(metadata: Metadata, given: str = "") -> str:
    """The store that a job reads: the `given` one, else the one that the checkpoint was trained on.

    Raises:
      UserError: the checkpoint's store has moved, or another one is in its place.
    """
    if given or not metadata.config.data.store:
        return given
    data = dataclasses.replace(metadata.config.data, stage="")
    names = storage.patterns(data.store)
    stores = [name for name in names if not name.startswith("tfds:")]
    if not all(storage.path(name).exists() for name in stores):
        raise UserError(f"the checkpoint was trained on the store {data.store}, which is not there. If it has moved, "
                        "pass --config.data.store=DIR")
    # Its path may be relative, and the current folder another project's.
    trained_on = metadata.data_fingerprint
    if trained_on and stores == names and open_data(data).split(data.split).fingerprint != trained_on:
        raise UserError(f"the store {data.store} does not hold the images that the checkpoint was trained on. If these "
                        f"are meant, pass --config.data.store={data.store}")
    return data.store


def later_evaluation(path: Any) -> Mapping[str, Any]:
    """`metrics` and `held_out_fingerprint` of an evaluation after the step `path` was saved; empty if there was none.

    Raises Damaged.
    """
    if not (path / EVALUATION).exists():
        return {}
    try:
        found = hashes.unsealed(hashes.read_json(path / EVALUATION), EVALUATION)
        return {"metrics": dict(found["metrics"]), "held_out_fingerprint": found.get("held_out_fingerprint", "")}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise Damaged(f"{EVALUATION} holds no metrics") from None
