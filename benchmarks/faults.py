"""Injects faults into real runs and counts what is lost:  python benchmarks/faults.py [FAULT ...] [--tries=N]

Each fault is tried N times on real `python -m igpt_jax` processes, at moments drawn from --seed, and each try is held
against an undisturbed run: parameters, every logged loss and the examples of every step must be the same bits. Prints
a table, and writes it as JSON with --json=FILE. Faults: kill, stop, stop-two, peer, frozen, files, store, disk, clean.
--short: few tries of each, of shorter runs, for tests; --keep=DIR: work there, for a look at what is left.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS, SAVE_EVERY, EVALUATE_EVERY = 240, 5, 40
MODEL = ["--config.model.name=igpt_tiny", "--config.model.layers=1", "--config.model.embed=16",
         "--config.model.heads=2", "--config.batch_size=16", "--config.precision=float32",
         "--config.optimizer.warmup_steps=2", "--config.log_every_steps=1",
         f"--config.eval_every_steps={EVALUATE_EVERY}", f"--config.checkpoint_every_steps={SAVE_EVERY}",
         "--config.keep_steps=()", "--config.data.reader=resident"]
# The job, and beside it the example ids of each step that it asks for, one line each.
RUN = """
import os, sys, zlib
from igpt_jax.data import order
ask, ids = order.batch, os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def batch(seed, step, *rest):
    found = ask(seed, step, *rest)
    os.write(ids, f"{step} {zlib.crc32(found.tobytes())}\\n".encode())
    return found
