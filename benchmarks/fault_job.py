"""Runs a job for benchmarks/faults.py: python fault_job.py IDS BYTES ARGUMENTS.

Appends a line to the file IDS for each step whose examples the job asks for: the step, and a checksum of their ids.
Files may grow to BYTES, as on a full disk; 0 means no limit.
"""

import os
import resource
import sys
import zlib

from igpt_jax.__main__ import main
from igpt_jax.data import order

ids_path, most_bytes = sys.argv[1], int(sys.argv[2])
if most_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
batch, ids_file = order.batch, os.open(ids_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def recorded(seed, step, *rest):
    found = batch(seed, step, *rest)
    os.write(ids_file, f"{step} {zlib.crc32(found.tobytes())}\n".encode())
    return found


order.batch = recorded
sys.exit(main(sys.argv[3:]))
