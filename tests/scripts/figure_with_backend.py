"""Draws a figure to sys.argv[1] while MPLBACKEND names a backend that is not installed."""

import os
import sys

from igpt_jax import storage
from igpt_jax.metrics import figures

figures.loss_over_steps(storage.path(sys.argv[1]), {"a": [(1, 3.0)]})
assert os.environ["MPLBACKEND"].startswith("module")
