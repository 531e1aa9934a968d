"""Checkpoints: Orbax steps that describe themselves and are verified on read.

A step holds two trees of arrays and a JSON file of metadata:

- `params`: the parameters. Jobs other than training read these alone, straight into their own mesh.
- `training`: the rest of the training state.
- Metadata: config, palette, data fingerprint, and a checksum of every array. A CRC protects it.

The checksums are computed on the devices before a save and compared after a restore, on any mesh. SHA256SUMS is
written last and names a damaged file; `sha256sum -c SHA256SUMS` reads it too. A damaged step is moved to quarantine/,
and the newest good step is used instead.
"""

from igpt_jax.checkpoint.arrays import AbstractOf, from_process_0, of_process_0, prepare_orbax
from igpt_jax.checkpoint.manager import Checkpoints
from igpt_jax.checkpoint.metadata import METADATA_FILE, Metadata, require_objective, require_parameters, store_of
from igpt_jax.checkpoint.reading import (
    NoGoodCheckpoint,
    branch,
    identity,
    is_checkpoint,
    load_metadata,
    load_model,
    locate,
    steps_of,
)
from igpt_jax.checkpoint.step_folders import step_path, steps_in
from igpt_jax.checkpoint.verification import verify

__all__ = [
    "AbstractOf", "Checkpoints", "METADATA_FILE", "Metadata", "NoGoodCheckpoint", "branch", "from_process_0",
    "identity", "is_checkpoint", "load_metadata", "load_model", "locate", "of_process_0", "prepare_orbax",
    "require_objective", "require_parameters", "step_path", "steps_in", "steps_of", "store_of", "verify",
]