order.batch = batch
from igpt_jax.__main__ import main
sys.exit(main(sys.argv[2:]))
"""

# Jobs one after the other, up to one that fails.
SEVERAL = """
import json, sys
from igpt_jax.__main__ import main
sys.exit(next((code for code in map(main, json.loads(sys.argv[1])) if code), 0))
"""


class Run:
    """One pretraining in a workdir, started as often as need be; where `noted`, its example ids are written down."""

    def __init__(self, folder: pathlib.Path, name: str, *more: str, processes: int = 1, env: dict | None = None,
                 noted: bool = False):
        self.workdir, self.processes, self.noted = folder / name, processes, noted
        self.ids, self.log = folder / f"{name}.ids", folder / f"{name}.log"
        self.arguments = ["pretrain", f"--workdir={self.workdir}", f"--config.data.store={folder / 'store'}", *MODEL,
                          f"--config.steps={STEPS}", *more]
        flags = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3",
                    "XLA_FLAGS": flags, "EPATH_USE_TF": "0", "PYTHON": sys.executable,
                    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), **(env or {})}

    def start(self) -> list[subprocess.Popen]:
        """The processes of the run, each in a process group of its own."""
        ranks = [{}]
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("", 0))
                ranks = [{"IGPT_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "IGPT_PROCESS_ID": str(rank),
                          "IGPT_PROCESSES": str(self.processes)} for rank in range(self.processes)]
        self.log_from = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, *(["-c", RUN, str(self.ids)] if self.noted else ["-m", "igpt_jax"]), *self.arguments]
        with open(self.log, "ab") as log:
            return [subprocess.Popen(command, cwd=ROOT, env={**self.env, **rank}, stdout=log, stderr=log,
                                     start_new_session=True) for rank in ranks]

    def said(self) -> str:
        """What the process that was started last has printed so far."""
        with open(self.log, "rb") as log:
            log.seek(self.log_from)
            return log.read().decode(errors="replace")

    def wait_for(self, processes: list[subprocess.Popen], pattern: str) -> bool:
        """Waits for a line of the log that matches; False where a process ends before."""
        while not re.search(pattern, self.said(), re.MULTILINE):
            if any(process.poll() is not None for process in processes):
                return False
            time.sleep(0.01)
        return True

    def finish(self) -> None:
        """Runs to the end. Raises where it does not get there."""
        codes = [process.wait() for process in self.start()]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}\n{self.said()}")

    def losses(self) -> dict:
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        return {(line["step"], name): value for line in lines for name, value in line.items()
                if name.startswith(("train/", "eval/"))}

    def checkpoints(self) -> list[int]:
        folder = self.workdir / "checkpoints"
        return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit()) if folder.exists() else []

    def began_since(self, moment: float) -> bool:
        """Whether the job itself has begun, behind the command line and the imports."""
        file = self.workdir / "config.json"
        return file.exists() and file.stat().st_mtime > moment

    def newest_logged(self) -> int:
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def differences(self, reference: "Run") -> list[str]:
        """In what the finished run differs from the undisturbed one; and the files that should not be there."""
        found = [] if self.losses() == reference.losses() else ["losses"]
        if self.noted and ids_of(self) != ids_of(reference):
            found.append("example ids")
        one, other = arrays(self), arrays(reference)
        if one.keys() != other.keys() or any(one[name].tobytes() != other[name].tobytes() for name in one):
            found.append("parameters")
        return found + [f"left over: {file.name}" for file in self.workdir.rglob("*")
                        if re.search(r"\.tmp$|orbax-checkpoint-tmp|\.deleting$", file.name)]


def ids_of(run: Run) -> set[str]:
    """"step checksum-of-its-example-ids" of all steps that were asked for; what was redone must be the same."""
    return set(run.ids.read_text().splitlines())


def arrays(run: Run) -> dict[str, np.ndarray]:
    import jax
    from orbax.checkpoint import v1 as ocp

    jax.config.update("jax_platforms", "cpu")
    trees = ocp.load_checkpointables(run.workdir / "checkpoints" / str(STEPS))
    leaves = jax.tree_util.tree_leaves_with_path([trees["params"], trees["training"]])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


class Tally:
    """Tries of one fault: how many were survived, and what was lost."""

    def __init__(self, fault: str):
        self.fault, self.tries, self.survived, self.lost, self.seconds = fault, 0, 0, collections.Counter(), []

    def add(self, good: bool, seconds: float | None = None, **lost: int) -> None:
        self.tries += 1
        self.survived += bool(good)
        self.lost.update(lost)
        if seconds is not None:
            self.seconds.append(seconds)

    def row(self) -> dict:
        # Clopper-Pearson: with no failure in n tries the rate is below 1 - 0.025^(1/n) at 95 %.
        bound = 1 - 0.025 ** (1 / self.tries) if self.tries and self.survived == self.tries else None
        return {"fault": self.fault, "tries": self.tries, "survived": self.survived,
                "failure rate below (95 %)": bound and round(bound, 4), "lost": dict(self.lost),
                "seconds median": self.seconds and round(statistics.median(self.seconds), 2) or None,
                "seconds most": self.seconds and round(max(self.seconds), 2) or None}


def kill(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """SIGKILL: one in four while starting, the others up to 1.5 s after the first finished step, saves included."""
    tally, number, redone = Tally("SIGKILL, restarted until done"), 0, []
    start_seconds = 6.0
    while tally.tries < tries:
        run, kills = Run(folder, f"kill{number}", noted=True), 0
        number += 1
        while tally.tries + kills < tries:
            began = time.monotonic()
            processes = run.start()
            if rng.random() < 0.25:
                rest(processes, rng.uniform(0, start_seconds))
            elif run.wait_for(processes, r"^step "):
                start_seconds = time.monotonic() - began
                rest(processes, rng.uniform(0, 1.5))
            alive = processes[0].poll() is None
            end(processes)
            if not alive:
                break
            kills += 1
            redone.append(run.newest_logged() - max(run.checkpoints(), default=0))
        run.finish()
        wrong = run.differences(reference)
        for _ in range(kills):
            tally.add(not wrong, steps_redone=0)
        if wrong:
            print(f"  {run.workdir}: {', '.join(wrong)}", flush=True)
            tally.lost.update(wrong)
        print(f"  run {number}: {kills} kills, {'the same bits' if not wrong else wrong}", flush=True)
        if not wrong:
            shutil.rmtree(run.workdir)
    tally.lost["steps redone, mean"] = round(statistics.mean(redone), 1) if redone else 0
    tally.lost["steps redone, most"] = max(redone, default=0)
    return [tally]


def rest(processes: list[subprocess.Popen], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes[0].wait(seconds)


def end(processes: list[subprocess.Popen], number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to processes that still run, and the wait for their end."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
    for process in processes:
        process.wait()


def stop(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int, processes: int = 1) -> list[Tally]:
    """SIGTERM or SIGINT in each phase in turn: exit code 75 within 5 s, and no finished step is lost.

    Until the command line is read, a few tenths of a second, a signal ends Python as it ends any program.
    """
    phases = ["start", "compile", "step", "evaluate", "save"]
    words = {1: "one process", 2: "one of two processes"}[processes]
    tallies = {phase: Tally(f"SIGTERM/SIGINT to {words}: {phase}") for phase in phases}
    number, run = 0, Run(folder, f"stop{processes}-0", processes=processes)
    for attempt in range(tries):
        phase = phases[attempt % len(phases)]
        if run.checkpoints() and run.checkpoints()[-1] > STEPS - 2 * EVALUATE_EVERY:
            number += 1
            run = Run(folder, f"stop{processes}-{number}", processes=processes)
        run.env["JAX_COMPILATION_CACHE_DIR"] = str(folder / (f"cold{attempt}" if phase == "compile" else "cache"))
        done, began = max(run.checkpoints(), default=0), time.time()
        ranks = run.start()
        if phase == "start":
            rest(ranks, rng.uniform(0, 4))
        elif phase == "compile":  # which begins about a second after the job
            while ranks[0].poll() is None and not run.began_since(began):
                time.sleep(0.01)
            rest(ranks, rng.uniform(0.5, 3))
        else:
            due = {"step": done + rng.randint(2, 20),
                   "evaluate": (done // EVALUATE_EVERY + 1) * EVALUATE_EVERY,
                   "save": (done // SAVE_EVERY + rng.randint(1, 3)) * SAVE_EVERY}[phase]
            run.wait_for(ranks, rf"step {due}/\d+ +loss")
            rest(ranks, rng.uniform(0, 0.03))
        sent = time.monotonic()
        reading = not run.began_since(began)
        # A scheduler tells all processes. One is enough once they are connected, which they are not while they start.
        for process in ranks if phase == "start" else [rng.choice(ranks)]:
            if process.poll() is None:
                process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
        codes = {process.wait() for process in ranks}
        seconds = time.monotonic() - sent
        lost = run.newest_logged() - max(run.checkpoints(), default=0)
        finished = max(run.checkpoints(), default=0) == STEPS
        allowed = {75} | ({0} if finished else set()) | ({-signal.SIGTERM, -signal.SIGINT, 1} if reading else set())
        good = codes <= allowed and lost == 0
        tallies[phase].add(good and seconds <= 5, seconds, steps_lost=lost)
        if not good or seconds > 5:
            print(f"  {phase}: exit codes {codes} after {seconds:.1f} s, {lost} steps lost\n"
                  f"{run.said()[-1500:]}", flush=True)
    run.env["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    run.finish()
    if processes == 1 and (wrong := run.differences(reference)):
        tallies["step"].lost.update(wrong)
        print(f"  {run.workdir}: {wrong}", flush=True)
    return list(tallies.values())


def peer(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """SIGKILL to one of two processes: the other ends within the heartbeat's 10 s + 5 s, and a restart of both gives
    the curve of two undisturbed processes."""
    return [_lose_one(folder, rng, tries, signal.SIGKILL, "SIGKILL to one of two", "100", 15.0)]


def frozen(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """SIGSTOP to one of two processes: the other ends with 76 within 1.5 x stall_seconds=20, and names it."""
    return [_lose_one(folder, rng, tries, signal.SIGSTOP, "SIGSTOP to one of two", "20", 30.0)]


def _lose_one(folder: pathlib.Path, rng: random.Random, tries: int, how: signal.Signals, name: str, stall: str,
              limit: float) -> Tally:
    heartbeat = "10" if how == signal.SIGKILL else "100"
    options = {"processes": 2, "env": {"IGPT_HEARTBEAT_SECONDS": heartbeat}}
    straight = Run(folder, "two", f"--config.stall_seconds={stall}", **options)
    if not (straight.workdir / "result.json").exists():
        straight.finish()
    tally, number = Tally(name), 0
    while tally.tries < tries:
        number += 1
        run = Run(folder, f"{how.name}{number}", f"--config.stall_seconds={stall}", **options)
        for _ in range(min(3, tries - tally.tries)):
            ranks = run.start()
            if not run.wait_for(ranks, rf"^step {max(run.checkpoints(), default=0) + rng.randint(2, 30)}/"):
                end(ranks)
                break
            lost = rng.choice(ranks)
            left = next(process for process in ranks if process is not lost)
            lost.send_signal(how)
            since = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                left.wait(4 * limit)
            seconds, code = time.monotonic() - since, left.poll()
            lost.send_signal(signal.SIGCONT)
            end(ranks)
            named = how == signal.SIGKILL or f"stuck: process {ranks.index(lost)}," in run.said() or \
                "process 0, which coordinates the others, gives no answer" in run.said()
            expected = (76,) if how == signal.SIGSTOP else (134, -signal.SIGABRT)
            good = code in expected and seconds <= limit and named
            tally.add(good, seconds)
            if not good:
                print(f"  exit code {code} after {seconds:.1f} s\n{run.said()[-3000:]}", flush=True)
        run.finish()
        if run.losses() != straight.losses():
            tally.lost["losses"] += 1
            tally.survived -= 1
    return tally


def clean(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """Undisturbed runs, with a watchdog of 5 s: none may be ended. Ten in a row in a process that imports JAX once; in
    every fourth process nothing was compiled before."""
    tally = Tally("no fault, watchdog of 5 s")
    for first in range(0, tries, 10):
        cache = folder / (f"clean-cache{first}" if first % 40 == 0 else "cache")
        run = Run(folder, "clean", "--config.stall_seconds=5", "--config.steps=20",
                  env={"JAX_COMPILATION_CACHE_DIR": str(cache)})
        workdirs = [folder / f"clean{number}" for number in range(first, min(first + 10, tries))]
        each = [[*run.arguments[:1], f"--workdir={workdir}", *run.arguments[2:]] for workdir in workdirs]
        began = time.monotonic()
        job = subprocess.run([sys.executable, "-c", SEVERAL, json.dumps(each)], cwd=ROOT, env=run.env,
                             stderr=subprocess.PIPE, text=True)
        for workdir in workdirs:
            tally.add((workdir / "result.json").exists(), (time.monotonic() - began) / len(workdirs))
            shutil.rmtree(workdir, ignore_errors=True)
        if job.returncode:
            print(f"  exit code {job.returncode}\n{job.stderr[-3000:]}", flush=True)
        shutil.rmtree(folder / f"clean-cache{first}", ignore_errors=True)
    return [tally]


def disk(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """No file may grow beyond a few KB, as on a full disk: saves fail, training goes on, and the end is exit code 2 in
    one line. With room again the run goes on; lines of metrics that found no room are the only loss."""
    full, again = Tally("no room to save: exit code 2, one line"), Tally("room again: goes on")
    for number in range(tries):
        run = Run(folder, f"disk{number}")
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({rng.randint(2_000, 9_000)},) * 2)\n"
        with subprocess.Popen([sys.executable, "-c", limit + RUN, os.devnull, *run.arguments], cwd=ROOT,
                              env=run.env, stderr=subprocess.PIPE, text=True) as process:
            log = process.stderr.read()
        good = process.returncode == 2 and "could not be saved" in log.splitlines()[-1]
        full.add(good)
        if not good:
            print(f"  exit code {process.returncode}\n{log[:2500]}", flush=True)
        run.finish()
        wrong = [what for what in run.differences(reference) if what != "losses"]
        if not run.losses().items() <= reference.losses().items():
            wrong.append("losses")
        again.add(not wrong, lines_of_metrics=len(reference.losses()) - len(run.losses()))
        if wrong:
            print(f"  {wrong}", flush=True)
    return [full, again]


def damage(file: pathlib.Path, kind: str, rng: random.Random) -> bool:
    """One flipped bit, a random length cut off, up to 4 KiB zeroed, or no file. False where that changes nothing."""
    data = before = bytearray(file.read_bytes())
    if kind == "deleted" or not data:
        file.unlink()
        return True
    data = bytearray(before)
    if kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)):]
    else:
        start = rng.randrange(max(1, len(data) - 4096))
        data[start:start + 4096] = bytes(len(data[start:start + 4096]))
    file.write_bytes(data)
    return data != before


def files(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """Each file of the newest checkpoint, damaged: never restored; the step before is used and the bad one moved."""
    from igpt_jax import checkpoint
    from igpt_jax.model.image_gpt import Model
    from igpt_jax.parallel import sharding
    from igpt_jax.storage import hashes
    from igpt_jax.training.steps import abstract_state

    record = checkpoint.load_metadata(str(reference.workdir))
    config, mesh = record.config, sharding.make_mesh(record.config.mesh)
    shape = Model(config.model, len(record.palette_VC), record.image_size, config.precision, mesh)
    abstract = abstract_state(shape, config, mesh)
    bits = {step: _bits(reference, step, abstract, record) for step in reference.checkpoints()[-2:]}
    older, newest = sorted(bits)
    tallies = []
    copy = folder / "damaged"
    names = [str(file.relative_to(reference.workdir / "checkpoints" / str(newest)))
             for file in sorted((reference.workdir / "checkpoints" / str(newest)).rglob("*")) if file.is_file()]
    for kind in ("flipped", "cut", "zeroed", "deleted"):
        tally = Tally(f"a file of a checkpoint {kind} ({len(names)} files)")
        for name in names:
            for _ in range(1 if kind == "deleted" else tries):
                shutil.rmtree(copy, ignore_errors=True)
                for step in bits:
                    shutil.copytree(reference.workdir / "checkpoints" / str(step), copy / "checkpoints" / str(step))
                if not damage(copy / "checkpoints" / str(newest) / name, kind, rng):
                    continue
                with checkpoint.Checkpoints(str(copy), config) as checkpoints:
                    state, stored = checkpoints.restore(abstract, record)
                right = _equal(state, bits[stored.steps_done])
                # Without SHA256SUMS, as a run that is killed leaves it, the arrays alone are compared.
                unhashed = name == hashes.HASHES and not (copy / "quarantine").exists() and right
                tally.add(right and (stored.steps_done == older or unhashed), silent=int(not right),
                          without_fallback=int(stored.steps_done != older))
                if not right or stored.steps_done != older and not unhashed:
                    print(f"  {name} {kind}: restored step {stored.steps_done}, right: {right}", flush=True)
        tallies.append(tally)
    return tallies


def _bits(reference: Run, step: int, abstract: dict, record: object) -> list[bytes]:
    from igpt_jax import checkpoint

    with checkpoint.Checkpoints(str(reference.workdir), record.config) as checkpoints:
        import jax

        state, _ = checkpoints.restore(abstract, record, at=step)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def _equal(state: dict, bits: list[bytes]) -> bool:
    import jax

    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)] == bits


def store(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """Each file of a pixel store, damaged: reading all of it is an error, or gives the right images."""
    from igpt_jax.config import UserError
    from igpt_jax.data.store import Store

    def read(path: pathlib.Path) -> list[bytes]:
        opened = Store.open(str(path))
        splits = [opened.split(name) for name in ("train", "held_out")]
        return [part.tobytes() for split in splits for part in (split.read(np.arange(split.count)),
                                                                split.labels(np.arange(split.count)))]

    right, copy, tallies = read(folder / "store"), folder / "damaged_store", []
    names = [str(file.relative_to(folder / "store")) for file in sorted((folder / "store").rglob("*"))
             if file.is_file() and file.name not in ("result.json", "config.json", ".lock")]
    for kind in ("flipped", "cut", "zeroed", "deleted"):
        tally = Tally(f"a file of a pixel store {kind} ({len(names)} files)")
        for name in names:
            for _ in range(1 if kind == "deleted" else tries):
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(folder / "store", copy)
                if damage(copy / name, kind, rng):
                    try:
                        silent = read(copy) != right
                    except UserError:
                        silent = False
                    tally.add(not silent, silent=int(silent))
                    if silent:
                        print(f"  {name} {kind}: other images, without a word", flush=True)
        tallies.append(tally)
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=[])
    parser.add_argument("--tries", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("--keep")
    parser.add_argument("--short", action="store_true")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and theirs, would ignore it
    given = parser.parse_args()
    if given.short:
        global STEPS
        STEPS = 60
    unknown = set(given.faults) - set(FAULTS)
    if unknown:
        parser.error(f"fault {unknown.pop()!r} is not known. Known: {', '.join(FAULTS)}")
    rows = []
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(given.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        reference = Run(folder, "reference", noted=True)
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
        pathlib.Path(given.json).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(given.json).write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["survived"] < row["tries"] for row in rows))


# fault: (function, tries, tries of the short form)
FAULTS = {
    "kill": (kill, 200, 3),
    "stop": (stop, 80, 5),
    "stop-two": (lambda *given: stop(*given, processes=2), 20, 1),
    "peer": (peer, 6, 1),
    "frozen": (frozen, 6, 1),
    "files": (files, 20, 1),
    "store": (store, 20, 1),
    "disk": (disk, 5, 1),
    "clean": (clean, 100, 2),
}

if __name__ == "__main__":
    sys.exit(main())
