"""Injects faults into real runs and counts what is lost:  python benchmarks/faults.py [FAULT ...] [--tries=N]

Each fault is tried N times on real `python -m igpt_jax` processes, at moments drawn from --seed. Each run is compared
with an undisturbed one: parameters, every logged loss and the examples of every step must have the same bits. Prints a
table, and writes it as JSON with --json=FILE.
"""

import argparse
import contextlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile

import exits
import fault_files as files
import fault_processes as processes
from fault_runs import ROOT, Run

from igpt_jax import storage

sys.path.insert(0, str(ROOT))

# fault: (function, tries, tries of the short form)
FAULTS = {
    "kill": (processes.kill, 200, 3),
    "stop": (processes.stop, 80, 5),
    "stop-two": (lambda *given: processes.stop(*given, processes=2), 20, 1),
    "peer": (processes.peer, 6, 1),
    "frozen": (processes.frozen, 6, 1),
    "files": (files.files, 20, 1),
    "store": (files.store, 20, 1),
    "disk": (files.disk, 5, 1),
    "clean": (processes.clean, 100, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=[], metavar="FAULT", help=f"of {', '.join(FAULTS)}; none: all")
    parser.add_argument("--tries", type=exits.count, help="number of tries of each fault")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places of faults")
    parser.add_argument("--json", help="file for the table")
    parser.add_argument("--keep", metavar="DIR", help="folder for the runs, which stays")
    parser.add_argument("--short", action="store_true",
                        help="few tries of each, of shorter runs that may take long to stop, for tests")
    # A shell starts background jobs with SIGINT ignored, and our child processes would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = parser.parse_args()
    if given.short:
        Run.steps, processes.STOP_SECONDS = 60, 60.0
    unknown = set(given.faults) - set(FAULTS)
    if unknown:
        parser.error(f"fault {unknown.pop()!r} is not known. Known: {', '.join(FAULTS)}")
    rows = []
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(given.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        reference = Run(folder, "reference", record_ids=True)
        if not (folder / "store" / "result.json").exists():
            subprocess.run([sys.executable, "-m", "igpt_jax", "prepare", f"--workdir={folder / 'store'}"], cwd=ROOT,
                           env=reference.env, check=True, capture_output=True)
        if not (reference.workdir / "result.json").exists():
            reference.finish()
        for name in given.faults or FAULTS:
            inject, usual, short = FAULTS[name]
            print(f"{name} ...", flush=True)
            rng = random.Random(f"{given.seed} {name}")
            rows += [tally.row() for tally in
                     inject(folder, reference, rng, given.tries or (short if given.short else usual))]
            print("\n".join(json.dumps(row) for row in rows[-5:]), flush=True)
    table = [list(rows[0])] + [[json.dumps(value) if isinstance(value, dict) else str(value) for value in row.values()]
                               for row in rows]
    print("\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in table))
    if given.json:
        storage.publish(storage.path(given.json), json.dumps(rows, indent=2) + "\n")
    return int(any(row["survived"] < row["tries"] for row in rows))


if __name__ == "__main__":
    exits.run(main)
