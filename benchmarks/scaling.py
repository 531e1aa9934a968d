"""Makes the tables of docs/scaling.md: every size and resolution, compiled for one slice of each kind, not run.

    python benchmarks/scaling.py [--python cuda/bin/python] [--only TEXT] [--missing] [--predict] [--out FILE.json]

A cell compiles the setting that `plan` estimates to be the fastest. If that does not fit, it also compiles the smallest
change that should. Each finished cell is written to the JSON file, and verdicts are cached under $IGPT_CACHE, so that
rerunning resumes. Without --python (an environment with jax[cuda13]), GPU cells keep their results. The tables go into
the page with the JSON file's name. --predict compiles nothing: it predicts times from the JSON file's compiled figures.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys

import exits
import pages
from tqdm import tqdm

from igpt_jax import storage
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.parallel import topology
from igpt_jax.parallel.topology import GIB
from igpt_jax.planner import search
from igpt_jax.planner.answer import Answer, answer
from igpt_jax.planner.compilation import Verdict
from igpt_jax.planner.estimate import estimate
from igpt_jax.planner.verdicts import verdict_for

MARKS = "<!-- tables: made by benchmarks/scaling.py -->", "<!-- end of the tables -->"
DOCS = pathlib.Path(__file__).parent.parent / "docs"
SLICES = {
    "igpt_s": ("v4:2x2x2", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "h100:8", "h200:8"),
    "igpt_m": ("v4:2x2x4", "v5e:4x8", "v5p:2x2x2", "v6e:4x4", "h100:8", "h200:8"),
    "igpt_l": ("v4:4x4x4", "v5e:8x8", "v5p:2x4x4", "v6e:4x8", "h100:8", "h200:8"),
    "igpt_xl": ("v4:4x4x8", "v5e:16x16", "v5p:4x4x8", "v6e:8x16", "h100:8", "h200:8"),
}
IMAGE_SIZES = (32, 48, 64)
RGB_CHIPS = ("v5e", "v5p", "h200")
# iGPT-XL beyond the paper: settings by title. The batch is 64 or what the mesh needs; the total of images is the same.
LARGE = {
    "128x128 on v5e:16x16": "image_size=128,topology=v5e:16x16",
    "128x128 on v5e:16x16, fsdp alone": "image_size=128,topology=v5e:16x16,batch_size=256,steps=500000,mesh.fsdp=256",
    "256x256 on v5p:4x4x8, fsdp alone": "image_size=256,topology=v5p:4x4x8,batch_size=128,steps=1000000,mesh.fsdp=128",
    "256x256 on v5e:16x16, fsdp alone": "image_size=256,topology=v5e:16x16,batch_size=256,steps=500000,mesh.fsdp=256",
    "256x256 on v5e:16x16": "image_size=256,topology=v5e:16x16",
}
# Fixed work per chip: iGPT-L at 32x32, 8 images on each of so many TPU v5e.
WEAK = {16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16", 4096: "16x16*16"}


def cells() -> dict[str, tuple[str, bool]]:
    """Cells by title: settings, and whether to choose mesh, accumulation and remat."""
    paper = {"igpt_xl": "batch_size=64,steps=2000000"}
    xl = f"model=igpt_xl,{paper['igpt_xl']},model.remat=full"
    found = {f"igpt_xl {title}": (f"{xl},{settings}", "mesh." not in settings) for title, settings in LARGE.items()}
    for model in reversed(SLICES):  # the hardest to fit first
        for where in SLICES[model]:
            for size in IMAGE_SIZES:
                found[f"{model} {size}x{size} on {where}"] = (
                    f"model={model},image_size={size},topology={where},{paper.get(model, '')}".rstrip(","), True)
    for model in ("igpt_l", "igpt_m", "igpt_s"):  # sub-pixels: three tokens per pixel
        for where in (each for each in SLICES[model] if each.startswith(RGB_CHIPS)):
            for size in (32, 64):
                found[f"{model} rgb {size}x{size} on {where}"] = (
                    f"model={model},codec=rgb,image_size={size},topology={where}", True)
    for chips, shape in WEAK.items():
        slices = int(shape.partition("*")[2] or 1)
        found[f"weak scaling, {chips} chips"] = (
            f"model=igpt_l,model.remat=full,topology=v5e:{shape},batch_size={8 * chips},mesh.data={slices},"
            f"mesh.fsdp={chips // slices}", False)
    return found


def plan(settings: str, choose: bool, python: str) -> dict:
    """Computes one cell, with at most two compiles."""
    config = parse("plan", base_config("plan", settings))
    target = topology.parse(config.topology)
    if target.platform == "gpu":
        config = dataclasses.replace(config, python=python)
    if choose:
        config = search.candidates(config, target)[0].config
    result = answer(config, target, verdict_for(config))
    if choose and not result.fits and (tries := search.remedies(config, result.verdict, target)):
        config = tries[0].config
        result = answer(config, target, verdict_for(config))
    if result.verdict.status == "failed":
        raise UserError(result.verdict.message)
    return record(result)


def predict(settings: str, cell: dict) -> dict:
    """The cell with its times predicted anew, from its compiled figures."""
    chosen = cell["settings"].replace("--config.", "").replace(" ", ",")
    config = parse("plan", base_config("plan", f"{settings},{chosen}"))
    target = topology.parse(config.topology)
    return cell | record(answer(config, target, Verdict(**cell["verdict"])))


def record(result: Answer) -> dict:
    """A cell of the JSON file."""
    figures = {name: value for name, value in result.to_dict().items() if name != "table"}
    return {"settings": search.settings(result.config), "batch_size": result.config.batch_size, **figures}


def row(title: str, cell: dict) -> str:
    """One line of the tables."""
    used, room = cell["bytes_per_device"], cell["hbm_bytes"]
    setting = re.sub(r"--config\.(?:mesh\.|model\.)?", "", cell["settings"])
    setting = re.sub(r" accumulate=1\b", "", setting)
    setting = f"batch={cell['batch_size']} {setting}" if "alone" in title else setting
    if cell["fits"] is None:
        return f"| {title} | {setting} | {cell['verdict']['message']} | | | | | | |"
    if not cell["fits"]:
        return f"| {title} | {setting} | {used / GIB:.1f} of {room / GIB:.1f}: does not fit | | | | | | |"
    forecast, schedule = cell["forecast"], cell["schedule"]
    return (f"| {title} | {setting} | {used / GIB:.2f} | {1 - used / room:.0%} | {forecast['step_seconds']:.3g} | "
            f"{cell['tokens_per_second_per_device']:,.0f} | {mfu(cell)} | {schedule['days']:,.1f} | "
            f"{schedule['dollars']:,.0f} |")


def mfu(cell: dict) -> str:
    """The predicted MFU with its interval, in per cent."""
    low, high = (100 * bound for bound in cell["mfu_interval"])
    return f"{100 * cell['mfu']:.0f} ({low:.0f} to {high:.0f})"


HEADER = ("| cell | setting | GiB/device | free | s/step | tokens/s/device | MFU, % | days | $ |\n"
          "|---|---|---|---|---|---|---|---|---|")


def weak_points(known: dict[str, dict]) -> list[tuple[int, float, float | None]]:
    """Chips, GiB sent per chip by formula, and as compiled where it was."""
    points = []
    for chips in WEAK:
        title = f"weak scaling, {chips} chips"
        guess = estimate(parse("plan", base_config("plan", cells()[title][0])))
        cell = known.get(title)
        compiled = sum(cell["verdict"]["collective_bytes"].values()) / GIB if cell else None
        points.append((chips, sum(guess.collective_bytes.values()) / GIB, compiled))
    return points


def tables(known: dict[str, dict]) -> str:
    """The tables of all known cells, as Markdown."""
    lines = [HEADER, *(row(title, known[title]) for title in cells() if title in known and "weak" not in title)]
    lines += ["", "| chips | GiB sent per chip, by formula | as compiled | GiB/device | s/step | MFU, % |",
              "|---|---|---|---|---|---|"]
    for chips, formula, compiled in weak_points(known):
        cell = known.get(f"weak scaling, {chips} chips")
        rest = "not compiled | | |" if not cell else (
            f"{compiled:.2f} | {cell['bytes_per_device'] / GIB:.2f} | {cell['forecast']['step_seconds']:.3g} | "
            f"{mfu(cell)}")
        lines.append(f"| {chips:,} | {formula:.2f} | {rest} |")
    return "\n".join(lines)


def draw(known: dict[str, dict], path: pathlib.Path) -> None:
    """Draws the weak scaling curve."""
    import matplotlib.figure

    points = weak_points(known)
    figure = matplotlib.figure.Figure(figsize=(7, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot([point[0] for point in points], [point[1] for point in points], marker=".", color="tab:blue",
              linewidth=1.2, label="by formula")
    compiled = [(chips, size) for chips, _, size in points if size is not None]
    if compiled:
        axes.plot(*zip(*compiled, strict=True), "o", color="tab:orange", label="in the compiled program")
    axes.set_xscale("log", base=2)
    axes.set_xticks([point[0] for point in points], [f"{point[0]:,}" for point in points])
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(max(filter(None, point[1:])) for point in points))
    axes.set_xlabel("TPU v5e chips: iGPT-L at 32x32, 8 images on each")
    axes.set_ylabel("GiB sent per chip and step")
    axes.grid(color="0.92", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="", help="interpreter with jax[cuda13], for the GPU cells")
    parser.add_argument("--only", default="", help="only cells whose title holds this text")
    parser.add_argument("--missing", action="store_true", help="only cells that the JSON file lacks")
    parser.add_argument("--predict", action="store_true", help="only predict times anew, from the compiled figures")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS / "scaling.json")
    options = parser.parse_args()
    known = exits.read_json(options.out) if options.out.exists() else {}
    todo = [(title, *what) for title, what in cells().items()
            if options.only in title and not (options.missing and title in known)]
    if options.predict:
        known, todo = {title: predict(cells()[title][0], cell) for title, cell in known.items()}, []
        storage.publish(storage.path(os.fspath(options.out)), json.dumps(known, indent=1) + "\n")
    for title, settings, choose in tqdm(todo, unit="cell", disable=None):
        if topology.parse(dict(pair.split("=", 1) for pair in settings.split(","))["topology"]).platform == "gpu" and (
                not options.python):
            continue
        try:
            found = plan(settings, choose, options.python)
        except UserError as error:
            print(f"{title}: {error}", file=sys.stderr)
            continue
        if options.out.exists():
            known |= exits.read_json(options.out)  # another process may have finished a cell meanwhile
        known[title] = found
        storage.publish(storage.path(os.fspath(options.out)), json.dumps(known, indent=1) + "\n")
        print(row(title, known[title]), flush=True)
    draw(known, options.out.with_name("scaling_weak.png"))
    page = options.out.with_suffix(".md")
    if page.exists():
        pages.replace(page, MARKS, tables(known))


if __name__ == "__main__":
    exits.run(main)
