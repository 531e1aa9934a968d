"""Started with closed standard streams: no file gets their numbers, and writing to them does not fail."""

import os
import subprocess
import sys

from igpt_jax import process

process.open_streams()
file = os.open("/dev/null", 0)
assert file > 2, file
print("out")
sys.stderr.write("err")
subprocess.run(["sh", "-c", "echo printed >&2"], check=True)
