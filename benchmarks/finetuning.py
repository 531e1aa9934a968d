"""Measures what pretraining and the joint loss gain: fine-tuning in three ways, each at its own best learning rate.

    python benchmarks/finetuning.py --store=runs/cifar16 --checkpoint=runs/cifar16_tiny [--steps 1500] [--search 150]
        [--batch 64] [--augment cifar] [--workdir runs/finetuning] [--figure FILE.png] [--only TEXT] [--precision auto]
        [--parameters raw]

Each way is tried at three learning rates for `search` steps. The rate with the best held-out accuracy then has a run of
`steps` steps. A finished run is not repeated, and an interrupted one resumes. The model trained from scratch has the
shape of the checkpoint's, which is given as a pretrain job's workdir. All have its objective. --only leaves the ways
whose name holds TEXT. Prints a Markdown table, writes it as JSON into the workdir, and draws held-out accuracy over
steps.
"""

import argparse
import json
import pathlib
import sys

import exits
import job_runs

from igpt_jax import checkpoint
from igpt_jax.config.model import OF_CHECKPOINT
from igpt_jax.data.store import Store
from igpt_jax.evaluation.linear_probe import wilson
from igpt_jax.metrics import figures
from igpt_jax.metrics.charts import Chart, Series
from igpt_jax.metrics.logging import load_metrics

RATES = ("3e-4", "1e-3", "3e-3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("store", "runs/cifar16"), ("checkpoint", "runs/cifar16_tiny"), ("steps", 1500),
                          ("search", 150), ("batch", 64), ("augment", "cifar"), ("workdir", "runs/finetuning"),
                          ("figure", ""), ("only", ""), ("precision", "auto"), ("parameters", "raw")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    folder = pathlib.Path(given.workdir)
    pretrained = checkpoint.load_metadata(given.checkpoint).config
    # The newest step by its name: runs of an older one do not count as finished.
    loaded = {"checkpoint": checkpoint.step_path(*checkpoint.locate(given.checkpoint)), "parameters": given.parameters}
    scratch = {"codec": pretrained.codec}
    scratch |= {f"model.{name}": getattr(pretrained.model, name) for name in ("name", *OF_CHECKPOINT)}
    ways = {
        "pretrained, L_GEN + L_CLF": loaded,
        "pretrained, L_CLF alone": {**loaded, "generative_weight": 0},
        "from scratch, L_GEN + L_CLF": {"checkpoint": "", **scratch},
    }

    if not any(given.only in way for way in ways):
        parser.error(f"--only={given.only!r} is in no way's name. They are: {'; '.join(ways)}.")

    def run(name: str, steps: int, evaluations: int, rate: str, way: dict, **more: str) -> dict:
        """The metrics of a run in the workdir's folder `name`."""
        return job_runs.run("finetune", folder / name, {
            "data.store": given.store, "objective": pretrained.objective, "data.augment": given.augment,
            "steps": steps, "batch_size": given.batch, "precision": given.precision,
            "eval_every_steps": -(-steps // evaluations), "mesh.data": -1, "mesh.fsdp": 1,
            "optimizer.schedule": "cosine", "optimizer.warmup_steps": steps // 10, "optimizer.learning_rate": rate,
            **way, **more})

    rows, curves, test_images = [], {}, Store.open(given.store).split("test").count
    for index, (way, settings) in enumerate(ways.items()):
        if given.only not in way:
            continue
        # A rate at which it diverges has no accuracy.
        searched = {rate: run(f"way{index}_search_{rate}", given.search, 1, rate, settings, **{"data.test": ""}).get(
            "eval/accuracy", 0.0) for rate in RATES}
        rate = max(RATES, key=searched.__getitem__)
        metrics = run(f"way{index}", given.steps, 6, rate, settings)
        if not metrics:
            sys.exit(f"{way} diverges at {rate}, the best of {given.search} steps: {folder}/way{index}")
        rows.append({"way": way, "learning_rate": rate, "test_accuracy": metrics["test_accuracy"],
                     "interval": wilson(metrics["test_accuracy"], test_images), "best_step": metrics["best_step"],
                     "held_out_nats": metrics["eval/nats_per_pixel"], "search": searched})
        curves[way] = [(line["step"], 100 * line["eval/accuracy"]) for line in load_metrics(str(folder / f"way{index}"))
                       if "eval/accuracy" in line]

    print(f"| | learning rate | held out after {given.search} steps at {', '.join(RATES)}, % | test accuracy, % (95%) "
          "| at step | held-out nats per pixel |\n|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        search = ", ".join(f"{100 * accuracy:.1f}" for accuracy in row["search"].values())
        print(f"| {row['way']} | {row['learning_rate']} | {search} | {100 * row['test_accuracy']:.1f} "
              f"({100 * low:.1f} to {100 * high:.1f}) | {row['best_step']} | {row['held_out_nats']:.3f} |")
    (folder / "finetuning.json").write_text(json.dumps({"rows": rows, "curves": curves}, indent=2))
    if given.figure:
        series = [Series(way, points, hue=hue) for hue, (way, points) in enumerate(curves.items())]
        figures.save(pathlib.Path(given.figure), Chart("fine-tuning", "step", "held-out accuracy, %", series))


if __name__ == "__main__":
    exits.run(main)
