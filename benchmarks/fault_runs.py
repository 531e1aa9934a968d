"""Runs of a tiny pretraining, and a tally of the faults that they survived. Used by benchmarks/faults.py."""

import collections
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAVE_EVERY, EVALUATE_EVERY = 5, 40
MODEL = ["--config.model.name=igpt_tiny", "--config.model.layers=1", "--config.model.embed=16",
         "--config.model.heads=2", "--config.batch_size=16", "--config.precision=float32",
         "--config.optimizer.warmup_steps=2", "--config.log_every_steps=1",
         f"--config.eval_every_steps={EVALUATE_EVERY}", f"--config.checkpoint_every_steps={SAVE_EVERY}",
         "--config.keep_steps=()", "--config.data.reader=resident"]


class Run:
    """A small pretraining in a workdir, which can be started many times.

    Args:
      folder: holds the store, workdirs and logs of all runs.
      name: of this run's workdir in `folder`.
      more: further arguments of the job.
      processes: number of connected processes.
      env: further environment variables.
      record_ids: write down which examples each step asks for.
    """

    steps = 240  # of every run; --short sets fewer

    def __init__(self, folder: pathlib.Path, name: str, *more: str, processes: int = 1, env: dict | None = None,
                 record_ids: bool = False):
        self.workdir, self.processes, self.record_ids = folder / name, processes, record_ids
        self.ids, self.log = folder / f"{name}.ids", folder / f"{name}.log"
        self.arguments = ["pretrain", f"--workdir={self.workdir}", f"--config.data.store={folder / 'store'}", *MODEL,
                          f"--config.steps={self.steps}", *more]
        flags = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3",
                    "XLA_FLAGS": flags, "EPATH_USE_TF": "0", "PYTHON": sys.executable,
                    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), **(env or {})}

    def start(self) -> list[subprocess.Popen]:
        """Starts the run's processes, each in a process group of its own."""
        ranks = [{}]
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("", 0))
                ranks = [{"IGPT_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "IGPT_PROCESS_ID": str(rank),
                          "IGPT_PROCESSES": str(self.processes)} for rank in range(self.processes)]
        self.log_from = self.log.stat().st_size if self.log.exists() else 0
        command = self.recording() if self.record_ids else [sys.executable, "-m", "igpt_jax", *self.arguments]
        with open(self.log, "ab") as log:
            return [subprocess.Popen(command, cwd=ROOT, env={**self.env, **rank}, stdout=log, stderr=log,
                                     start_new_session=True) for rank in ranks]

    def recording(self, most_bytes: int = 0) -> list[str]:
        """The command that also records example ids; no file may grow beyond `most_bytes` (0: no limit)."""
        return [sys.executable, str(ROOT / "benchmarks" / "fault_job.py"), str(self.ids), str(most_bytes),
                *self.arguments]

    def output(self) -> str:
        """The output of the processes that were started last."""
        with open(self.log, "rb") as log:
            log.seek(self.log_from)
            return log.read().decode(errors="replace")

    def wait_for(self, processes: list[subprocess.Popen], pattern: str) -> bool:
        """Waits for a line of output that matches. Returns False if a process ends first."""
        while not re.search(pattern, self.output(), re.MULTILINE):
            if any(process.poll() is not None for process in processes):
                return False
            time.sleep(0.01)
        return True

    def finish(self) -> None:
        """Runs to the end. Raises RuntimeError if a process fails."""
        codes = [process.wait() for process in self.start()]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}\n{self.output()}")

    def losses(self) -> dict:
        """Every logged loss by (step, name)."""
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        return {(line["step"], name): value for line in lines for name, value in line.items()
                if name.startswith(("train/", "eval/"))}

    def checkpoints(self) -> list[int]:
        """Steps of the finished checkpoints."""
        folder = self.workdir / "checkpoints"
        return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit()) if folder.exists() else []

    def began_since(self, moment: float) -> bool:
        """Whether the job itself has begun: the command line is read, and all is imported."""
        file = self.workdir / "config.json"
        return file.exists() and file.stat().st_mtime > moment

    def newest_logged(self) -> int:
        """The last step in metrics.jsonl."""
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def differences(self, reference: "Run") -> list[str]:
        """Where the finished run differs from the undisturbed one, and which temporary files it left."""
        found = [] if self.losses() == reference.losses() else ["losses"]
        if self.record_ids and ids_of(self) != ids_of(reference):
            found.append("example ids")
        one, other = arrays(self), arrays(reference)
        if one.keys() != other.keys() or any(one[name].tobytes() != other[name].tobytes() for name in one):
            found.append("parameters")
        return found + [f"left over: {file.name}" for file in self.workdir.rglob("*")
                        if re.search(r"\.tmp$|orbax-checkpoint-tmp|\.deleting$", file.name)]


def ids_of(run: Run) -> set[str]:
    """"STEP CHECKSUM" of all steps whose examples were read; a step that was repeated must read the same ones."""
    return set(run.ids.read_text().splitlines())


def arrays(run: Run) -> dict[str, np.ndarray]:
    """The training state in the last checkpoint, by name."""
    import jax
    from orbax.checkpoint import v1 as ocp

    jax.config.update("jax_platforms", "cpu")
    trees = ocp.load_checkpointables(run.workdir / "checkpoints" / str(run.steps))
    leaves = jax.tree_util.tree_leaves_with_path([trees["params"], trees["training"]])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


class Tally:
    """Counts the tries of one fault, how many of them were survived, and what was lost."""

    def __init__(self, fault: str):
        self.fault, self.tries, self.survived, self.lost, self.seconds = fault, 0, 0, collections.Counter(), []

    def add(self, good: bool, seconds: float | None = None, **lost: int) -> None:
        self.tries += 1
        self.survived += bool(good)
        self.lost.update(lost)
        if seconds is not None:
            self.seconds.append(seconds)

    def row(self) -> dict:
        """A row of the table."""
        # Clopper-Pearson: with no failure in n tries the rate is below 1 - 0.025^(1/n) at 95 %.
        bound = 1 - 0.025 ** (1 / self.tries) if self.tries and self.survived == self.tries else None
        return {"fault": self.fault, "tries": self.tries, "survived": self.survived,
                "failure rate below (95 %)": bound and round(bound, 4), "lost": dict(self.lost),
                "seconds median": self.seconds and round(statistics.median(self.seconds), 2) or None,
                "seconds most": self.seconds and round(max(self.seconds), 2) or None}


def rest(processes: list[subprocess.Popen], seconds: float) -> None:
    """Waits, at most until the first process ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes[0].wait(seconds)


def end(processes: list[subprocess.Popen], number: signal.Signals = signal.SIGKILL) -> None:
    """Sends a signal to the processes that still run, and waits for all to end."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
    for process in processes:
        process.wait()
