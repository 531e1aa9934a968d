"""Runs launch/reproduce_10m.sh on packed images within a budget, and collects its results.

    DATA=CIFAR10.xz SECONDS_LEFT=300 python benchmarks/reproduction.py [--folder runs/gpu_10m] [--json FILE]

Jobs that did not start are missing. Pretraining that was stopped counts with the steps that it did. With --json the
samples are copied to that file's folder.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import exits
import gpu
import pack

from igpt_jax import storage

ROOT = pathlib.Path(__file__).parent.parent
JOBS = ("store", "pretrain", "evaluate", "probe", "sample")
MARGIN = 5  # seconds to collect the results


def results(folder: pathlib.Path) -> dict[str, Any]:
    """Test loss and steps of the newest checkpoint, and the result.json of each job."""
    files = {job: folder / job / "result.json" for job in JOBS}
    jobs = {job: exits.read_json(file) for job, file in files.items() if file.exists()}
    table = folder / "evaluate/evaluation.json"
    newest = max(exits.read_json(table), key=lambda row: row["steps"]) if table.exists() else {}
    return {"nats_per_pixel": newest.get("nats_per_pixel"), "steps": newest.get("steps"), "jobs": {
        job: {name: result[name] for name in ("status", "wall_seconds", "metrics", "device") if name in result}
        for job, result in jobs.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs/gpu_10m")
    parser.add_argument("--model", default="igpt_10m")
    parser.add_argument("--steps", type=exits.count, default=5625, help="16 epochs of 45,000 images")
    parser.add_argument("--batch", type=exits.count, default=128)
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    options = parser.parse_args()
    if "DATA" not in os.environ or not os.environ.get("SECONDS_LEFT", "").isdecimal():
        parser.error("set DATA to a file that pack.py wrote, and SECONDS_LEFT to the budget in seconds")
    start, data = time.monotonic(), pathlib.Path(os.environ["DATA"])
    # Only the same run on the same images by the same code resumes.
    asked = repr((gpu.code(), options.model, options.steps, options.batch)).encode()
    folder = options.folder / hashlib.sha256(asked + data.read_bytes()).hexdigest()[:8]
    images = folder / "images"
    pack.unpack(str(data), str(images))
    left = int(os.environ["SECONDS_LEFT"]) - MARGIN - round(time.monotonic() - start)
    settings = {"SOURCE": f"npz:{images}/train.npz", "TEST_SOURCE": f"npz:{images}/test.npz",
                "PALETTE": f"{images}/palette.npy", "SLICE_SECONDS": str(left), "REST_SECONDS": "90",
                "MODEL": options.model, "STEPS": str(options.steps), "WARMUP": str(options.steps // 16),
                "BATCH": str(options.batch)}
    code = subprocess.run([ROOT / "launch/reproduce_10m.sh", sys.executable, folder], cwd=ROOT,
                          env={**os.environ, **settings}).returncode
    found = results(folder)
    print(f"{found['steps']} steps, {found['nats_per_pixel']} nats per pixel on the test images")
    if options.json and found["jobs"].keys() - {"store"}:
        storage.publish(storage.path(options.json), json.dumps(found, indent=1) + "\n")
        samples = folder / "sample/figures/samples.png"
        if samples.exists():
            shutil.copy(samples, options.json.parent / "reproduce_10m_samples.png")
    return code


if __name__ == "__main__":
    exits.run(main)
