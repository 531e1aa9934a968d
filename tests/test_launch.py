"""The launch files: scripts pass shellcheck, manifests fit their schemas, and every command in them parses."""

import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys

import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import yaml
from conftest import ROOT, patience, run_job_command

from igpt_jax import __version__, command_line

JOBSET = json.loads((ROOT / "tests/data/jobset-v1alpha2.json").read_text())
COMMON = {"NAME": "igpt-l", "IMAGE": "registry.io/me/igpt:1", "WORKDIR": "gs://bucket/igpt_l"}
TRAINING = {**COMMON, "CONFIG": "configs/igpt_l.py", "STORE": "gs://bucket/imagenet32"}
SLICES = {**COMMON, "JOB": "prepare", "CONFIG": "configs/prepare.py:source=tar:gs://b/*.tar,image_size=32",
          "COUNT": "64", "CPUS": "8", "GPUS": "0"}
MANIFESTS = {
    "tpu": ("tpu.yaml", {**TRAINING, "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4", "SLICES": "1",
                         "HOSTS": "4", "DEVICES": "4"}),
    "tpu slices": ("tpu.yaml", {**TRAINING, "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "16x16", "SLICES": "2",
                                "HOSTS": "64", "DEVICES": "4"}),
    "gpu": ("gpu.yaml", {**TRAINING, "ACCELERATOR": "nvidia-h100-80gb", "HOSTS": "2", "DEVICES": "8"}),
    "slices": ("slices.yaml", SLICES),
    "merge": ("merge.yaml", SLICES),
}


def render(file, variables):
    return subprocess.run([ROOT / "launch/gke/render.sh", file], env={"PATH": os.environ["PATH"], **variables},
                          text=True, capture_output=True)


def rendered(file, variables):
    done = render(file, variables)
    assert done.returncode == 0, done.stderr
    manifest, = yaml.safe_load_all(done.stdout)
    return manifest, done.stderr


