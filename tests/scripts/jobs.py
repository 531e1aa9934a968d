"""Runs jobs one after the other, up to one that fails: python jobs.py JSON.

JSON is a list of argument lists. Each character of an argument stands for one byte, so that any file name can be given.
"""

import json
import os
import sys

from igpt_jax.__main__ import main

jobs = [[os.fsdecode(argument.encode("latin1")) for argument in job] for job in json.loads(sys.argv[1])]
sys.exit(next((code for code in map(main, jobs) if code), 0))
