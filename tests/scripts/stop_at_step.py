"""A run that sends itself SIGTERM at a step: python stop_at_step.py STEP ARGUMENTS..."""

import os
import signal
import sys

from igpt_jax.__main__ import main
from igpt_jax.metrics.logging import Metrics

log = Metrics.log


def log_and_stop(self, step, values):
    log(self, step, values)
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)


Metrics.log = log_and_stop
sys.exit(main(sys.argv[2:]))
