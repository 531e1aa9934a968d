"""Trains a small run and plans the same run, calibrated by it: python calibrated_plan.py FOLDER."""

import sys

from igpt_jax.config import base_config, parse
from igpt_jax.jobs import plan, prepare, pretrain
from igpt_jax.runtime.job import run_job


def main(folder):
    small = "model=igpt_tiny,model.layers=1,batch_size=16,"
    for job, settings, workdir in (
            (prepare, "source=synthetic:64,image_size=8,palette=fit:16", "store"),
            (pretrain, f"{small}steps=20,log_every_steps=5,data.store={folder}/store,data.held_out=", "run"),
            (plan, f"{small}precision=float32,image_size=8,palette_size=16,topology=cpu:1,calibration={folder}/run",
             "plan")):
        name = job.__name__.rpartition(".")[2]
        assert run_job(job.run, parse(name, base_config(name, settings)), f"{folder}/{workdir}") == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
