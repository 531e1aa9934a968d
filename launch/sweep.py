"""The table of a learning-rate sweep: which rate has the lowest held-out loss (paper, Section 3.4).

    python launch/sweep.py RUN

RUN/lr-RATE are workdirs of pretrain, as launch/sweep.sh and launch/slurm/sweep.sh leave them. Writes RUN/sweep.json and
RUN/sweep.md.
"""

import json
import math
import sys

from igpt_jax import storage
from igpt_jax.config import UserError

NATS = "eval/nats_per_pixel"


def row(workdir: storage.Path) -> dict:
    """One training: its learning rate, how it ended, and its held-out loss (infinite if there is none)."""
    config = json.loads(storage.read(workdir / "config.json"))
    file = workdir / "result.json"
    result = json.loads(storage.read(file)) if file.exists() else {"status": "not finished", "metrics": {}}
    nats = result["metrics"].get(NATS)
    return {"learning_rate": config["optimizer"]["learning_rate"], "status": result["status"],
            "steps": result["metrics"].get("steps"), NATS: math.inf if nats is None else nats, "workdir": str(workdir)}


def verdict(rows: list[dict]) -> str:
    """Names the best rate, and says if it is at an end of the list. `rows` are sorted from the highest rate down."""
    finished = [row for row in rows if row["status"] == "done" and math.isfinite(row[NATS])]
    if not finished:
        return "No training has finished with a held-out loss."
    best = min(finished, key=lambda row: row[NATS])
    text = f"Best: learning rate {best['learning_rate']:g}, {best[NATS]:.4f} nats per pixel held out."
    if best is rows[-1]:
        text += " It is the lowest rate: the search is not finished. Try lower ones."
    elif best is rows[0]:
        text += " It is the highest rate: try higher ones."
    unfinished = len(rows) - len(finished)
    return text + (f" {unfinished} of {len(rows)} did not finish." if unfinished else "")


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| learning rate | held-out nats per pixel | steps | ended |", "|---|---|---|---|"]
    for each in rows:
        nats = f"{each[NATS]:.4f}" if math.isfinite(each[NATS]) else "-"
        lines.append(f"| {each['learning_rate']:g} | {nats} | {each['steps'] or '-'} | {each['status']} |")
    return "\n".join(lines)


def main(run: str) -> int:
    folder = storage.path(run)
    try:
        rows = [row(child) for child in storage.children(folder)
                if child.name.startswith("lr-") and (child / "config.json").exists()]
        if not rows:
            raise UserError(f"{run} holds no lr-RATE with a training. Start launch/sweep.sh first.")
    except UserError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    rows.sort(key=lambda row: -row["learning_rate"])
    text = f"{table(rows)}\n\n{verdict(rows)}\n"
    print(text)
    storage.publish(folder / "sweep.md", text)
    finite = [{**row, NATS: row[NATS] if math.isfinite(row[NATS]) else None} for row in rows]
    storage.publish(folder / "sweep.json", json.dumps({"rows": finite, "verdict": verdict(rows)}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python launch/sweep.py RUN", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1]))
