"""Reads the environment variables of launchers: how many processes a job has, and which one this is.

The same command then runs on a laptop, under srun, in a JobSet, and on TPU VMs.
"""

import dataclasses
import re
import urllib.request
from collections.abc import Mapping

from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

from igpt_jax.config import UserError

PORT = "8476"  # of the coordinator, if the launcher sets none; JAX_COORDINATOR_PORT overrides it, as in JAX
METADATA = "metadata.google.internal"  # Google Cloud's metadata server; TPU VMs find each other through it


@dataclasses.dataclass(frozen=True)
class Launch:
    """The processes of a job, and which one this is."""
    by: str  # the launcher
    coordinator: str | None = None  # host:port of process 0; None: detected by JAX
    processes: int | None = None
    process_id: int | None = None
    hosts: tuple[str, ...] = ()  # the host of each process; empty if the launcher does not say
    devices: tuple[int, ...] | None = None  # indices of this host's devices that the process uses; None: all


def recognize(env: Mapping[str, str]) -> Launch | None:
    """The launch that the environment describes; None if this is the only process.

    Launchers are tried in this order:

    1. IGPT_COORDINATOR (host[:port]), IGPT_PROCESSES and IGPT_PROCESS_ID, which --coordinator, --processes and
       --process_id set. IGPT_COORDINATOR=auto leaves detection to JAX (Open MPI).
    2. srun.
    3. TPU slices on GKE, and TPU VMs.
    4. torchrun, and other launchers that set its variables.

    Raises:
      UserError: a launcher's variables are incomplete or not numbers.
    """
    for known in (_explicit, _slurm, _tpu, _torchrun):
        try:
            launch = known(env)
        except (KeyError, ValueError, IndexError) as error:
            launcher = known.__doc__.split(".")[0]
            raise UserError(f"the variables of {launcher} are incomplete or not numbers: {error!r}. Give "
                            "--coordinator=HOST:PORT --processes=N --process_id=I instead.") from None
        if launch and launch.by == "auto":
            return launch
        if launch and launch.processes > 1:
            if not 0 <= launch.process_id < launch.processes:
                raise UserError(f"process {launch.process_id} of {launch.processes} ({launch.by}): processes are "
                                f"numbered from 0 to {launch.processes - 1}.")
            return launch
    return None


def _explicit(env: Mapping[str, str]) -> Launch | None:
    """IGPT_COORDINATOR, IGPT_PROCESSES and IGPT_PROCESS_ID."""
    names = ("IGPT_COORDINATOR", "IGPT_PROCESSES", "IGPT_PROCESS_ID")
    if not any(name in env for name in names):
        return None
    if env.get("IGPT_COORDINATOR") == "auto":
        return Launch("auto")
    host, processes, process_id = (env[name] for name in names)
    return Launch("flags", host if ":" in host else f"{host}:{_port(env)}", int(processes), int(process_id))


def _slurm(env: Mapping[str, str]) -> Launch | None:
    """srun."""
    # A step of one task is a single process. sbatch alone, without srun, sets no SLURM_STEP_ variables.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    nodes = _expand(env["SLURM_STEP_NODELIST"])
    counts = [int(count) for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])
              for _ in range(int(repeated or 1))]
    hosts = tuple(node for node, count in zip(nodes, counts, strict=True) for _ in range(count))
    port = str(61440 + int(env["SLURM_JOB_ID"]) % 4096)  # as JAX chooses it: two jobs may share a node
    process_id = int(env["SLURM_PROCID"])
    return Launch("SLURM", f"{nodes[0]}:{_port(env, port)}", int(env["SLURM_STEP_NUM_TASKS"]), process_id, hosts,
                  _devices(env, int(env["SLURM_LOCALID"]), hosts.count(hosts[process_id])))


def _expand(nodes: str) -> list[str]:
    """Expands SLURM's short form of node names: gpu[01-03,7],login -> gpu01 gpu02 gpu03 gpu7 login."""
    found = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodes):
        for item in ranges.split(",") if ranges else [""]:
            first, dash, last = item.partition("-")
            numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)] if dash else [item]
            found += [f"{prefix}{number}{suffix}" for number in numbers]
    return found


def _tpu(env: Mapping[str, str]) -> Launch | None:
    """the TPU slice. GKE names its hosts in variables; TPU VMs ask the metadata server."""
    if addresses := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):
        hosts = [address.split(":")[0] for address in addresses.split(",")]
        worker, known = int(env["TPU_WORKER_ID"]), env
    elif running_in_cloud_tpu_vm or "GCE_METADATA_IP" in env:
        endpoints = _metadata(env, "worker-network-endpoints")
        if not endpoints:
            return None
        hosts = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]  # a host, or name:number:address
        worker = int(_metadata(env, "agent-worker-number"))
        lines = [line.partition(":") for line in _metadata(env, "tpu-env").splitlines()]
        known = {name.strip(): value.strip().strip("'") for name, _, value in lines} | dict(env)
    else:
        return None
    slices, number = int(known.get("MEGASCALE_NUM_SLICES") or 1), int(known.get("MEGASCALE_SLICE_ID") or 0)
    first = known["MEGASCALE_COORDINATOR_ADDRESS"].split(":")[0] if slices > 1 else hosts[0]
    # Only this slice's hosts are known by name; those of other slices are numbered.
    names = [f"slice {of}" + (f", {host}" if of == number else f", host {at}")
             for of in range(slices) for at, host in enumerate(hosts)] if slices > 1 else hosts
    return Launch("TPU", f"{first}:{_port(env)}", len(hosts) * slices, worker + number * len(hosts), tuple(names))


def _metadata(env: Mapping[str, str], name: str) -> str:
    """An attribute of this machine from Google Cloud's metadata server; empty if it has none."""
    address = f"http://{env.get('GCE_METADATA_IP', METADATA)}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except OSError:  # includes HTTPError; this is not a TPU VM
        return ""


def _torchrun(env: Mapping[str, str]) -> Launch | None:
    """torchrun. Its own store already listens on MASTER_PORT, so the coordinator takes the next port."""
    if not {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= env.keys():
        return None
    port = int(env.get("MASTER_PORT", _port(env))) + ("TORCHELASTIC_RUN_ID" in env)
    return Launch("torchrun", f"{env['MASTER_ADDR']}:{port}", int(env["WORLD_SIZE"]), int(env["RANK"]), (),
                  _devices(env, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))))


def _devices(env: Mapping[str, str], number: int, processes: int) -> tuple[int, ...] | None:
    """The device of local process `number`, one each; None (all) if it is alone on its host or sees one device only."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    return None if processes == 1 or visible and "," not in visible else (number,)


def _port(env: Mapping[str, str], default: str = PORT) -> str:
    """The coordinator's port."""
    return env.get("JAX_COORDINATOR_PORT", default)
