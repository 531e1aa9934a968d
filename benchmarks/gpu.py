"""Measures a GPU: one queue of steps, the most valuable first, within a budget of seconds.

    benchmarks/gpu.sh SECONDS [--data=CIFAR10.xz] [--folder=FOLDER] [--tiny]

A step is a program that writes its figures to FOLDER/NAME.json. It starts if its estimate fits into the seconds that
are left. It is ended after three times its estimate, or with the budget. A step that fails leaves FOLDER/NAME.log, and
the queue continues.

The same command resumes: figures of the same command, code, device, packages and XLA flags are not measured again, and
steps that failed come last. At the end it prints each figure beside its goal. Exit code 1: a step failed; 75: stopped.

--data is a file of pack.py, for `reproduce_10m`. --tiny tries the queue with tiny shapes on any device.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, TRIALS = ROOT / "benchmarks/results/gpu", ROOT / "runs/gpu_tiny"
LOG_BYTES = 20_000
STOPPED = 75  # exit code of a step that the next run continues
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cublas", "flax", "optax", "torch",
            "transformers")
PATIENCE = 3  # a step is ended after so many times its estimate, so that a hanging one leaves time for the others

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A program of this folder with its arguments, after environment variables of its own (NAME=VALUE)."""
    name: str
    seconds: float  # estimate
    command: str


STEP = "train_step.py --rounds=10 --only='ours, bfloat16, 1 '"
# At batch 48 Hugging Face's model saves 64 GiB of activations (57 MiB per layer and image, by torch's own partition).
S, XL = f"{STEP} --model=igpt_s --batch=48", f"{STEP} --model=igpt_xl --remat=full"
M, L = (f"{STEP} --model=igpt_{size} --remat=dots" for size in "ml")
SAMPLE = "sampling.py --side=32 --precision=bfloat16 --lengths= --theirs=16"
QUEUE = (
    Step("device", 10, "device.py"),
    Step("step_igpt_s", 45, f"{S} --only='product|ours, bfloat16, 1 '"),
    Step("step_igpt_l", 50, f"{L} --batch=32"),
    Step("step_igpt_s_peers", 100, f"{S} --only='ours, bfloat16, 1 |autocast, compiled'"),
    Step("kernels", 30, "attention.py --dtype=bfloat16 --shape 32,1024,8,64 16,1024,16,96 8,1024,24,128 8,4096,8,64"),
    Step("reproduce_10m", 270, "reproduction.py"),
    Step("step_igpt_m", 50, f"{M} --batch=64"),
    Step("step_igpt_xl", 90, f"{XL} --batch=8"),
    Step("sample_igpt_s", 60, f"{SAMPLE} --size=igpt_s --batch=1024"),
    Step("sample_igpt_l", 90, f"{SAMPLE} --size=igpt_l --batch=128"),
    Step("step_igpt_s_48", 40, f"{S} --side=48"),
    Step("step_igpt_s_64", 40, f"{S} --side=64 --batch=32"),
    Step("step_igpt_m_48", 50, f"{M} --side=48 --batch=32"),
    Step("step_igpt_m_64", 50, f"{M} --side=64 --batch=16"),
    Step("step_igpt_l_48", 60, f"{L} --side=48 --batch=16"),
    Step("step_igpt_l_64", 60, f"{L} --side=64 --batch=8"),
    Step("step_igpt_xl_48", 90, f"{XL} --side=48 --batch=4"),
    Step("step_igpt_xl_64", 90, f"{XL} --side=64 --batch=2"),
    Step("step_igpt_s_dots", 40, f"{S} --remat=dots"),
    Step("step_igpt_s_none", 40, f"{S} --remat=none"),
    Step("step_igpt_s_xla_attention", 40, f"{S} --attention=reference"),
    Step("flag_latency_hiding", 40, f"XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true {S}"),
    Step("flag_triton_gemm_any", 40, f"XLA_FLAGS=--xla_gpu_triton_gemm_any=true {S}"),
    Step("flag_cublaslt", 40, f"XLA_FLAGS=--xla_gpu_enable_cublaslt=true {S}"),
    Step("flag_no_command_buffer", 40, f"XLA_FLAGS=--xla_gpu_enable_command_buffer= {S}"),
)
TINY = {  # arguments that come after a program's own, and so replace them
    "device.py": "--side=256 --mib=16",
    "train_step.py": "--model=2x32x2 --side=8 --batch=2 --rounds=2",
    "attention.py": "--shape 1,64,2,16 1,64,2,24 --rounds=2",
    "reproduction.py": "--folder=runs/gpu_tiny_10m --model=igpt_tiny --steps=8 --batch=8",
    "sampling.py": "--size=igpt_tiny --side=8 --batch=2 --theirs=4",
}


def tiny(step: Step) -> Step:
    """The same step with tiny shapes, which takes at most 80 s on two cores."""
    command = f"{step.command} {TINY[program(step)[1][0]]}"
    return Step(step.name, min(step.seconds, 80), command)


