"""Runs jobs in one process and prints their exit codes and its peak memory: python attacked_jobs.py ROWS.

ROWS is a JSON file of [name, job, workdir, ["key=value", ...]]. The last line of stdout is JSON: [{name: exit code},
peak memory in bytes].
"""

import importlib
import json
import pathlib
import sys

from igpt_jax.config import base_config, parse
from igpt_jax.runtime.job import run_job

codes = {}
for name, job, workdir, settings in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    print("==", name, file=sys.stderr, flush=True)
    config = base_config(job)
    with config.unlocked():
        for setting in settings:
            key, _, value = setting.partition("=")
            config[key] = type(config[key])(value)
    codes[name] = run_job(importlib.import_module(f"igpt_jax.jobs.{job}").run, parse(job, config), workdir)
# Not getrusage: its ru_maxrss starts from the memory of the process that started this one.
status = pathlib.Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps([codes, peak]))
