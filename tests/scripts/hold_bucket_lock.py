"""Holds the lock of a folder under a bucket's rules, with 5 heartbeats a second: python hold_bucket_lock.py FOLDER."""

import sys
import time

from igpt_jax import storage
from igpt_jax.storage import files, lines, locks, paths

for module in (storage, files, lines, locks, paths):
    module.is_local = lambda path: False
locks.HEARTBEAT_SECONDS = 0.2
with storage.lock(storage.path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(10**6)
