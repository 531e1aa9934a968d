"""Compares training settings by real runs, one after the other; the same command resumes where it stopped.

    python benchmarks/training_settings.py STUDY --store=runs/cifar16 --workdir=runs/settings [--steps=3000] [--runs=N]
        [--precision=bfloat16] [--optimizer=muon] [--only=TEXT] [--table]

schedules: cosine, WSD as branches of one constant trunk, and the trunk itself with averaged parameters; at two lengths.
optimizers: Adam and Muon at several learning rates; steps in which Muon reaches the final loss of the best Adam.
transfer: learning rates over widths and depths, standard and completep: does the best one stay?

Each run is a `pretrain` in WORKDIR/STUDY/NAME. After each, WORKDIR/STUDY.json and WORKDIR/STUDY.md hold the table of
all finished ones. --runs stops after so many runs, --only takes just those whose name holds TEXT, --table runs none.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

import exits
import job_runs

from igpt_jax.metrics.logging import load_metrics

Settings = dict[str, Any]  # config keys of pretrain
NATS = "eval/nats_per_pixel"
RATES = {"adam": (0.0005, 0.001, 0.002, 0.004, 0.008), "muon": (0.002, 0.004, 0.008, 0.016, 0.032)}  # of `transfer`


def schedules(given: argparse.Namespace) -> dict[str, Settings]:
    """Runs of `steps` and of twice as many. The trunk covers both lengths."""
    steps = given.steps
    found: dict[str, Settings] = {}
    for rate in (0.001, 0.003):
        trunk = {"optimizer.schedule": "constant", "optimizer.ema": 0.99, "optimizer.learning_rate": rate,
                 "optimizer.warmup_steps": steps // 20}
        lengths = (steps, 2 * steps)
        branches = [length - length // 5 for length in lengths]
        found[f"constant-{rate}"] = {**trunk, "steps": lengths[-1], "eval_every_steps": steps,
                                     "keep_steps": f"({','.join(map(str, branches))})"}
        for length, start in zip(lengths, branches, strict=True):
            found[f"wsd-{rate}-{length}"] = {**trunk, "steps": length, "optimizer.schedule": "wsd",
                                             "branch_from": f"{{study}}/constant-{rate}/checkpoints/{start}"}
            found[f"cosine-{rate}-{length}"] = {**trunk, "steps": length, "optimizer.schedule": "cosine",
                                                "optimizer.ema": 0.0}
    return found


def optimizers(given: argparse.Namespace) -> dict[str, Settings]:
    """Learning rates a factor of 2 apart; held-out losses twenty times per run."""
    steps = given.steps
    return {f"{name}-{rate}": {"steps": steps, "optimizer.name": name, "optimizer.learning_rate": rate,
                               "optimizer.warmup_steps": steps // 20, "eval_every_steps": steps // 20}
            for name in ("adam", "muon") for rate in (0.001, 0.002, 0.004, 0.008)}


def transfer(given: argparse.Namespace) -> dict[str, Settings]:
    """Widths at 4 layers, depths at a width of 128; the base of completep is 64 wide and 2 deep."""
    shapes = [(64, 4), (128, 4), (256, 4), (128, 2), (128, 8)]
    return {f"{parametrization}-{width}x{depth}-{rate}": {
        "steps": given.steps, "optimizer.name": given.optimizer, "optimizer.learning_rate": rate,
        "optimizer.warmup_steps": given.steps // 20, "model.embed": width,
        "model.heads": width // 32, "model.layers": depth, "model.init": "paper",
        "model.parametrization": parametrization,
        **({"model.base_embed": 64, "model.base_layers": 2} if parametrization == "completep" else {})}
        for parametrization in ("standard", "completep") for width, depth in shapes
        for rate in RATES[given.optimizer]}


def row(name: str, workdir: pathlib.Path) -> dict[str, Any] | None:
    """A finished run's figures; None where it is not finished, or diverged."""
    result = job_runs.result(workdir)
    if result.get("status") != "done":
        return None
    metrics = result["metrics"]
    return {"name": name, "steps": metrics["steps"], "nats": metrics.get(NATS), "ema": metrics.get(
        "eval/ema_nats_per_pixel"), "images_per_second": metrics.get("images_per_second"),
        "curve": [(line["step"], line[NATS], line.get("eval/ema_nats_per_pixel"))
                  for line in load_metrics(str(workdir)) if line.get(NATS) is not None]}


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda each: each["nats"])


