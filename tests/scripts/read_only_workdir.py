"""A run whose workdir becomes read-only at a step: python read_only_workdir.py STEP ARGUMENTS...

The second argument of the job must be --workdir=DIR. Root may write anywhere, so the script first drops that right.
"""

import ctypes
import os
import sys

DROPPED = "RIGHTS_DROPPED"
if DROPPED not in os.environ:
    for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP, which takes effect with the next exec
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, DROPPED: "1"})

from igpt_jax.__main__ import main  # noqa: E402
from igpt_jax.metrics.logging import Metrics  # noqa: E402

STEP, ARGUMENTS = int(sys.argv[1]), sys.argv[2:]
log = Metrics.log


def log_and_close(self, step, values):
    log(self, step, values)
    if step == STEP:
        for folder, _, _ in os.walk(ARGUMENTS[1].partition("=")[2]):
            os.chmod(folder, 0o555)


Metrics.log = log_and_close
sys.exit(main(ARGUMENTS))
