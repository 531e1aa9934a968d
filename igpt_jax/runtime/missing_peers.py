"""Reads the stderr of a process that waits for its peers (startup.py starts it), and passes it on.

Where peers are missing JAX aborts the process, with their numbers inside a stack trace; here they become one line.
"""

import json
import re
import sys


def missing_line(fatal: str, deadline: int, coordinator: str, hosts: list[str]) -> str:
    """What JAX's last words mean, in one line; its words where they mean something else."""
    if listed := re.search(r"timed out task names:\n((?:\d+\n)+)", fatal):
        missing = [f"process {number}" + (f" ({hosts[number]})" if hosts else "")
                   for number in sorted(map(int, listed[1].split()))]
        come = re.search(r"reached the barrier: (\d+)/(\d+)", fatal)
        return (f"igpt_jax: {come[1]} of {come[2]} processes came within {deadline} s; missing: {', '.join(missing)}. "
                "Look at their logs; IGPT_START_SECONDS waits longer.\n")
    if "RegisterTask" in fatal and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", fatal):
        return (f"igpt_jax: within {deadline} s process 0, at {coordinator}, did not say that all processes have come. "
                "Look at its log, if it has one; IGPT_START_SECONDS waits longer.\n")
    return fatal


if __name__ == "__main__":
    fatal = ""
    for line in sys.stdin:
        if fatal or re.match(r"F\d{4} ", line):
            fatal += line
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    if fatal:
        sys.stderr.write(missing_line(fatal, **json.loads(sys.argv[1])))