def optimizer_verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Steps and time in which the best Muon reaches the final loss of the best Adam."""
    by_name = {name: [each for each in rows if each["name"].startswith(name)] for name in ("adam", "muon")}
    if not all(by_name.values()):
        return []
    adam, muon = best(by_name["adam"]), best(by_name["muon"])
    reached = next((step for step, nats, _ in muon["curve"] if nats <= adam["nats"]), None)
    share = f"after step {reached:,}, {reached / adam['steps']:.0%} of them" if reached else "in no evaluation"
    adams, muons = (statistics.median(each["images_per_second"] for each in found) for found in by_name.values())
    return [f"Best Adam: {adam['name']}, {adam['nats']:.4f} nats per pixel after {adam['steps']:,} steps. Best Muon: "
            f"{muon['name']}, {muon['nats']:.4f}; it reaches Adam's loss {share}. A step of Muon takes "
            f"{adams / muons:.2f} times as long, by the medians of all runs."]


def transfer_verdict(rows: list[dict[str, Any]]) -> list[str]:
    """The best learning rate of each parametrization and shape."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for each in rows:
        shapes.setdefault(each["name"].rpartition("-")[0], []).append(each)
    return [f"{shape}: best learning rate {best(found)['name'].rpartition('-')[2]} of {len(found)} finished"
            for shape, found in shapes.items()]


STUDIES = {"schedules": (schedules, lambda rows: []), "optimizers": (optimizers, optimizer_verdict),
           "transfer": (transfer, transfer_verdict)}


def publish(study: str, workdir: pathlib.Path, planned: dict[str, Settings], verdict: Any) -> None:
    """Writes and prints the table of the finished runs."""
    rows = [found for name in planned if (found := row(name, workdir / study / name))]
    (workdir / f"{study}.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| run | steps | held-out nats per pixel | of averaged parameters | images/s |", "|---|---|---|---|---|"]
    for each in rows:
        ema = f"{each['ema']:.4f}" if each["ema"] else ""
        lines.append(f"| {each['name']} | {each['steps']:,} | {each['nats']:.4f} | {ema} | "
                     f"{each['images_per_second'] or 0:,.1f} |")
    if len(rows) < len(planned):
        lines += ["", f"{len(rows)} of {len(planned)} runs are finished."]
    text = "\n".join([*lines, "", *(verdict(rows) if rows else [])])
    (workdir / f"{study}.md").write_text(text + "\n")
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--store", required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=exits.count, default=3000)
    parser.add_argument("--batch", type=exits.count, default=64)
    parser.add_argument("--runs", type=int, default=10**6)
    parser.add_argument("--model", default="igpt_tiny")
    parser.add_argument("--optimizer", choices=RATES, default="adam", help="of transfer")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    make, verdict = STUDIES[arguments.study]
    planned, left = make(arguments), 0 if arguments.table else arguments.runs
    if not any(arguments.only in name for name in planned):
        parser.error(f"--only={arguments.only!r} is in no run's name. They are: {', '.join(planned)}.")
    folder = arguments.workdir / arguments.study
    folder.mkdir(parents=True, exist_ok=True)
    common = {"data.store": arguments.store, "model.name": arguments.model, "batch_size": arguments.batch,
              "precision": arguments.precision, "mesh.data": -1, "mesh.fsdp": 1, "eval_every_steps": 0,
              "keep_newest": 1}
    for name, settings in planned.items():
        settings = {key: str(value).format(study=folder) for key, value in (common | settings).items()}
        wanted = left and arguments.only in name
        if wanted and not job_runs.finished(folder / name, job_runs.words("pretrain", folder / name, settings)):
            left -= 1
            job_runs.run("pretrain", folder / name, settings)
            publish(arguments.study, arguments.workdir, planned, verdict)
    publish(arguments.study, arguments.workdir, planned, verdict)


if __name__ == "__main__":
    exits.run(main)
