"""Gets a signal twice, more than a second apart: python two_signals.py NUMBER."""

import os
import sys
import time

from igpt_jax.runtime.signals import StopSignal

with StopSignal(saves=True):
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(1.1)  # a second signal within a second counts as the same request
    os.kill(os.getpid(), int(sys.argv[1]))
    print("still here")