def program(step: Step) -> tuple[dict[str, str], list[str]]:
    """The environment variables of a step, and its program with arguments."""
    words = shlex.split(step.command)
    first = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


def run(queue: Sequence[Step], seconds: float, folder: pathlib.Path, identity: Mapping[str, str],
        programs: pathlib.Path = ROOT / "benchmarks") -> int:
    """Runs the queue; see above. Returns the number of steps that failed.

    Args:
      seconds: the budget.
      folder: of the figures.
      identity: code and device, compared with those of figures that exist.
      programs: folder of the programs.
    """
    end, failures = time.monotonic() + seconds, 0
    folder.mkdir(parents=True, exist_ok=True)
    for step in sorted(queue, key=lambda step: has_failed(step, folder, identity)):
        left = end - time.monotonic()
        if is_measured(step, folder, identity):
            print(f"{step.name}: measured before", flush=True)
        elif left < step.seconds:
            print(f"{step.name}: skipped, takes about {step.seconds:g} s of the {left:.0f} left", flush=True)
        else:
            print(f"{step.name}: {step.command}", flush=True)
            limit = min(left, PATIENCE * step.seconds)
            failures += measure(step, limit, folder, identity, programs) not in (0, STOPPED)
    return failures


def measure(step: Step, limit: float, folder: pathlib.Path, identity: Mapping[str, str], programs: pathlib.Path) -> int:
    """Runs a step for at most `limit` seconds; writes its figures, and a log if it fails. Returns its exit code."""
    variables, (name, *arguments) = program(step)
    figures, log, start = folder / f".{step.name}.json", folder / f"{step.name}.log", time.monotonic()
    figures.unlink(missing_ok=True)
    with log.open("w+b") as errors:
        process = subprocess.Popen([sys.executable, programs / name, *arguments, "--json", figures], cwd=ROOT,
                                   env={**os.environ, "SECONDS_LEFT": str(int(limit)), **variables}, stderr=errors,
                                   start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            errors.write(f"ended after {limit:.0f} s\n".encode())
        finally:
            with contextlib.suppress(ProcessLookupError):  # its group: candidates run in processes of their own
                os.killpg(process.pid, signal.SIGKILL)
        exit_code, spent = process.wait(), time.monotonic() - start
        errors.seek(0)
        said = errors.read()[-LOG_BYTES:].decode(errors="replace")
    if figures.exists():
        queue = {**identity, "command": step.command, "exit_code": exit_code, "seconds": round(spent),
                 "commit": commit()}
        figures.write_text(json.dumps({**json.loads(figures.read_text()), "queue": queue}, indent=1) + "\n")
        kept = folder / f"{step.name}.json"
        # Figures of a step that ended well are not replaced by those of one that did not.
        partial = exit_code and known(kept).get("exit_code") == 0
        figures.replace(kept.with_suffix(".partial.json") if partial else kept)
    if exit_code in (0, STOPPED):
        log.unlink()
        if exit_code:
            print(f"{step.name}: stopped with the budget; the next run continues it", flush=True)
        return exit_code
    last = (said.splitlines() or [""])[-1]
    print(f"{step.name}: FAILED, exit code {exit_code} after {spent:.0f} s: {last}", flush=True)
    log.write_text(f"{heading(step, identity)}\n{said}")
    return exit_code


def heading(step: Step, identity: Mapping[str, str]) -> str:
    """The first line of a failed step's log."""
    return json.dumps({**identity, "command": step.command})


def has_failed(step: Step, folder: pathlib.Path, identity: Mapping[str, str]) -> bool:
    with contextlib.suppress(OSError):
        return (folder / f"{step.name}.log").read_text(errors="replace").startswith(heading(step, identity))
    return False


def is_measured(step: Step, folder: pathlib.Path, identity: Mapping[str, str]) -> bool:
    return known(folder / f"{step.name}.json").items() >= {**identity, "command": step.command, "exit_code": 0}.items()


def known(figures: pathlib.Path) -> dict[str, Any]:
    """How a file's figures were measured; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(figures.read_text())["queue"]
    return {}


def code() -> str:
    """A digest of the package and of the programs. Unlike a commit it stays when figures are committed, and needs no
    Git."""
    files = [*ROOT.glob("igpt_jax/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("configs/*.py"),
             ROOT / "launch/reproduce_10m.sh"]
    contents = [file.read_bytes() for file in sorted(files) if file != pathlib.Path(__file__)]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]


def commit() -> str:
    """For readers: $COMMIT, or what `git describe` says; empty where there is neither."""
    with contextlib.suppress(OSError):
        return os.environ.get("COMMIT") or subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return ""


def surroundings() -> dict[str, str]:
    """What else decides the figures: versions of packages, and XLA's flags."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {**versions, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


# Goals. Each reads one value from a step's figures; KeyError, StopIteration, TypeError: it is not there.

def seconds_of(name: str, figures: Figures) -> float:
    """Of the candidates whose names begin with `name`, the fastest one's."""
    return min(row["seconds"] for row in figures["rows"] if row["name"].startswith(name))


def mfu(figures: Figures) -> float:
    return max(row["mfu"] for row in figures["rows"] if row["name"].startswith("ours"))


def memory(figures: Figures) -> float:
    """How far the peak of memory is from the compiler's plan, as a share."""
    return next(abs(row["peak_bytes"] / row["planned_bytes"] - 1) for row in figures["rows"]
                if row["name"].startswith("ours"))


def times_faster(name: str) -> Callable[[Figures], float]:
    return lambda figures: seconds_of(name, figures) / seconds_of("ours", figures)


def error_of_cudnn(figures: Figures) -> float:
    """cuDNN's largest error in units of that of the reference in the same dtype."""
    errors = {(row["shape"], row["what"], row["attention"]): row["error"] for row in figures["rows"]}
    return max(error / errors[shape, what, "reference"] for (shape, what, name), error in errors.items()
               if name == "cudnn")


def nats_per_pixel(figures: Figures) -> float:
    """Only of a run that has finished."""
    return {"done": figures["nats_per_pixel"]}[figures["jobs"]["pretrain"]["status"]]


GOALS = (  # what, step, value, whether it should be at least or at most the goal, goal, format
    *((f"iGPT-{size}, MFU", f"step_igpt_{size.lower()}", mfu, "at least", goal, ".1%")
      for size, goal in (("S", 0.38), ("L", 0.48), ("M", 0.45), ("XL", 0.48))),
    *((f"iGPT-S, speed in multiples of {peer}'s, compiled", "step_igpt_s_peers", times_faster(peer), "at least", goal,
       ".2f") for peer, goal in (("Hugging Face", 2), ("plain GPT", 1.1))),
    *((f"iGPT-{size}, peak memory off the plan", f"step_igpt_{size.lower()}", memory, "at most", 0.1, ".1%")
      for size in ("S", "L", "M", "XL")),
    ("cuDNN attention, error in multiples of the reference's", "kernels", error_of_cudnn, "at most", 2, ".2f"),
    ("igpt_10m, nats per pixel on CIFAR-10's test images", "reproduce_10m", nats_per_pixel, "at most", 2.04, ".3f"),
)


def summary(folder: pathlib.Path, identity: Mapping[str, str]) -> list[str]:
    """A line per goal: the value, the goal, and whether it is met."""
    lines = []
    for what, step, value, direction, goal, form in GOALS:
        shown = "not measured"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, StopIteration, AttributeError):
            figures = json.loads((folder / f"{step}.json").read_text())
            found = value(figures)
            met = found >= goal if direction == "at least" else found <= goal
            old = "" if figures["queue"].items() >= identity.items() else ", by other code or another device"
            shown = f"{found:{form}}  {'met' if met else 'MISSED'}{old}"
        lines.append(f"{what:56} goal: {direction} {goal:{form}}  {shown}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("seconds", type=float, help="budget")
    parser.add_argument("--data", help="CIFAR-10 as pack.py packs it; without it no reproduce_10m")
    parser.add_argument("--folder", type=pathlib.Path, help="of the figures; default: benchmarks/results/gpu, or with "
                                                            "--tiny runs/gpu_tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any device")
    options, start = parser.parse_args(), time.monotonic()
    if options.data and not os.path.exists(options.data):
        parser.error(f"--data={options.data} is not there. Name a file that pack.py wrote, or leave --data out.")
    if paths := os.environ.get("PYTHONPATH"):  # steps run in another folder
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    try:
        from train_step import DEVICE, PLATFORM  # asks for the device, which takes seconds of the budget
    except (ImportError, subprocess.CalledProcessError) as error:
        parser.error(f"{error}. Install what docs/performance.md names for the queue on a GPU.")
    if PLATFORM != "gpu" and not options.tiny:
        parser.error(f"JAX runs on {DEVICE}, not on a GPU. Install jax[cuda13], or try the queue with --tiny.")
    folder = (options.folder or (TRIALS if options.tiny else RESULTS)).resolve()
    if options.tiny and folder == RESULTS:
        parser.error(f"{folder} is for real figures. Leave --folder out, or name another one.")
    queue = [tiny(step) if options.tiny else step for step in QUEUE if options.data or step.name != "reproduce_10m"]
    if options.data:
        os.environ["DATA"] = os.path.abspath(options.data)
        digest = hashlib.sha256(pathlib.Path(options.data).read_bytes()).hexdigest()[:12]
        queue = [dataclasses.replace(step, command=f"DATA_SHA256={digest} {step.command}")  # so that other data counts
                 if step.name == "reproduce_10m" else step for step in queue]
    identity = {"code": code(), "device": DEVICE, **surroundings()}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # `measure` then ends its step
    try:
        failures = run(queue, options.seconds - (time.monotonic() - start), folder, identity)
    except KeyboardInterrupt:
        return STOPPED
    print("\n".join(["", f"{DEVICE}, code {identity['code']}, commit {commit()}", *summary(folder, identity)]))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
