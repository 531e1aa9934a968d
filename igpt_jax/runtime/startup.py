"""Starts up several processes: connects them, and compares their config, code and data.

JAX's coordination service connects the processes and carries their messages.
"""

import collections
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # neither the client nor the service's deadline has a public name
from jax._src.lib import _jax

from igpt_jax.config import UserError, flat
from igpt_jax.metrics.logging import say
from igpt_jax.runtime.launchers import Launch


class Refused(Exception):
    """Process 0 refused to start the job. It reports the reason, so the other processes end silently."""


class PeerMissing(Exception):
    """A connected process no longer answers. The message names it."""


def connect(launch: Launch) -> None:
    """Connects the processes of a job. Call it from the main thread before the first JAX computation.

    Environment variables:
      IGPT_START_SECONDS: how long to wait for all processes; 300 by default. After that, missing processes are named
        on stderr, and JAX aborts this process with exit code 134.
      IGPT_HEARTBEAT_SECONDS: a process without a heartbeat for this long counts as dead; 100 by default. JAX then
        aborts the others, also with exit code 134.

    Raises:
      UserError: a variable is not a number of seconds, or the processes cannot be connected.
    """
    deadline, heartbeat = seconds("IGPT_START_SECONDS", 300), seconds("IGPT_HEARTBEAT_SECONDS", 100)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes over SIGTERM; `StopSignal` starts it later
    problem: list[Exception] = []

    def initialize() -> None:
        make = _jax.get_distributed_runtime_service
        # `jax.distributed.initialize` does not pass this time-out on, and without it the service does not name the
        # missing processes.
        _jax.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=deadline)
        try:
            jax.distributed.initialize(launch.coordinator, launch.processes, launch.process_id, launch.devices,
                                       cluster_detection_method="deactivate" if launch.coordinator else None,
                                       initialization_timeout=deadline + 10, heartbeat_timeout_seconds=heartbeat)
        except Exception as error:
            problem.append(error)
        finally:
            _jax.get_distributed_runtime_service = make

    # In a thread, since JAX waits in C++, where the main thread could not handle signals.
    thread = threading.Thread(target=initialize, daemon=True)
    with _missing_peers_named(launch, deadline):
        thread.start()
        for tries in itertools.count():
            thread.join(0.05)
            if not thread.is_alive():
                break
            if tries == 200:
                say(f"waiting for the other processes, at most {deadline} s")
    if problem:
        raise UserError(f"the processes cannot be connected (started by {launch.by}, coordinator "
                        f"{launch.coordinator}): {' '.join(str(problem[0]).split())}") from problem[0]


