"""Runs jobs one after the other and reports each: python report_jobs.py JSON.

JSON is a list of argument lists. Each job writes one line to standard output: its exit code and its standard error, as
a JSON list. Importing JAX once for all jobs saves most of the time.
"""

import contextlib
import io
import json
import sys

from igpt_jax.__main__ import main

for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(arguments)
    print("\n" + json.dumps([code, stderr.getvalue()]))
