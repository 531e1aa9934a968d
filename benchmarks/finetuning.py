"""Measures the gain of pretraining and of the joint loss: fine-tuning in three ways, and masked pretraining.

    python benchmarks/finetuning.py --store=runs/cifar16 --checkpoint=runs/cifar16_tiny [--steps 300] [--batch 64]
        [--workdir runs/finetuning] [--figure FILE.png]

All runs have the same number of steps. A finished run is not repeated. Prints a Markdown table, writes it as JSON into
the workdir, and draws held-out accuracy and masked loss over steps.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import matplotlib.figure

from igpt_jax.metrics.logging import load_metrics

NEW = ["--config.checkpoint=", "--config.model.name=igpt_tiny", "--config.optimizer.learning_rate=3e-3"]
RUNS = {
    "pretrained, L_GEN + L_CLF": [],
    "pretrained, L_CLF alone": ["--config.generative_weight=0"],
    "from scratch, L_GEN + L_CLF": NEW,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("store", "runs/cifar16"), ("checkpoint", "runs/cifar16_tiny"), ("steps", 300), ("batch", 64),
                          ("workdir", "runs/finetuning"), ("figure", "")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    folder = pathlib.Path(given.workdir)

    def run(job: str, name: str, *more: str) -> tuple[dict, list[dict]]:
        """A job's metrics and its metrics lines."""
        workdir = folder / name
        every = max(1, given.steps // 5)
        if not (workdir / "result.json").exists():
            subprocess.run([sys.executable, "-m", "igpt_jax", job, f"--workdir={workdir}",
                            f"--config.data.store={given.store}", f"--config.steps={given.steps}",
                            f"--config.batch_size={given.batch}", "--config.precision=float32",
                            f"--config.eval_every_steps={every}", "--config.log_every_steps=10", *more], check=True)
        return json.loads((workdir / "result.json").read_text())["metrics"], load_metrics(str(workdir))

    rows, curves, warmup = [], {}, f"--config.optimizer.warmup_steps={given.steps // 10}"
    for index, (label, more) in enumerate(RUNS.items()):
        metrics, curves[label] = run("finetune", f"finetune{index}", f"--config.checkpoint={given.checkpoint}",
                                     "--config.data.augment=cifar", warmup, *more)
        rows.append({"run": label, "test_accuracy": metrics["test_accuracy"], "best_step": metrics["best_step"],
                     "held_out_accuracy": metrics["eval/accuracy"], "held_out_nats": metrics["eval/nats_per_pixel"]})
    masked, lines = run("pretrain", "masked", "--config.objective=masked", "--config.model.name=igpt_tiny",
                        warmup)

    print("| | test accuracy | at step | held out, nats per pixel |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['run']} | {row['test_accuracy']:.2%} | {row['best_step']} | {row['held_out_nats']:.3f} |")
    first, last = (next(line["train/nats_per_pixel"] for line in each if "train/nats_per_pixel" in line)
                   for each in (lines, reversed(lines)))
    print(f"\nmasked: {first:.3f} nats per hidden pixel at the first step, {last:.3f} at the last; held out "
          f"{masked['eval/nats_per_pixel']:.3f}")
    found = {"runs": rows, "masked": masked, "first_masked": first}
    (folder / "finetuning.json").write_text(json.dumps(found, indent=2))
    if given.figure:
        draw(given.figure, curves, lines)


def draw(path: str, curves: dict[str, list[dict]], masked: list[dict]) -> None:
    """Draws accuracy of the fine-tuned runs, and loss of the masked one, over steps."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), dpi=130, layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for label, lines in curves.items():
        points = [(line["step"], 100 * line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]
        accuracy.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=label)
    for name, label in (("train/nats_per_pixel", "train"), ("eval/nats_per_pixel", "held out")):
        points = [(line["step"], line[name]) for line in masked if name in line]
        loss.plot(*zip(*points, strict=True), marker="o" if label == "held out" else None, markersize=3.5, label=label)
    accuracy.set(xlabel="step", ylabel="held-out accuracy, %", title="Fine-tuning")
    loss.set(xlabel="step", ylabel="nats per hidden pixel", title="Masked pretraining")
    for axes in (accuracy, loss):
        axes.grid(color="0.92", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
