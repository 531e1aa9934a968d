"""Beats a watchdog, then does something else: python stall.py ALLOWANCE STEPS SECONDS THEN.

It beats STEPS times, every SECONDS. THEN: "stop" leaves the watchdog's context; "hang" stands still for ever; "compile"
spends 5 s in a call that looks like JAX's compiler.
"""

import ctypes
import sys
import time

import jax._src.compiler

from igpt_jax.runtime.watchdog import Watchdog

ALLOWANCE, STEPS, SECONDS, THEN = float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]


def hang():
    time.sleep(10**6)


with Watchdog(ALLOWANCE) as watchdog:
    for step in range(STEPS):
        watchdog.beat(f"doing step {step}")
        time.sleep(SECONDS)
    if THEN == "hang":
        hang()
    elif THEN == "compile":
        # A C call, as JAX's compiler is one, in a frame of the compiler's file.
        code = compile("sleep(5)", jax._src.compiler.__file__, "exec")
        exec(code, {"sleep": ctypes.CDLL(None).sleep})
print("came through")