def seconds(name: str, default: int) -> int:
    """Reads an environment variable in seconds. Raises UserError unless it is an integer of at least 1."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise UserError(f"{name}={text!r} must be an integer, at least 1 second.")
    return int(text)


@contextlib.contextmanager
def _missing_peers_named(launch: Launch, deadline: int) -> Iterator[None]:
    """Sends stderr through missing_peers.py, in a process of its own: it outlives this one, which JAX may abort."""
    expected = {"deadline": deadline, "coordinator": launch.coordinator, "hosts": launch.hosts}
    stderr = os.dup(2)
    command = [sys.executable, "-S", os.path.join(os.path.dirname(__file__), "missing_peers.py"), json.dumps(expected)]
    # In a session of its own, since a Ctrl-C in the terminal must not end the reader before it has read everything.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr, start_new_session=True) as reader:
        os.dup2(reader.stdin.fileno(), 2)
        reader.stdin.close()
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


_rounds = itertools.count()  # numbers the exchanges: all processes make the same ones in the same order


def agree(**facts: Any) -> list[str]:
    """Checks that all processes have the same facts. All must call it equally often. Needs no devices.

    Args:
      facts: JSON values, or nested dicts of them.

    Returns:
      The host of each process, on process 0; empty on the others.

    Raises:
      UserError: on process 0, if facts differ; names the process, the fact and both values.
      Refused: on the others, if facts differ.
      PeerMissing: a process does not answer within IGPT_START_SECONDS.
    """
    state, prefix = jax_distributed.global_state, f"igpt_agree/{next(_rounds)}"
    if state.client is None:
        return []
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    mine = json.dumps({"host": host, "facts": flat(facts)}, default=str)
    state.client.key_value_set(f"{prefix}/{state.process_id}", mine)
    answers = [json.loads(_wait_for(number, f"{prefix}/{number}"))
               for number in range(state.num_processes) if state.process_id == 0]
    follow(_differences(answers) if answers else "")
    return [answer["host"] for answer in answers]


def follow(refusal: str) -> None:
    """Ends the job on all processes if process 0 passes a reason. All processes must call it.

    Args:
      refusal: the reason, in one line; empty to continue. Ignored on processes other than 0.

    Raises:
      UserError: on process 0, with the reason.
      Refused: on the others.
      PeerMissing: process 0 does not answer.
    """
    state, name = jax_distributed.global_state, f"igpt_refusal/{next(_rounds)}"
    if state.client is not None and state.process_id != 0:
        if _wait_for(0, name):
            raise Refused
        return
    if state.client is not None:
        state.client.key_value_set(name, refusal)
    if refusal:
        raise UserError(refusal)


def coordinates() -> bool:
    """Whether this process hosts the service that connects the others."""
    return jax_distributed.global_state.service is not None


def _wait_for(number: int, name: str) -> str:
    """The value that process `number` sets for the key `name`. Raises PeerMissing."""
    wait = seconds("IGPT_START_SECONDS", 300)
    try:
        return jax_distributed.global_state.client.blocking_key_value_get(name, 1000 * wait)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise PeerMissing(f"process {number} has not answered for {wait} s. Look at its log; to wait longer, set "
                          "IGPT_START_SECONDS.") from None


def _differences(answers: list[dict[str, Any]]) -> str:
    """Says in one line how processes differ from process 0, at most three of them; empty if none does."""
    first, differences = answers[0], []
    for number, other in enumerate(answers):
        names = sorted(name for name in first["facts"].keys() | other["facts"].keys()
                       if first["facts"].get(name) != other["facts"].get(name))
        if names:
            values = ", ".join(f"{name}={other['facts'].get(name)!r} (process 0: {first['facts'].get(name)!r})"
                               for name in names[:3])
            differences.append(f"process {number} on {other['host']} has {values}")
    more = f"; and {len(differences) - 3} more processes" if len(differences) > 3 else ""
    if not differences:
        return ""
    return f"{'; '.join(differences[:3])}{more}. Start all processes with the same command, code and data."


def code_digest() -> str:
    """A digest of this package's source files."""
    # Names are hashed too: a file that is renamed or missing changes the digest.
    digest = hashlib.sha256()
    package = pathlib.Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def find_devices() -> None:
    """Initializes JAX's devices: those of JAX_PLATFORMS, or the fastest available.

    Raises:
      UserError: the devices cannot be used.
      PeerMissing: another process does not answer.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS=cuda without its plugin
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        if jax_distributed.global_state.client is not None and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", reason):
            raise PeerMissing(f"the devices of all processes cannot be connected: {reason}") from None
        asked = jax.config.jax_platforms
        fix = (f"Unset JAX_PLATFORMS, which is {asked!r}, to use the devices of this machine, or install JAX for it: "
               "pip install -e '.[cuda]' or '.[tpu]'") if asked else "Set JAX_PLATFORMS=cpu to run on the CPU"
        raise UserError(f"JAX cannot use this machine's devices: {reason or 'no such platform'}. {fix}.") from None


def introduce(launch: Launch, hosts: list[str]) -> None:
    """Prints one line on process 0: the number of processes, their hosts, the launcher and the devices."""
    if jax.process_index() != 0:
        return
    names = list(dict.fromkeys(hosts))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    say(f"{jax.process_count()} processes on {shown} (started by {launch.by}): {devices()}")


def devices() -> str:
    """The devices of all processes in words: `8 x NVIDIA H100 80GB HBM3`."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def unused_accelerator() -> str:
    """A warning if JAX runs on the CPU of a machine with an accelerator, and JAX_PLATFORMS is not set; else empty."""
    if jax.config.jax_platforms or jax.devices()[0].platform != "cpu":
        return ""
    # A TPU's chips are /dev/vfio/N or /dev/accelN. (/dev/vfio/vfio and the folder /dev/accel are on other machines.)
    if glob.glob("/dev/vfio/[0-9]*") + glob.glob("/dev/accel[0-9]*"):
        found, extra = "a TPU", "'.[tpu]'"
    elif glob.glob("/dev/nvidia[0-9]*") or _nvidia_smi_lists_gpus():
        found, extra = "an NVIDIA GPU", "'.[cuda]' (or '.[cuda12]' for a driver older than 580)"
    else:
        return ""
    return (f"igpt_jax: this machine has {found}, but the installed JAX runs on the CPU only. Run: pip install {extra} "
            "To use the CPU without this warning: JAX_PLATFORMS=cpu")


def _nvidia_smi_lists_gpus() -> bool:
    """Whether nvidia-smi sees a GPU, as it does under Windows' Linux, which has no /dev/nvidia0."""
    try:
        return b"GPU 0" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return False
