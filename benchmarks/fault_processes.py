"""Faults of processes, for benchmarks/faults.py: killed, stopped, frozen and lost processes, and false alarms.

Each function takes a folder with a store, an undisturbed run, a random generator and the number of tries.
"""

import contextlib
import json
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

from fault_runs import EVALUATE_EVERY, ROOT, SAVE_EVERY, Run, Tally, end, rest

STOP_SECONDS = 5.0  # that a run may take to save and end


def kill(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """SIGKILL: a quarter during start-up, the others up to 1.5 s after the first finished step, also during saves."""
    tally, number, redone = Tally("SIGKILL, restarted until done"), 0, []
    start_seconds = 6.0
    while tally.tries < tries:
        run, kills = Run(folder, f"kill{number}", record_ids=True), 0
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


def stop(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int, processes: int = 1) -> list[Tally]:
    """SIGTERM or SIGINT in each phase in turn: exit code 75 within STOP_SECONDS, and no finished step is lost.

    Until the command line is read, which takes some tenths of a second, a signal ends Python as it ends any program.
    """
    phases = ["start", "compile", "step", "evaluate", "save"]
    words = {1: "one process", 2: "one of two processes"}[processes]
    tallies = {phase: Tally(f"SIGTERM/SIGINT to {words}: {phase}") for phase in phases}
    number, run = 0, Run(folder, f"stop{processes}-0", processes=processes)
    for attempt in range(tries):
        phase = phases[attempt % len(phases)]
        if run.checkpoints() and run.checkpoints()[-1] > run.steps - 2 * EVALUATE_EVERY:
            number += 1
            run = Run(folder, f"stop{processes}-{number}", processes=processes)
        run.env["JAX_COMPILATION_CACHE_DIR"] = str(folder / (f"cold{attempt}" if phase == "compile" else "cache"))
        done, began = max(run.checkpoints(), default=0), time.time()
        ranks = run.start()
        if phase == "start":
            rest(ranks, rng.uniform(0, 4))
        elif phase == "compile":  # it begins about a second after the job
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
        # A scheduler signals all processes. Once they are connected, a signal to one of them must do.
        for process in ranks if phase == "start" else [rng.choice(ranks)]:
            if process.poll() is None:
                process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
        codes = {process.wait() for process in ranks}
        seconds = time.monotonic() - sent
        lost = run.newest_logged() - max(run.checkpoints(), default=0)
        finished = max(run.checkpoints(), default=0) == run.steps
        allowed = {75} | ({0} if finished else set()) | ({-signal.SIGTERM, -signal.SIGINT, 1} if reading else set())
        good = codes <= allowed and lost == 0
        tallies[phase].add(good and seconds <= STOP_SECONDS, seconds, steps_lost=lost)
        if not good or seconds > STOP_SECONDS:
            print(f"  {phase}: exit codes {codes} after {seconds:.1f} s, {lost} steps lost\n"
                  f"{run.output()[-1500:]}", flush=True)
    run.env["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    run.finish()
    if processes == 1 and (wrong := run.differences(reference)):
        tallies["step"].lost.update(wrong)
        tallies["step"].survived -= 1
        print(f"  {run.workdir}: {wrong}", flush=True)
    return list(tallies.values())


def peer(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """SIGKILL to one of two processes: the other ends within the heartbeat's 10 s + 5 s.

    A restart of both gives the losses of two undisturbed processes.
    """
    return [_lose_one(folder, rng, tries, signal.SIGKILL, "SIGKILL to one of two", "100", 15.0)]


def frozen(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """SIGSTOP to one of two processes: the other ends with exit code 76 within 1.5 x stall_seconds=20, and names it."""
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
            named = how == signal.SIGKILL or f"stuck: process {ranks.index(lost)}," in run.output() or \
                "process 0, which coordinates the others, does not respond" in run.output()
            expected = (76,) if how == signal.SIGSTOP else (134, -signal.SIGABRT)
            good = code in expected and seconds <= limit and named
            tally.add(good, seconds)
            if not good:
                print(f"  exit code {code} after {seconds:.1f} s\n{run.output()[-3000:]}", flush=True)
        run.finish()
        if run.losses() != straight.losses():
            tally.lost["losses"] += 1
            tally.survived -= 1
    return tally


def clean(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """Undisturbed runs under a watchdog of 5 s, which must end none of them.

    Ten run in a row in one process, to import JAX once. Every fourth process starts with an empty compilation cache.
    """
    tally = Tally("no fault, watchdog of 5 s")
    for first in range(0, tries, 10):
        cache = folder / (f"clean-cache{first}" if first % 40 == 0 else "cache")
        run = Run(folder, "clean", "--config.stall_seconds=5", "--config.steps=20",
                  env={"JAX_COMPILATION_CACHE_DIR": str(cache)})
        workdirs = [folder / f"clean{number}" for number in range(first, min(first + 10, tries))]
        each = [[*run.arguments[:1], f"--workdir={workdir}", *run.arguments[2:]] for workdir in workdirs]
        began = time.monotonic()
        job = subprocess.run([sys.executable, "tests/scripts/jobs.py", json.dumps(each)], cwd=ROOT, env=run.env,
                             stderr=subprocess.PIPE, text=True)
        for workdir in workdirs:
            tally.add((workdir / "result.json").exists(), (time.monotonic() - began) / len(workdirs))
            shutil.rmtree(workdir, ignore_errors=True)
        if job.returncode:
            print(f"  exit code {job.returncode}\n{job.stderr[-3000:]}", flush=True)
        shutil.rmtree(folder / f"clean-cache{first}", ignore_errors=True)
    return [tally]
