"""Tests fresh environments: installs, runs the quickstart and tests, and writes docs/environments.md.

    python benchmarks/environments.py [NAME ...] [--all] [--folder FOLDER]

Each environment works on a copy of the commit at HEAD. Rows of other environments stay as they are.
"""

import argparse
import configparser
import dataclasses
import datetime
import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "environments.md"
SHOWN = ("jax", "numpy", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "torch", "transformers")
MARKS = "not slow and not buckets and not slurm and not browser and not fault"
# Beginnings of the names of files whose tests call most of what these packages offer, in a few minutes.
FILES = ("attention", "model", "steps", "checkpoint", "decode", "plan", "store", "records", "figures", "compiled",
         "pipeline", "weights")
GPU_IMAGE = ("jax==0.11.2", "numpy==2.5.*", "flax==0.12.12", "orbax-checkpoint==0.12.8")
NOT_IN_GPU_IMAGE = ("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "tensorboardX")

VERSIONS = """import importlib.metadata as m, json, platform
print(json.dumps({d.name.lower().replace("_", "-"): d.version for d in m.distributions()}
                 | {"python": platform.python_version()}))"""
ABOUT = """# Environments

    make environments

This creates fresh environments, runs the quickstart and part of the tests in each, and writes the results to this page.
All times are from two CPU cores. Packages are installed without pip's cache. An environment that has not been run has
no row. "GPU image" has JAX, Flax and Orbax, but no TensorFlow, TFDS or tensorboardX. Rows without torch skip the tests
that need it; `make test` installs it.
"""


@dataclasses.dataclass(frozen=True)
class Environment:
    """An environment: packages at the constraints, the newest ones, or those of a GPU image."""
    python: str
    constrained: bool = False
    gpu_image: bool = False

    def installs(self) -> tuple[list[str], list[str]]:
        """pip's arguments for the quickstart, and for the tests."""
        limits = [f"--constraint={name}" for name in ("constraints.txt", "constraints-torch.txt")]
        if self.constrained:
            return ([*limits, "--editable", "."], [*limits, "--editable", ".[test,huggingface]"])
        if not self.gpu_image:
            return ["--editable", "."], ["--editable", ".[test]"]
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        ours, test = (value.split("\n")[1:] for value in (setup["options"]["install_requires"],
                                                          setup["options.extras_require"]["test"]))
        pinned = {re.split("[=<>]", each)[0] for each in GPU_IMAGE} | set(NOT_IN_GPU_IMAGE)
        return [*GPU_IMAGE, *(each for each in ours if re.split(r"[=<>]", each)[0] not in pinned)], test

    def tests(self, tree: pathlib.Path) -> list[str]:
        """The test files that run in it."""
        groups = [name for name in FILES if not (self.gpu_image and name in ("pipeline", "records"))]  # TensorFlow's
        return sorted({str(file.relative_to(tree)) for name in groups for file in tree.glob(f"tests/test_{name}*.py")})


ENVIRONMENTS = {"3.11, constraints.txt": Environment("3.11", constrained=True), "3.12, newest": Environment("3.12"),
                "3.13, newest": Environment("3.13"), "3.12, GPU image": Environment("3.12", gpu_image=True)}


def interpreter(version: str) -> str:
    """A working Python of this version, from PATH or pyenv."""
    pyenv = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    for python in filter(None, [shutil.which(f"python{version}"), *pyenv]):
        if subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0:
            return python
    print(f"environments.py: Python {version} was not found. Install it, or name other environments.", file=sys.stderr)
    sys.exit(2)


def megabytes(folder: pathlib.Path) -> float:
    """The size of all files in a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_symlink()) / 1e6


def measure(environment: Environment, folder: pathlib.Path, every_test: bool) -> dict:
    """Measures one environment; returns its row of the table."""
    tree, venv = folder / "tree", folder / "venv"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    subprocess.run([interpreter(environment.python), "-m", "venv", venv], check=True)
    python = str(venv / "bin" / "python")
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "EPATH_USE_TF": "0", "TF_CPP_MIN_LOG_LEVEL": "3",
                 "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "IGPT_CACHE": str(folder / "cache")}
    row = {"date": datetime.date.today().isoformat()}

    def run(name: str, *command: str) -> str:
        print(f"  {name}", flush=True)
        start = time.time()
        done = subprocess.run(command, cwd=tree, env=variables, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        row[f"{name}_seconds"], row[f"{name}_code"] = round(time.time() - start), done.returncode
        if done.returncode:
            print("    " + "\n    ".join(done.stdout.splitlines()[-40:]), flush=True)
        return done.stdout

    for name, packages in zip(("install", "install_tests"), environment.installs(), strict=True):
        run(name, python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages)
        row[f"{name}_megabytes"] = round(megabytes(venv))
        if name == "install":
            run("quickstart", "launch/quickstart.sh", python, "runs/quickstart")
    versions = json.loads(run("versions", python, "-c", VERSIONS))
    row["versions"] = {name: versions[name] for name in ("python", *SHOWN) if name in versions}
    output = run("tests", python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", MARKS,
               *([] if every_test else environment.tests(tree)))
    row["tests"] = output.strip().splitlines()[-1].strip("= ")
    row["files"] = "all" if every_test else len(environment.tests(tree))
    return row


def page(rows: dict[str, dict]) -> str:
    """The text of docs/environments.md."""
    lines = [ABOUT, "| environment | date | install | with the test extra | quickstart | tests |",
             "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        quickstart = f"{row['quickstart_seconds']} s" if not row["quickstart_code"] else "failed"
        install, test = (f"{row[f'{step}_seconds']} s, {row[f'{step}_megabytes'] / 1000:.1f} GB"
                         for step in ("install", "install_tests"))
        tests = f"{re.sub(r' in [0-9.]+s.*', '', row['tests'])} ({row['files']} files, {row['tests_seconds']} s)"
        lines.append(f"| {name} | {row['date']} | {install} | {test} | {quickstart} | {tests} |")
    lines += ["", "The tests are the fast ones of the files whose names begin with: "
              + ", ".join(FILES) + "; without TensorFlow not pipeline and records.", "",
              "| environment | " + " | ".join(("Python", *SHOWN)) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    lines += [f"| {name} | " + " | ".join(row["versions"].get(each, "-") for each in ("python", *SHOWN)) + " |"
              for name, row in rows.items()]
    return "\n".join(lines) + f"\n\n<!-- {json.dumps(rows)} -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(ENVIRONMENTS)}; none: all")
    parser.add_argument("--all", action="store_true", help="all fast tests, an hour each")
    parser.add_argument("--folder", help="for the temporary environments; default: the system's")
    arguments = parser.parse_args()
    if wrong := set(arguments.names) - set(ENVIRONMENTS):
        parser.error(f"{', '.join(sorted(wrong))} is not one of: {'; '.join(ENVIRONMENTS)}")
    found = re.search(r"<!-- (\{.*\}) -->", PAGE.read_text()) if PAGE.exists() else None
    rows = json.loads(found[1]) if found else {}
    for name in arguments.names or ENVIRONMENTS:
        print(name, flush=True)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows[name] = measure(ENVIRONMENTS[name], pathlib.Path(folder), arguments.all)
        rows = {each: rows[each] for each in ENVIRONMENTS if each in rows}
        PAGE.write_text(page(rows))
        print(f"  {rows[name]['tests']}", flush=True)
    return int(any(row["tests_code"] or row["quickstart_code"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
