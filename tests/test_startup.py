"""Processes connect by the variables of each launcher, name missing ones, and refuse to start if they differ."""

import contextlib
import fnmatch
import http.server
import os
import socket
import subprocess
import sys
import threading

import jax
import pytest
from conftest import ROOT, SCRIPTS, patience, run_job_command

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.runtime import launchers, missing_peers, startup

# Exactly the variables that each launcher sets for two processes on this machine; {i}: 0 or 1, {port}: a free port.
SLURM = {"SLURM_JOB_ID": "{slurm}", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2",
         "SLURM_NPROCS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
         "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2",
         "SLURM_PROCID": "{i}", "SLURM_LOCALID": "{i}", "SLURM_NODEID": "0", "SLURMD_NODENAME": "localhost"}
GKE = {"TPU_WORKER_ID": "{i}", "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
       "TPU_TOPOLOGY": "2x4", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1", "TPU_HOST_BOUNDS": "1,2,1",
       "TPU_SKIP_MDS_QUERY": "true", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "{i}"}
GKE_SLICES = {**GKE, "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2",
              "MEGASCALE_SLICE_ID": "{i}", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
GPU_NODES = {"IGPT_COORDINATOR": "localhost:{port}", "IGPT_PROCESSES": "2", "IGPT_PROCESS_ID": "{i}",
             "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "{i}"}  # as launch/gke/gpu.yaml sets them
TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "{port}", "WORLD_SIZE": "2", "RANK": "{i}", "LOCAL_RANK": "{i}",
            "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
TPU_VM = {"GCE_METADATA_IP": "{metadata}"}  # all else comes from the metadata server


def free_port():
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def metadata_server(process):
    """Google's metadata server, as TPU VM `process` of two sees it."""
    attributes = {"agent-worker-number": str(process), "worker-network-endpoints": "a:0:localhost,b:1:localhost",
                  "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nWORKER_ID: '0'"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = attributes.get(self.path.rpartition("/")[2])
            self.send_response(200 if text and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def start(command, variables, cwd=ROOT, **values):
    """Starts a process with the variables of one launcher."""
    given = {name: text.format(**values) for name, text in variables.items()}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True, stderr=subprocess.PIPE,
                            env={**os.environ, "XLA_FLAGS": "", "IGPT_START_SECONDS": "60", **given})


@pytest.mark.parametrize("by, variables", [("SLURM", SLURM), ("TPU", GKE), ("TPU", GKE_SLICES), ("TPU", TPU_VM),
                                           ("flags", GPU_NODES), ("torchrun", TORCHRUN)],
                         ids=["slurm", "gke", "gke-slices", "tpu-vm", "gke-gpu", "torchrun"])
def test_two_processes_meet(by, variables):
    """With exactly the variables that the launcher sets, both processes connect, and one line names both.

    Seen to fail, for each of them, with a `recognize` that knows no launcher.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = []
        for i in range(2):
            metadata = stack.enter_context(metadata_server(i))
            more = {} if by in ("flags", "torchrun", "SLURM") else {"JAX_COORDINATOR_PORT": str(port)}
            processes.append(start([SCRIPTS / "meet.py"], {**variables, **more}, i=i, port=port, metadata=metadata,
                                   slurm=os.getpid()))
        logs = [process.communicate(timeout=patience())[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    assert f"2 processes on {'localhost' if by == 'SLURM' else socket.gethostname()} " in logs[0]
    assert f"(started by {by}): 2 x cpu" in logs[0] and "started by" not in logs[1]


@pytest.mark.parametrize("variables, expected", [
    ({}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # sbatch without srun
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, None),
    ({"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "gpu[08-09,11],big", "SLURM_STEP_NUM_TASKS": "7",
      "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
     launchers.Launch("SLURM", "gpu08:62344", 7, 3,
                     ("gpu08", "gpu08", "gpu09", "gpu09", "gpu11", "gpu11", "big"), (1,))),
    ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_NUM_TASKS": "2",  # a task for all GPUs of a node
      "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0,1"},
     launchers.Launch("SLURM", "a:61441", 2, 1, ("a", "b"), None)),
    ({"MASTER_ADDR": "a", "MASTER_PORT": "5", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
      "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, launchers.Launch("torchrun", "a:6", 4, 3, (), (1,))),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2",
      "MEGASCALE_COORDINATOR_ADDRESS": "j-slice-0-0.j:8080"},
     launchers.Launch("TPU", "j-slice-0-0.j:8476", 6, 5, ("slice 0, host 0", "slice 0, host 1", "slice 1, host 0",
                                                         "slice 1, host 1", "slice 2, a", "slice 2, b"))),
])
def test_launchers_are_recognized(variables, expected):
    """Node lists, several slices, and single processes with some variables of a launcher."""
    assert launchers.recognize(variables) == expected


@pytest.mark.parametrize("variables", [
    {"IGPT_COORDINATOR": "a:1", "IGPT_PROCESSES": "2"}, {"IGPT_PROCESS_ID": "0"},
    {"IGPT_COORDINATOR": "a:1", "IGPT_PROCESSES": "2", "IGPT_PROCESS_ID": "2"},
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, {"TPU_WORKER_HOSTNAMES": "a,b"},
    {"MASTER_ADDR": "a", "WORLD_SIZE": "two", "RANK": "0"},
])
def test_incomplete_variables_are_refused(variables):
    with pytest.raises(UserError, match="--coordinator|numbered from 0"):
        launchers.recognize(variables)


def jobs(workdir, numbers, of, *more_of_last, seconds=""):
    """Runs a command as the processes `numbers` of `of`. Returns their exit codes and logs."""
    port = free_port()
    running = []
    for number in numbers:
        more = more_of_last if number == numbers[-1] else ()
        command = ["-m", "igpt_jax", "evaluate", f"--workdir={workdir}", "--config.checkpoints=/nowhere",
                   f"--coordinator=localhost:{port}", f"--processes={of}", f"--process_id={number}", *more]
        running.append(start(command, {"IGPT_START_SECONDS": seconds or str(patience())}))
    logs = [process.communicate(timeout=patience())[1] for process in running]
    return [process.returncode for process in running], logs


def test_missing_processes_are_named(tmp_path):
    """Two of four processes start: both end at the deadline with exit code 134, and name the other two in one line.

    Seen to fail with JAX's own deadline for the service, an hour.
    """
    codes, logs = jobs(tmp_path, [0, 2], of=4, seconds="20")
    assert codes == [-6, -6], logs  # a shell shows it as 134
    for lines in logs:
        assert "2 of 4 processes connected within 20 s; missing: process 1, process 3." in lines.splitlines()[-1], lines
        assert "stack trace" not in lines


def test_a_missing_coordinator_is_named(tmp_path):
    codes, (lines,) = jobs(tmp_path, [1], of=2, seconds="1")
    assert codes == [-6] and "process 0, at localhost:" in lines and "did not connect all processes within 1 s" in lines


@pytest.mark.parametrize("error, says", [
    (AssertionError(), "JAX cannot use this machine's devices: no such platform. Unset JAX_PLATFORMS, which is 'cpu'"),
    (RuntimeError("Unable to initialize backend 'tpu': ABORTED: no\nlibtpu.so (set JAX_PLATFORMS='' to choose)"),
     "devices: Unable to initialize backend 'tpu': ABORTED: no libtpu.so. Unset JAX_PLATFORMS, which is 'cpu'"),
])
def test_an_unavailable_platform_is_reported_with_its_fix(monkeypatch, error, says):
    """JAX raises AssertionError for JAX_PLATFORMS=cuda without its plugin. Seen to fail without it caught."""
    def devices():
        raise error

    monkeypatch.setattr(startup.jax, "devices", devices)
    with pytest.raises(UserError) as raised:
        startup.find_devices()
    assert says in str(raised.value) and "pip install -e '.[cuda]'" in str(raised.value)
    assert not storage.unreachable(raised.value)  # which would restart the job


@pytest.mark.parametrize("files, says", [
    (["/dev/vfio/vfio", "/dev/accel"], ""), (["/dev/vfio/vfio", "/dev/vfio/0"], "'.[tpu]'"), (["/dev/accel3"], "a TPU"),
    (["/dev/nvidia0"], "'.[cuda12]'"),
])
def test_an_accelerator_that_jax_does_not_use_is_named(monkeypatch, files, says):
    """Machines without a TPU have /dev/vfio/vfio or the folder /dev/accel too."""
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    monkeypatch.setattr(startup.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    assert startup.unused_accelerator() == ""  # JAX_PLATFORMS=cpu is set in tests
    platforms = jax.config.jax_platforms
    jax.devices()  # chosen before the setting is taken back
    jax.config.update("jax_platforms", None)
    try:
        assert says in startup.unused_accelerator() and bool(says) == bool(startup.unused_accelerator())
    finally:
        jax.config.update("jax_platforms", platforms)


def test_hosts_of_missing_processes_are_named():
    words = "# of tasks that reached the barrier: 1/3.\nSome timed out task names:\n2\n1\n\nRPC: RegisterTask"
    line = missing_peers.missing_line(words, 300, "n1:1", ["n1", "n2", "n3"])
    assert "1 of 3 processes connected within 300 s; missing: process 1 (n2), process 2 (n3)." in line
    assert missing_peers.missing_line("F1121 out of memory\n", 300, "n1:1", []) == "F1121 out of memory\n"


def test_a_process_that_differs_is_refused(tmp_path):
    """One config key differs: both processes end with exit code 2 before they compute or write anything.

    Process 0 names the process, the key and both values.

    Seen to fail with the differences left empty.
    """
    codes, logs = jobs(tmp_path / "made", [0, 1], 2, "--config.batch_size=64")
    assert codes == [2, 2], logs
    assert f"process 1 on {socket.gethostname()} has batch_size=64 (process 0: 128)" in logs[0]
    assert "batch_size" not in logs[1] and not (tmp_path / "made").exists()


def test_other_data_on_one_host_is_refused(tmp_path):
    """The same command, but the same path holds another store: refused before anything is computed.

    Seen to fail without `agree` in loop.py.
    """
    port, running = free_port(), []
    for i, seed in enumerate((0, 1)):
        done = run_job_command("prepare", f"--workdir={tmp_path / str(i) / 'store'}", f"--config.seed={seed}")
        assert done.returncode == 0, done.stderr
    for i in range(2):
        command = ["-m", "igpt_jax", "pretrain", f"--workdir={tmp_path / 'run'}", "--config.data.store=store",
                   "--config.model.name=igpt_tiny", "--config.model.layers=1", "--config.steps=1",
                   "--config.batch_size=8", f"--coordinator=localhost:{port}", "--processes=2",
                   f"--process_id={i}"]
        running.append(start(command, {}, cwd=tmp_path / str(i)))
    logs = [process.communicate(timeout=patience())[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], logs
    assert f"process 1 on {socket.gethostname()} has data='" in logs[0] and not (tmp_path / "run/checkpoints").exists()
