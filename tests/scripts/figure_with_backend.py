"""Draws a figure to sys.argv[1] while MPLBACKEND names a backend that is not installed."""

import os
import sys

from igpt_jax import storage
from igpt_jax.metrics import charts, figures

figures.save(storage.path(sys.argv[1]), charts.over_steps({"a": [(1, 3.0), (2, 2.5)]}))
assert os.environ["MPLBACKEND"].startswith("module")
