"""Makes the gap table of docs/performance.md: what compiled steps move, in multiples of the planner's formula.

    python benchmarks/gaps.py [--only TEXT] [--limit N] [--python cuda/bin/python]

Compiles cells of docs/scaling.md (S, M, L at 32, 48 and 64 pixels, XL at 64), those that the JSON file lacks first, and
runs nothing. Each finished cell is written to docs/gaps.json, so that rerunning resumes. `before` in that file are the
figures of the first version of this table, as compiled then. A cell keeps its first settings, so that they compare.
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
from scaling import DOCS, IMAGE_SIZES, SLICES, cells
from tqdm import tqdm

from igpt_jax import storage
from igpt_jax.config import PlanConfig, UserError, base_config, parse
from igpt_jax.parallel import topology
from igpt_jax.planner.answer import answer
from igpt_jax.planner.estimate import estimate
from igpt_jax.planner.verdicts import verdict_for

MARKS = "<!-- gaps: made by benchmarks/gaps.py -->", "<!-- end of the gaps -->"
FIRST = ("igpt_l 32x32 on v5p:2x4x4", "igpt_s 48x48 on v6e:2x4", "igpt_s 48x48 on v5e:4x4")
TITLES = [f"{model} {size}x{size} on {where}" for model in SLICES for size in IMAGE_SIZES for where in SLICES[model]
          if model != "igpt_xl" or size == 64] + [title for title in cells() if " rgb " in title]
HEADER = ("| cell | setting | memory / formula | sent / formula | overlapped communication | executed / model FLOPs | "
          "GiB of memory traffic |\n|---|---|---|---|---|---|---|")


def config_of(title: str, settings: str, python: str) -> PlanConfig:
    """The config of a cell: that of docs/scaling.md with the mesh, accumulation and remat of `settings`."""
    flags = [word.removeprefix("--config.") for word in settings.split()]
    config = parse("plan", base_config("plan", ",".join([cells()[title][0], *flags])))
    return dataclasses.replace(config, python=python if topology.parse(config.topology).platform == "gpu" else "")


def measure(config: PlanConfig) -> dict:
    """The figures of one cell, from one compile: bytes of one device and step, and multiples of the model's FLOPs."""
    verdict = verdict_for(config)
    if verdict.status != "compiled":
        raise UserError(verdict.message)
    found = answer(config, topology.parse(config.topology), verdict)
    sent = sum(verdict.collective_bytes.values())
    return {"memory_bytes": verdict.memory_bytes, "sent_bytes": sent, "overlapped_bytes": verdict.overlapped_bytes,
            "flops": verdict.flops / found.model_flops, "required_bytes": verdict.required_bytes,
            "free": 1 - verdict.required_bytes / found.usable_bytes}


def row(title: str, cell: dict) -> str:
    """One line of the table; before -> now where both are known."""
    guess = estimate(config_of(title, cell["settings"], ""))
    formulas = {"memory_bytes": guess.memory_bytes, "sent_bytes": sum(guess.collective_bytes.values())}

    def shown(of, digits: str) -> str:
        both = [of(cell[when]) for when in ("before", "now") if cell.get(when)]
        return " → ".join(f"{value:{digits}}" for value in both if value is not None)

    columns = [shown(lambda figures, name=name: figures[name] / formulas[name] if formulas[name] else None, ".2f")
               for name in formulas]
    columns.append(shown(lambda figures: figures["overlapped_bytes"] / figures["sent_bytes"]
                         if "overlapped_bytes" in figures and figures["sent_bytes"] else None, ".0%"))
    columns += [shown(lambda figures: figures["flops"], ".2f"),
                shown(lambda figures: figures["memory_bytes"] / topology.GIB, ",.1f")]
    setting = re.sub(r"--config\.(mesh\.|model\.)?", "", cell["settings"]).replace(" accumulate=1", "")
    return f"| {title} | {setting} | {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="", help="interpreter with jax[cuda13], for the GPU cells")
    parser.add_argument("--only", default="", help="only cells whose title holds this text")
    parser.add_argument("--limit", type=int, default=len(TITLES), help="number of cells to compile")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS / "gaps.json")
    options = parser.parse_args()
    chosen = exits.read_json(DOCS / "scaling.json")
    known = {title: {"settings": chosen[title]["settings"]} for title in TITLES if title in chosen}
    known |= exits.read_json(options.out) if options.out.exists() else {}
    todo = [title for title in TITLES if title in known and options.only in title
            and (options.python or topology.parse(title.split()[-1]).platform == "tpu")]
    todo.sort(key=lambda title: ("now" in known[title], title not in FIRST))
    for title in tqdm(todo[:options.limit], unit="cell", disable=None):
        try:
            found = measure(config_of(title, known[title]["settings"], options.python))
        except UserError as error:
            print(f"{title}: {error}", file=sys.stderr)
            continue
        if options.out.exists():
            known |= exits.read_json(options.out)  # another process may have finished a cell meanwhile
        known[title]["now"] = found
        storage.publish(storage.path(os.fspath(options.out)), json.dumps(known, indent=1) + "\n")
        print(row(title, known[title]), flush=True)
    if options.out.resolve().parent != DOCS.resolve():
        return
    table = "\n".join([HEADER, *(row(title, known[title]) for title in TITLES if "now" in known.get(title, ()))])
    pages.replace(DOCS / "performance.md", MARKS, table)


if __name__ == "__main__":
    exits.run(main)
