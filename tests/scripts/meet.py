"""Connects to the other process by the launcher's variables, and exchanges a value with it."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpt_jax.runtime import launchers, startup

launch = launchers.recognize(os.environ)
startup.connect(launch)
startup.introduce(launch, startup.agree())

assert multihost_utils.process_allgather(np.int32(jax.process_index())).tolist() == [0, 1]
