"""Checkpoint metadata: what a step says about the run that wrote it, and whether a run may resume from it."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from igpt_jax.checkpoint.step_folders import step_path
from igpt_jax.config import PretrainConfig, UserError, flat, parse, stated, to_dict
from igpt_jax.runtime.versions import versions
from igpt_jax.storage import hashes
from igpt_jax.storage.hashes import Damaged

log = logging.getLogger(__name__)


FORMAT = 2
WITHOUT_CHECKSUMS = 1  # the format that had none: still read, with a warning
RECORD = "_CHECKPOINT_METADATA"  # Orbax's file of a step that holds ours
EVALUATION = "evaluation.json"  # figures that came after the step was saved


@dataclasses.dataclass(frozen=True)
class Metadata:
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
    def from_json(cls, value: Mapping[str, Any]) -> "Metadata":
        fields = {name: part for name, part in value.items() if name != "format"}
        if value.get("format") == WITHOUT_CHECKSUMS:
            fields = {**fields, "palette_VC": fields.pop("palette"), "versions": {}}
        elif value.get("format") != FORMAT:
            raise UserError(f"a checkpoint of format {value.get('format')!r} cannot be read here: format {FORMAT} is "
                            "the one that this version knows. Use the version that wrote it.")
        return cls(**{**fields, "config": parse(value["config"]["job"], value["config"]),
                      "palette_VC": np.asarray(fields["palette_VC"], np.float32)})

    def check_resumable(self, new: "Metadata", where: str) -> tuple[Mapping[str, Any], ...]:
        """The accepted changes from the run that wrote this checkpoint to the run `new`.

        Raises:
          UserError: they differ in what `new.config.accept_changes` does not name; tells each difference.
        """
        optimizer = self.config.optimizer
        independent = optimizer.schedule == "constant" and optimizer.warmup_steps >= 0
        free = {"free", "schedule"} if independent else {"free"}
        mine, others = flat(to_dict(self.config)), flat(to_dict(new.config))
        changes = {key: (mine[key], others[key]) for key, resume in stated(new.config.job, "resume").items()
                   if resume not in free and mine[key] != others[key]}
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


# What is on disk against what was written.

def read_metadata(folder: Any, step: int) -> Metadata:
    """What a step says of itself. Raises Damaged, which a step of another number is too, or UserError for a format that
    is not known."""
    path = step_path(folder, step)
    value = hashes.read_json(path / RECORD)
    try:
        value = value["custom_metadata"]
        old = value.get("format") == WITHOUT_CHECKSUMS
        record = Metadata.from_json(value if old else hashes.unsealed(value, RECORD))
    except (TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{RECORD} is not a record: {error!r}") from None
    if record.steps_done != step:
        raise Damaged(f"its record is that of step {record.steps_done}")
    try:
        return dataclasses.replace(record, metrics={**record.metrics, **later_metrics(path)})
    except Damaged as damage:  # the step itself is good
        log.error("%s: %s. Its figures are not used.", path, damage)
        return record


def require_objective(record: Metadata, objective: str, typed: str) -> None:
    """Raises UserError where the checkpoint `typed` was not trained with `objective`."""
    if record.config.objective != objective:
        raise UserError(f"checkpoint {typed} was trained with objective={record.config.objective}, not {objective}. "
                        f"Say so: --config.objective={record.config.objective}, or give another checkpoint.")


def later_metrics(path: Any) -> Mapping[str, float]:
    """The figures of a step that came after it was saved; none where none came. Raises Damaged."""
    if not (path / EVALUATION).exists():
        return {}
    try:
        return dict(hashes.unsealed(hashes.read_json(path / EVALUATION), EVALUATION)["metrics"])
    except (TypeError, KeyError, AttributeError, ValueError):
        raise Damaged(f"{EVALUATION} holds no figures") from None
