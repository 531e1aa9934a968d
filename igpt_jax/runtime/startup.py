"""Start-up of several processes: whether all have come, and whether they agree on what to do.

JAX's own runtime connects them and carries what they say.
"""

import collections
import contextlib
import functools
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


class Elsewhere(Exception):
    """Process 0 says why the job cannot start."""


class PeerMissing(Exception):
    """A process that was there does not answer any more. The message names it."""


# Whether all have come.

def connect(launch: Launch) -> None:
    """Joins the processes of a job. Call it from the main thread before the first JAX computation.

    Waits IGPT_START_SECONDS (300) for all of them; who has not come by then is named, and JAX ends this process with
    exit code 134. A process that gives no sign of life for IGPT_HEARTBEAT_SECONDS (100) is later taken for dead, and
    ends the others likewise.

    Raises:
      UserError: one of the two is no number of seconds.
    """
    deadline, heartbeat = seconds("IGPT_START_SECONDS", 300), seconds("IGPT_HEARTBEAT_SECONDS", 100)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself: `StopSignal` begins it
    problem: list[Exception] = []

    def initialize() -> None:
        make = _jax.get_distributed_runtime_service
        # Without a deadline of its own the service never tells who is missing.
        _jax.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=deadline)
        try:
            jax.distributed.initialize(launch.coordinator, launch.processes, launch.process_id, launch.devices,
                                       cluster_detection_method="deactivate" if launch.coordinator else None,
                                       initialization_timeout=deadline + 10, heartbeat_timeout_seconds=heartbeat)
        except Exception as error:
            problem.append(error)
        finally:
            _jax.get_distributed_runtime_service = make

    # In a thread: JAX waits in C++, and the main thread must hear signals.
    thread = threading.Thread(target=initialize, daemon=True)
    with _roll_call(launch, deadline):
        thread.start()
        for tries in itertools.count():
            thread.join(0.05)
            if not thread.is_alive():
                break
            if tries == 200:
                say(f"waits for the other processes, {deadline} s at most")
    if problem:
        raise UserError(f"the processes cannot be connected (started by {launch.by}, coordinator "
                        f"{launch.coordinator}): {' '.join(str(problem[0]).split())}") from problem[0]


def seconds(name: str, default: int) -> int:
    """An environment variable that is a number of seconds. Raises UserError."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise UserError(f"{name}={text!r} must be a whole number of seconds, at least 1.")
    return int(text)


@contextlib.contextmanager
def _roll_call(launch: Launch, deadline: int) -> Iterator[None]:
    """Within, stderr goes through a process that outlives this one: JAX aborts where others are missing."""
    expected = {"deadline": deadline, "coordinator": launch.coordinator, "hosts": launch.hosts}
    stderr = os.dup(2)
    command = [sys.executable, "-S", os.path.join(os.path.dirname(__file__), "missing_peers.py"), json.dumps(expected)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr, start_new_session=True) as reader:
        os.dup2(reader.stdin.fileno(), 2)
        reader.stdin.close()
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


# Whether they agree.

_rounds = itertools.count()


def agree(**facts: Any) -> list[str]:
    """Compares facts between the processes; all must call it equally often. Needs no devices.

    Args:
      facts: what JSON holds, or nested dicts of that.

    Returns:
      The host of each process, on process 0.

    Raises:
      UserError: on process 0, where another process has other facts; names process, fact and values.
      Elsewhere: on the others.
      PeerMissing: a process does not answer within IGPT_START_SECONDS.
    """
    state, prefix = jax_distributed.global_state, f"igpt_agree/{next(_rounds)}"
    if state.client is None:
        return []
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    mine = json.dumps({"host": host, "facts": flat(facts)}, default=str)
    state.client.key_value_set(f"{prefix}/{state.process_id}", mine)
    told = [json.loads(_wait_for(number, f"{prefix}/{number}"))
            for number in range(state.num_processes) if state.process_id == 0]
    follow(_differences(told) if told else "")
    return [each["host"] for each in told]


def follow(refusal: str) -> None:
    """Ends all processes where process 0 gives a reason to. What the others give does not count.

    Raises:
      UserError: on process 0, with the reason.
      Elsewhere, PeerMissing: on the others.
    """
    state, name = jax_distributed.global_state, f"igpt_refusal/{next(_rounds)}"
    if state.client is not None and state.process_id != 0:
        if _wait_for(0, name):
            raise Elsewhere
        return
    if state.client is not None:
        state.client.key_value_set(name, refusal)
    if refusal:
        raise UserError(refusal)


def coordinates() -> bool:
    """Whether the others depend on this process: it hosts the service that connects them."""
    return jax_distributed.global_state.service is not None


def _wait_for(number: int, name: str) -> str:
    wait = seconds("IGPT_START_SECONDS", 300)
    try:
        return jax_distributed.global_state.client.blocking_key_value_get(name, 1000 * wait)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise PeerMissing(f"process {number} has not answered for {wait} s. Look at its log.") from None


def _differences(told: list[dict[str, Any]]) -> str:
    """What the first processes that differ from process 0 say, in one line; empty where none does."""
    first, differences = told[0], []
    for number, other in enumerate(told):
        names = sorted(name for name in first["facts"].keys() | other["facts"].keys()
                       if first["facts"].get(name) != other["facts"].get(name))
        if names:
            values = ", ".join(f"{name}={other['facts'].get(name)!r} (process 0: {first['facts'].get(name)!r})"
                               for name in names[:3])
            differences.append(f"process {number} on {other['host']} has {values}")
    more = f"; and {len(differences) - 3} processes more" if len(differences) > 3 else ""
    return f"{'; '.join(differences[:3])}{more}. Start all with the same command, code and data." if differences else ""


def code_digest() -> str:
    """SHA-256 of this package's source files, shortened."""
    digest = hashlib.sha256()
    package = pathlib.Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def find_devices() -> None:
    """Starts JAX's devices: those of JAX_PLATFORMS, or the best that there are.

    Raises:
      UserError: they cannot be used.
      PeerMissing: another process does not answer.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS=cuda without its plugin
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        if jax_distributed.global_state.client is not None and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", reason):
            raise PeerMissing(f"the devices of all processes cannot be connected: {reason}") from None
        asked = jax.config.jax_platforms
        fix = (f"Unset JAX_PLATFORMS, which is {asked!r}, to use the devices that are there, or install JAX for it: "
               "pip install -e '.[cuda]' or '.[tpu]'") if asked else "Set JAX_PLATFORMS=cpu to run without them"
        raise UserError(f"JAX cannot use this machine's devices: {reason or 'no such platform'}. {fix}.") from None


def introduce(launch: Launch, hosts: list[str]) -> None:
    """One line of process 0: how many processes, on which hosts, started by whom, with which devices."""
    if jax.process_index() != 0:
        return
    names = list(dict.fromkeys(hosts))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    say(f"{jax.process_count()} processes on {shown} (started by {launch.by}): {devices}")
