"""Filters the stderr of a process that waits for its peers, and names the missing ones in one line.

startup.py runs this file as a process of its own. If peers are missing, JAX aborts the waiting process and prints
their numbers inside a stack trace; this file replaces that trace.
"""

import json
import re
import sys


def missing_line(fatal: str, deadline: int, coordinator: str, hosts: list[str]) -> str:
    """Turns JAX's fatal error about missing processes into one line. Other errors are returned unchanged.

    Args:
      fatal: JAX's fatal error with its stack trace.
      deadline: seconds that the process waited.
      coordinator: host:port of process 0.
      hosts: the host of each process; empty if unknown.
    """
    if listed := re.search(r"timed out task names:\n((?:\d+\n)+)", fatal):
        missing = [f"process {number}" + (f" ({hosts[number]})" if hosts else "")
                   for number in sorted(map(int, listed[1].split()))]
        arrived = re.search(r"reached the barrier: (\d+)/(\d+)", fatal)
        return (f"igpt_jax: {arrived[1]} of {arrived[2]} processes connected within {deadline} s; missing: "
                f"{', '.join(missing)}. Look at their logs, or set IGPT_START_SECONDS to wait longer.\n")
    if "RegisterTask" in fatal and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", fatal):
        return (f"igpt_jax: process 0, at {coordinator}, did not connect all processes within {deadline} s. Look at "
                "its log, or set IGPT_START_SECONDS to wait longer.\n")
    return fatal


if __name__ == "__main__":
    fatal = ""
    for line in sys.stdin:
        # glog starts a fatal error with F and the date. The process aborts after it, so all that follows belongs to it.
        if fatal or re.match(r"F\d{4} ", line):
            fatal += line
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    if fatal:
        sys.stderr.write(missing_line(fatal, **json.loads(sys.argv[1])))
