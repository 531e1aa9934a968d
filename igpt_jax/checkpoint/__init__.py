"""Checkpoints: Orbax's files, each step self-describing and checked, so that other jobs need nothing but its path.

A step holds two trees, `params` and `training` (the rest of the state), so that jobs other than training read the
parameters alone, straight into their own mesh; and a record (JSON) of the config, the palette and the data.

What is read is believed only where it is what was written. The record has a CRC and holds a checksum of each array,
taken on the devices before anything was written and compared after restoring, on whatever mesh. SHA256SUMS, written
last, names the file that is damaged (`sha256sum -c SHA256SUMS` reads it too). A damaged step is moved to quarantine/
and the newest good one is used.
"""

from igpt_jax.checkpoint.arrays import prepare_orbax
from igpt_jax.checkpoint.manager import Checkpoints
from igpt_jax.checkpoint.metadata import RECORD, Metadata, require_objective
from igpt_jax.checkpoint.reading import (
    NoGoodCheckpoint,
    identity,
    is_checkpoint,
    load_metadata,
    load_model,
    locate,
    steps_of,
)
from igpt_jax.checkpoint.step_folders import steps_in
from igpt_jax.checkpoint.verification import verify

__all__ = [
    "Checkpoints", "Metadata", "NoGoodCheckpoint", "RECORD", "identity", "is_checkpoint", "load_metadata",
    "load_model", "locate", "prepare_orbax", "require_objective", "steps_in", "steps_of", "verify",
]