def job_of(manifest):
    """The Kubernetes Job in a manifest: a JobSet's one template, or the Job itself."""
    if manifest["kind"] == "Job":
        return manifest
    replicated, = manifest["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, **replicated["template"]}


def parses(arguments):
    """(config, workdir) that the command line parses from the arguments of `python -m igpt_jax`."""
    job, *rest = arguments
    return command_line._parse(job, rest)


def test_scripts_pass_shellcheck():
    """Seen to fail with an unquoted $count in local.sh."""
    files = [file for folder in ("launch", "tests", "benchmarks", ".ci") for file in (ROOT / folder).rglob("*")
             if file.is_file() and file.read_bytes()[:20].startswith(b"#!/usr/bin/env bash")]
    assert len(files) >= 10 and all(file.stat().st_mode & stat.S_IXUSR for file in files)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_their_schemas(name):
    """Kubernetes' own schema of a Job, strictly, and JobSet's.

    Seen to fail with `maxRestart` in place of maxRestarts, and with `parallelism: four`.
    """
    manifest, _ = rendered(*MANIFESTS[name])
    if manifest["kind"] == "JobSet":
        jsonschema.validate(manifest, JOBSET)
    kubernetes_validate.validate(job_of(manifest), kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_commands_of_manifests_parse(name, monkeypatch):
    """render.sh prints the containers' commands, and the command line accepts them; $(SLICE) stands for a number.

    Seen to fail with `--config.data.stores` in tpu.yaml.
    """
    monkeypatch.chdir(ROOT)
    manifest, shown = rendered(*MANIFESTS[name])
    container, = job_of(manifest)["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "igpt_jax"] and " ".join(container["command"]) in shown
    _, workdir = parses([word.replace("$(SLICE)", "3") for word in container["command"][3:]])
    assert workdir.startswith("gs://bucket/igpt_l")


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_exit_codes_decide_what_is_restarted(name):
    """A run that can resume is restarted without limit. A bug, bad input and divergence end the JobSet."""
    manifest, _ = rendered(*MANIFESTS[name])
    job, policy = job_of(manifest), manifest["spec"]["failurePolicy"]
    disrupted, ended = job["spec"]["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert ended["action"] == "FailJob" and ended["onExitCodes"]["values"] == [75, 76, 134, 137, 143]
    assert policy["rules"] == [{"name": "resumable", "action": "RestartJobSetAndIgnoreMaxRestarts",
                                "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert policy["maxRestarts"] == 0 and job["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize("name, value", [("NAME", "x; rm -rf"), ("NAME", ""), ("WORKDIR", "gs://a\n- b"),
                                         ("HOSTS", "four"), ("CONFIG", "$(rm)'")])
def test_variables_that_would_change_a_manifest_are_refused(name, value):
    file, variables = MANIFESTS["tpu"]
    done = render(file, {**variables, name: value})
    assert done.returncode == 2 and f"tpu.yaml: {name}=" in done.stderr and not done.stdout


@pytest.fixture
def submitted(tmp_path):
    """Runs a script of launch/slurm and returns the words of each sbatch command that it submits."""
    stub, log = tmp_path / "sbatch", tmp_path / "log"
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> {log}\nprintf '\\n' >> {log}\necho 17\n")
    stub.chmod(0o755)

    def run(script, *arguments, **environment):
        log.unlink(missing_ok=True)
        environment = {**os.environ, "SBATCH": str(stub), "PYTHON": sys.executable, **environment}
        subprocess.run([ROOT / "launch/slurm" / script, *arguments], cwd=ROOT, env=environment, check=True,
                       capture_output=True)
        return [line.split("\0")[:-1] for line in log.read_text().splitlines()]
    return run


def jobs_in(commands):
    """The arguments after job.sbatch in each command."""
    for words in commands:
        index = next((index for index, word in enumerate(words) if word.endswith("job.sbatch")), None)
        if index:
            yield [word.replace("{i}", "1").replace("{value}", "0.001") for word in words[index + 1:]]


def test_commands_of_slurm_scripts_parse(submitted, monkeypatch):
    """The command line accepts what chain, slices and sweep submit.

    Seen to fail with `--config.checkpoints` for probe in chain.sh.
    """
    monkeypatch.chdir(ROOT)
    chain = submitted("chain.sh", "runs/x", "--config=configs/igpt_s.py", "--config.data.store=runs/store",
                      PROBE="--config.batch_size=256")
    slices = submitted("slices.sh", "8", "prepare", "--workdir=runs/web", "--config.source=folder:pictures")
    sweep = submitted("sweep.sh", "runs/sweep", "--config=configs/igpt_s.py")
    parsed = [parses(arguments) for arguments in jobs_in(chain + slices + sweep)]
    assert [config.job for config, _ in parsed][0] == "pretrain" and len(parsed) == len(chain) + 3
    assert {config.batch_size for config, _ in parsed if config.job == "probe"} == {256}
    assert [config.shard for config, _ in parsed if config.job == "prepare"] == ["1/8", "merge"]
    assert parsed[-1][0].optimizer.learning_rate == 0.001 and parsed[-1][1] == "runs/sweep/lr-0.001"


def test_tpu_vm_dry_run_shows_its_commands(monkeypatch):
    """They address all workers of all slices, and the command line accepts the job's command."""
    monkeypatch.chdir(ROOT)
    environment = {**os.environ, "NAME": "igpt-l", "ZONE": "us-west4-a", "TYPE": "v5litepod-16", "SLICES": "2",
                   "DRY_RUN": "1"}
    job = ["pretrain", "--config=configs/igpt_l.py", "--workdir=gs://bucket/igpt_l"]
    shown = {verb: subprocess.run([ROOT / "launch/tpu_vm.sh", *verb.split(), *more], env=environment, text=True,
                                  capture_output=True, check=True).stderr
             for verb, more in (("create", []), ("run", job), ("stop", []), ("delete", []))}
    assert "--node-count=2 --node-prefix=igpt-l" in shown["create"]
    assert "--worker=all --node=all" in shown["run"]
    run, = re.findall(r"python -m igpt_jax (.*)", shown["run"].splitlines()[0])
    assert parses(shlex.split(run))[1] == "gs://bucket/igpt_l"


@pytest.mark.parametrize("ended, code, restarts", [
    ("134 0", 0, 1),  # a peer died: it resumes
    ("134/2", 134, 0),  # another worker refused its input: it would again
    ("134 134 134", 134, 2),  # MAX_RESTARTS
    ("75", 75, 0),
])
def test_tpu_vm_resumes_only_what_can_go_on(tmp_path, ended, code, restarts):
    """A stand-in for gcloud ends with each code in turn, and names another worker's after the slash.

    Seen to fail without the search in gcloud's messages, and without the limit.
    """
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"""#!/bin/bash
codes=({ended}); next=$(cat {tmp_path}/next 2>/dev/null || echo 0); echo $((next + 1)) > {tmp_path}/next
[[ ${{codes[next]}} == */* ]] && echo "##### Command on worker 1 failed with exit status ${{codes[next]#*/}}" >&2
exit "${{codes[next]%/*}}"
""")
    gcloud.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "a", "ZONE": "b", "TYPE": "c",
                   "MAX_RESTARTS": "2", "PAUSE": "0"}
    done = subprocess.run([ROOT / "launch/tpu_vm.sh", "run", "pretrain"], env=environment, capture_output=True,
                          text=True)
    assert (done.returncode, int((tmp_path / "next").read_text())) == (code, restarts + 1), done.stderr


@pytest.mark.parametrize("script", sorted(file.name for file in (ROOT / "launch").glob("*.sh")))
def test_scripts_show_their_usage(script):
    """Bad input ends with 2, before anything runs. Seen to fail where `--help` was taken for a Python."""
    done = subprocess.run([ROOT / "launch" / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and (script in done.stderr), done


def test_the_best_rate_of_a_sweep(tmp_path):
    """The table lists all rates, the highest first. A diverged or unfinished run is never the best.

    Seen to fail with `max` in place of `min`.
    """
    rates = {0.01: ("diverged", None), 0.003: ("done", 2.1), 0.001: ("done", 2.3), 0.0003: (None, None)}
    for rate, (status, nats) in rates.items():
        folder = tmp_path / f"lr-{rate}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"optimizer": {"learning_rate": rate}}))
        if status:
            metrics = {"eval/nats_per_pixel": nats, "steps": 100}
            (folder / "result.json").write_text(json.dumps({"status": status, "metrics": metrics}))
    command = [sys.executable, ROOT / "launch/sweep.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "sweep.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:6]] == ["0.01", "0.003", "0.001", "0.0003"]
    assert "Best: learning rate 0.003, 2.1000 nats per pixel held out. 2 of 4 did not finish." in table
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"][0]["eval/nats_per_pixel"] is None


def test_a_sweep_on_this_machine(tmp_path):
    """One training per rate; one that diverges does not end it, a refused one does."""
    stand_in = tmp_path / "python"  # as pretrain: fails at 0.1 with the code in $CODE
    stand_in.write_text(f"""#!/bin/sh
[ "$1" = -m ] || exec {sys.executable} "$@"
echo "$4 $5 $6" >> {tmp_path / "log"}
[ "$6" = --config.optimizer.learning_rate=0.1 ] && exit $CODE
mkdir -p {tmp_path}/run/lr-0.01 && cd {tmp_path}/run/lr-0.01
echo '{{"optimizer": {{"learning_rate": 0.01}}}}' > config.json
echo '{{"status": "done", "metrics": {{"eval/nats_per_pixel": 2.5, "steps": 1}}}}' > result.json
""")
    stand_in.chmod(0o755)
    command = [ROOT / "launch/sweep.sh", tmp_path / "run", "--config.steps=1"]
    environment = {**os.environ, "PYTHON": str(stand_in), "RATES": "0.1 0.01", "PYTHONPATH": str(ROOT)}
    refused = subprocess.run(command, env={**environment, "CODE": "2"}, capture_output=True, text=True)
    assert refused.returncode == 2 and len((tmp_path / "log").read_text().splitlines()) == 1
    done = subprocess.run(command, env={**environment, "CODE": "77"}, capture_output=True, text=True)
    assert done.returncode == 0 and "Best: learning rate 0.01" in done.stdout, done
    assert (tmp_path / "log").read_text().splitlines()[1:] == [
        f"--workdir={tmp_path}/run/lr-{rate} --config.steps=1 --config.optimizer.learning_rate={rate}"
        for rate in ("0.1", "0.01")]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["reproduce", "reproduce_10m", "transfer"])
def test_reproductions(tmp_path, script):
    """With few steps on synthetic pictures: all stages finish, twice, and the second time finished stages stay."""
    random = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 40)):
        np.savez(tmp_path / f"{split}.npz", images=random.integers(0, 256, (count, 32, 32, 3), np.uint8),
                 labels=np.arange(count) % 4)
    train, test = (f"npz:{tmp_path}/{split}.npz" for split in ("train", "test"))
    sources = {"reproduce": {"SOURCE": train, "TEST_SOURCE": test, "STEPS": "1,2,3"},
               "reproduce_10m": {"SOURCE": train, "TEST_SOURCE": test, "STEPS": "3", "MODEL": "igpt_tiny",
                                 "BATCH": "8", "SLICE_SECONDS": str(patience(600))},
               "transfer": {"SOURCE": train, "PROBED": train, "PROBED_TEST": test, "STEPS": "3", "LABELS": "(2,)"}}
    checkpoints = None
    if script == "reproduce_10m":
        done = subprocess.run([ROOT / f"launch/{script}.sh", sys.executable, tmp_path / "runs"], cwd=ROOT,
                              env={**os.environ, **sources[script], "SLICE_SECONDS": "6"}, capture_output=True)
        assert done.returncode == 75 and not (tmp_path / "runs/report").exists()
    for _ in range(2):
        done = subprocess.run([ROOT / f"launch/{script}.sh", sys.executable, tmp_path / "runs"], cwd=ROOT, text=True,
                              env={**os.environ, "WARMUP": "1", **sources[script]}, capture_output=True)
        assert done.returncode == 0, done.stderr
        ends = [json.loads(file.read_text())["status"] for file in tmp_path.glob("runs/*/result.json")]
        assert ends == ["done"] * {"reproduce": 7, "reproduce_10m": 6, "transfer": 6}[script]
        assert (tmp_path / "runs/report/report.html").exists()
        found = sorted(tmp_path.glob("runs/*/checkpoints/*"))
        assert found and checkpoints in (None, found)
        checkpoints = found


@pytest.mark.slow
def test_the_quickstart(tmp_path):
    """On the real digits: the fine-tuned model is above the raw pixels, as its closing lines say, and the features are
    above an untrained model's. Unshifted, with 500 steps of 64, fine-tuning reached 85.8 %."""
    done = subprocess.run([ROOT / "launch/quickstart.sh", sys.executable, tmp_path], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    tuned, features, pixels, untrained = map(float, re.findall(r"^ *([\d.]+)%  ", done.stdout, re.MULTILINE))
    assert tuned > pixels + 2 and features > untrained + 10, done.stdout
    assert pathlib.Path(re.search(r"Report +(\S+)", done.stdout)[1]).exists()


def test_the_container_installs_by_the_constraints():
    """The image copies every file that its installation reads."""
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE)).split()
    needed = {"constraints.txt", "constraints-buckets.txt", "setup.py", "setup.cfg", "pyproject.toml", "igpt_jax",
              "launch"}
    assert needed <= set(copied) and all((ROOT / name).exists() for name in copied)
    assert "RUN launch/install.sh" in dockerfile


def test_an_editable_install_is_found_above_its_clone(tmp_path):
    """The package is found from the folder above a clone named igpt_jax, which Python takes for a namespace package.

    Seen to fail without `package_dir` in setup.cfg.
    """
    clone, site = tmp_path / "igpt_jax", tmp_path / "site"
    (clone / "igpt_jax").mkdir(parents=True)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("__init__.py", "process.py"):
        shutil.copy(ROOT / "igpt_jax" / name, clone / "igpt_jax")
    (clone / "igpt_jax" / "__main__.py").write_text("from igpt_jax import __version__; print(__version__)")
    build = f"import setuptools.build_meta as build; build.build_editable({str(site)!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = site.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    found = f"import runpy, site; site.addsitedir({str(site)!r}); runpy.run_module('igpt_jax', run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "-c", found], cwd=tmp_path, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0 and done.stdout.strip() == __version__, done.stderr


def test_the_help_of_a_job_lists_the_flags_of_processes():
    done = run_job_command("verify", "--help")
    assert "--coordinator" in done.stdout and "--process_id" in done.stdout
