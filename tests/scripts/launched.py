"""A job of two processes, one of which is stopped or fails: python launched.py JOB WORKDIR.

JOB: prepare saves when it is stopped; plan has nothing to save; in sample process 1 raises an error.
"""

import os
import signal
import sys
import time

import jax

from igpt_jax.config import UserError, base_config, parse
from igpt_jax.runtime.exits import Preempted
from igpt_jax.runtime.job import run_job
from igpt_jax.runtime.signals import StopSignal

JOB, WORKDIR = sys.argv[1:]


def run(config, workdir):
    assert jax.process_count() == 2
    with StopSignal(saves=JOB != "plan") as stop:
        for step in range(1, 10**5):
            time.sleep(0.02)
            if step == 5 and jax.process_index() == 1:
                if JOB == "sample":
                    raise UserError("only process 1 sees this.")
                os.kill(os.getpid(), signal.SIGINT)
            if stop.saves and stop.should_stop():
                print(f"stops at {step}", flush=True)
                raise Preempted("stopped.")


sys.exit(run_job(run, parse("pretrain", base_config("pretrain")), WORKDIR))
