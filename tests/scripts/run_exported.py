"""Runs an exported run.py where only jax can be imported, then its other programs: python run_exported.py RUN OUT.

RUN draws 3 pictures into OUT (.npz). Then their losses, features and classes go to OUT + .npy, .features.npy and
.classes.npy.
"""

import pathlib
import runpy
import sys

path, out = sys.argv[1:]
for name in ("igpt_jax", "flax", "orbax", "optax", "tensorflow", "torch", "etils"):
    sys.modules[name] = None  # importing it fails
sys.argv = [path, "3", out]
run = runpy.run_path(path)

import numpy as np  # noqa: E402, since the imports of run.py come first
from jax import export  # noqa: E402

for program, suffix in (("losses", ""), ("features", ".features"), ("classes", ".classes")):
    call = export.deserialize(bytearray((pathlib.Path(path).parent / f"{program}.jax").read_bytes())).call
    np.save(f"{out}{suffix}.npy", call(run["weights"], run["tokens"]))
