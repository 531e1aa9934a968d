"""Measures how long a run takes to start:  python benchmarks/start.py [--rounds 3] [--json FILE]

Times the quickstart's model from the start of the process to the line of its first step, with an empty compilation
cache (cold) and with the one that this left (warm). Also times the list of jobs and the imports of a job, and measures
the peak memory of those imports. Prints medians.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import exits

from igpt_jax import storage

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRETRAIN = ["-m", "igpt_jax", "pretrain", "--config.model.name=igpt_tiny", "--config.model.layers=4",
            "--config.model.embed=64", "--config.batch_size=64", "--config.precision=float32",
            "--config.data.reader=resident", "--config.log_every_steps=1"]
JOB = "import igpt_jax.jobs.pretrain"
PEAK = "next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))"


def first_step(store: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds from the start of a run to its first logged step."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, *PRETRAIN, f"--workdir={workdir}/run", f"--config.data.store={store}"]
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}) as run:
            lines = []
            for line in run.stderr:
                lines.append(line)
                if line.startswith("step 1/"):
                    seconds = time.perf_counter() - start
                    run.kill()
                    return seconds
    raise RuntimeError("the run ended before its first step:\n" + "".join(lines))


def python(*arguments: str) -> tuple[float, str]:
    """Seconds that a Python program takes, and its output."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=exits.count, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    arguments = parser.parse_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        subprocess.run([sys.executable, "-m", "igpt_jax", "prepare", f"--workdir={folder}/store"], cwd=ROOT, check=True,
                       capture_output=True)
        for round_ in range(arguments.rounds):
            cache = folder / f"cache{round_}"
            for name, seconds in (
                    ("list of jobs", python("-m", "igpt_jax")[0]),
                    ("import of the job", python("-c", JOB)[0]),
                    ("first step, cold", first_step(folder / "store", cache)),
                    ("first step, warm", first_step(folder / "store", cache))):
                rows.setdefault(name, []).append(seconds)
    peak = int(python("-c", f"{JOB}; import jax; jax.devices(); print({PEAK})")[1])
    figures = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "peak_mib": peak / 1024,
               "rows": [{"name": name, "seconds": statistics.median(each), "all_seconds": each}
                        for name, each in rows.items()]}
    print(f"{os.cpu_count()} cores, load {figures['load']:.1f}, median of {arguments.rounds}; "
          f"{figures['peak_mib']:.0f} MiB held once the job is imported")
    for row in figures["rows"]:
        print(f"{row['name']:20} {row['seconds']:6.2f} s   ({', '.join(f'{each:.2f}' for each in row['all_seconds'])})")
    if arguments.json:
        storage.publish(storage.path(arguments.json), json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    exits.run(main)
