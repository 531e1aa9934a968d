"""Compiles each config in a process of its own, and caches the verdicts by a hash of everything that decides them."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from igpt_jax import storage
from igpt_jax.config import PlanConfig, UserError, to_dict, values_with
from igpt_jax.parallel import topology
from igpt_jax.planner.compilation import Verdict, compile_step
from igpt_jax.storage import side_files
from igpt_jax.storage.hashes import json_digest

PACKAGE = pathlib.Path(__file__).parent.parent
# The code that decides a verdict: the step, and how its program is read. The training loop and the jobs are not in it.
CODE = ("parallel", "model", "training/optimizer.py", "training/steps.py", "evaluation/steps.py",
        "evaluation/exact_loss.py", "runtime/precision.py", "planner/flops.py",
        "planner/hlo.py", "planner/program.py", "planner/targets.py", "planner/compilation.py")
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cublas")
FLAGS = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}  # the variable with a compiler's flags, by platform
TIMEOUT_SECONDS = 1800


def verdict_for(config: PlanConfig) -> Verdict:
    """The verdict on `config`'s step, from the cache in $IGPT_CACHE (default ~/.cache/igpt_jax) or newly compiled.

    A step for attached devices is compiled in this process, since a second one could not open them, and is not cached.
    Failures are not cached either.

    Raises:
      UserError: the config cannot run on that topology, or a vendor's compiler is missing.
    """
    if config.topology == "attached":
        return compile_step(config)
    folder = storage.path(os.environ.get("IGPT_CACHE") or "~/.cache/igpt_jax") / "verdicts"
    file = folder / f"{_cache_key(config)}.json"
    if known := side_files.load(file):
        return Verdict(**known)
    verdict = _ask(config)
    if verdict.status == "refused":
        raise UserError(verdict.message)
    # A step that does not fit is a result and is cached. A failure may be this machine's, such as too little memory for
    # the compiler, and could succeed next time.
    if verdict.status != "failed":
        with contextlib.suppress(OSError):  # a cache that cannot be written costs no answer
            storage.publish(file, json.dumps(dataclasses.asdict(verdict)))
    return verdict


def _ask(config: PlanConfig) -> Verdict:
    """Compiles in a new process. However that process ends, there is a verdict."""
    python = os.path.expanduser(config.python) or sys.executable
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "verdict.json"
        try:
            done = subprocess.run([python, "-m", "igpt_jax.planner.compilation", str(out)], text=True,
                                  input=json.dumps(to_dict(config)), capture_output=True, timeout=TIMEOUT_SECONDS,
                                  env=_environment(topology.parse(config.topology), own=not config.python))
        except subprocess.TimeoutExpired:
            return Verdict("failed", f"the compiler took more than {TIMEOUT_SECONDS / 60:.0f} minutes.")
        if out.exists() and done.returncode == 0:
            return Verdict(**json.loads(out.read_text()))
        # A compiler that crashes writes its reason to stderr, usually in the last line.
        last = [f": {line.strip()}" for line in done.stderr.splitlines() if line.strip()] or ["."]
        return Verdict("failed", f"the compiler's process {_end(done.returncode)}{last[-1]}")


def _end(code: int) -> str:
    """How a process ended. A signal gives a negative exit code, or one above 128 if a shell was in between."""
    number = -code if code < 0 else code - 128
    if number not in set(signal.Signals):
        return f"ended with code {code}"
    name = signal.Signals(number).name
    return f"was killed by {name}" + (" (perhaps this machine ran out of memory)" if name == "SIGKILL" else "")


def _environment(target: topology.Target, own: bool) -> dict[str, str]:
    """The variables of the compiler's process. `own`: it runs this interpreter, which may need PYTHONPATH."""
    paths = os.pathsep.join(filter(None, (str(PACKAGE.parent), own and os.environ.get("PYTHONPATH"))))
    # JAX's own variables are left out: some change the program, and the cache does not know them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if target.platform == "tpu":
        # Do not look for this machine's own TPUs, nor wait for a program that holds them.
        environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3"}
    if target.platform == "cpu":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={target.devices}"
    return environment


def _cache_key(config: PlanConfig) -> str:
    """A hash of all that decides a verdict: keys of the config, the step's code, the compilers' versions and flags.

    A key states with `compiled=False` that it does not change the compiled step (prices, paths, intervals). Keys count
    unless they say so, so that one that forgets costs a compile and never gives a wrong verdict.
    """
    values = values_with(config, "compiled", True)
    flags = os.environ.get(FLAGS.get(topology.parse(config.topology).platform, ""), "")
    return json_digest([values, _code_digest(), _versions(config.python), flags], length=32)


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for name in CODE:
        found = PACKAGE / name
        for file in sorted(found.rglob("*.py")) if found.is_dir() else [found]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _versions(python: str) -> dict[str, str]:
    """Versions of PACKAGES in the environment of the interpreter `python`; empty means this one. Raises UserError."""
    if python:
        script = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
        try:
            lines = subprocess.run([os.path.expanduser(python), "-c", script], capture_output=True, text=True,
                                   check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"python={python!r} does not run: {error}. Set it to a Python interpreter.") from None
        have = dict(words for line in lines if len(words := line.split()) == 2)  # wrappers may print more
    else:
        have = {each.name: each.version for each in importlib.metadata.distributions()}
    return {name: have.get(name, "") for name in PACKAGES}
