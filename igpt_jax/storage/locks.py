"""A workdir's lock: one job at a time, on a disk or in a bucket. The lock of a dead job does not block the next one."""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from igpt_jax import process
from igpt_jax.config import UserError
from igpt_jax.storage.files import publish
from igpt_jax.storage.paths import is_local

LOCK = ".lock"
HEARTBEAT_SECONDS = 20.0


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Holds the lock of `workdir` (created if missing) for one job.

    Local disk: an flock on `workdir/.lock`. The kernel releases it when the process ends, in whatever way.

    Bucket: an object that its holder rewrites every 20 seconds (a heartbeat) and deletes at the end. A lock is taken
    over if it does not change for a minute, or if its process ran on this host and has ended. Clocks of different
    hosts are never compared.

    The bucket clients used here cannot create an object only if it is absent, so two jobs that start together can both
    believe that they hold the lock. So can a job that was frozen while another took over. The one that finds the
    other's lock in place of its own ends with exit code 2, within 20 seconds.

    Raises:
      UserError: another job holds the lock. The message names its host, process and start.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
    with _local_lock(workdir, mine) if is_local(workdir) else _bucket_lock(workdir, mine):
        yield


def _in_use(workdir: epath.Path, text: str) -> UserError:
    try:
        holder = "host {host}, process {pid}, since {start}".format(**json.loads(text))
    except (ValueError, KeyError):  # it has the lock, but has not written its name yet
        holder = "a job that is just starting"
    return UserError(f"workdir {workdir} is in use by {holder}. Wait for it, stop it, or give another --workdir.")


@contextlib.contextmanager
def _local_lock(workdir: epath.Path, mine: dict) -> Iterator[None]:
    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(workdir, file.read()) from None
        # The file is never deleted: a job that has it open would then hold the lock of a file that others cannot see.
        file.truncate(0)
        file.write(json.dumps(mine))
        file.flush()
        yield


@contextlib.contextmanager
def _bucket_lock(workdir: epath.Path, mine: dict) -> Iterator[None]:
    file = workdir / LOCK

    def content() -> str:
        try:
            return file.read_text()
        except FileNotFoundError:
            return ""

    def beat(count: int) -> str:
        text = json.dumps({**mine, "beat": count})
        publish(file, text)
        return text

    # Waiting for three heartbeats tells a live job from a dead one without comparing the clocks of two hosts.
    found = content()
    if found and not _ended(found):
        time.sleep(3 * HEARTBEAT_SECONDS)
        if content() not in ("", found):  # "": its holder ended and removed it while we waited
            raise _in_use(workdir, content())
    latest = beat(0)
    # Of two jobs that start at once the later write wins. Both wait, so that both see who that was.
    time.sleep(HEARTBEAT_SECONDS / 10)
    if content() != latest:
        raise _in_use(workdir, content())
    done = threading.Event()

    def keep() -> None:
        nonlocal latest
        for count in itertools.count(1):
            if done.wait(HEARTBEAT_SECONDS):
                return
            with contextlib.suppress(Exception):  # one failed heartbeat is harmless: others wait for three
                if (now := content()) not in ("", latest):
                    process.say(f"igpt_jax: {_in_use(workdir, now)} This job ends.", sys.stderr)
                    # From a thread, sys.exit would end the thread alone. Leaving at once also writes nothing more into
                    # a workdir that is another job's.
                    os._exit(2)
                latest = beat(count)

    thread = threading.Thread(target=keep, name="lock heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if content() == latest:  # otherwise the lock is another job's by now
            file.unlink(missing_ok=True)


def _ended(text: str) -> bool:
    """Whether the text of a lock names a process of this host that no longer runs."""
    try:
        holder = json.loads(text)
        if holder["host"] != socket.gethostname():
            return False
        os.kill(holder["pid"], 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, PermissionError):
        return False
    return False
