"""Holds the lock of a workdir until stdin ends: python hold_lock.py WORKDIR."""

import sys

from igpt_jax import storage

with storage.lock(storage.path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
