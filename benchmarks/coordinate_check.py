"""Coordinate check: does the size of activation updates depend on a model's width and depth?

    python benchmarks/coordinate_check.py [--widths 16 32 64 128] [--depths 2 4 8] [--optimizer adam|muon] [--steps 8]
        [--init paper|released] [--cross] [--json FILE] [--figure FILE]

Trains small models of every width and depth for a few steps (with --cross, every width at the least depth, and every
depth at the least width). Measures how far the training has moved the residual stream after the last block, and the
logits: root mean squares, geometric means over seeds. Prints the slopes of their logarithms against log width and log
depth. Under completep they are near 0, and under standard they are not (Dey et al. 2025, arXiv 2505.01618, Figure 7;
Yang et al. 2021, arXiv 2203.03466, Appendix D).

B batch, T tokens, D embed, V palette.
"""

import argparse
import json
import pathlib
from typing import Any

import exits
import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax import storage
from igpt_jax.config import base_config, parse
from igpt_jax.model.image_gpt import Model
from igpt_jax.training.steps import init_state, make_train_step

V, SIDE, BATCH, HEAD_DIM = 16, 4, 16, 16
MEASURED = ("stream", "logits")


def updates(parametrization: str, width: int, depth: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Root mean squares of the updates after all steps, by what is measured."""
    given = base_config("pretrain", f"steps={arguments.steps},precision=float32,batch_size={BATCH},"
                                    f"model.init={arguments.init},model.remat=none,model.attention=reference,"
                                    f"model.embed={width},model.layers={depth},model.heads={width // HEAD_DIM},"
                                    f"optimizer.name={arguments.optimizer},optimizer.schedule=constant,"
                                    f"optimizer.learning_rate={arguments.rate},model.parametrization={parametrization}")
    if parametrization == "completep":
        given.model.update(base_embed=min(arguments.widths), base_layers=min(arguments.depths))
    config = parse("pretrain", given)
    model = Model(config.model, V, SIDE, "float32")
    step = make_train_step(model, config, warmup_steps=0)
    random = np.random.default_rng(0)
    # Pixels are noisy continuations of the pixel before, so that there is something to learn from the first step on.
    moves = random.choice([0, 1, 1, 2], (arguments.steps + 1, BATCH, SIDE ** 2))
    tokens = jnp.asarray((random.integers(0, V, (arguments.steps + 1, BATCH, 1)) + moves.cumsum(-1)) % V, jnp.int32)

    def measured(params: dict[str, Any]) -> dict[str, jax.Array]:
        module = model.bind(params)
        x_BTD, _ = module.stream(tokens[-1])
        return {"stream": x_BTD, "logits": module.logits(x_BTD)}

    @jax.jit
    def moved(state: dict[str, Any]) -> dict[str, jax.Array]:
        before = measured(state["params"])
        state, _ = jax.lax.scan(lambda state, batch: (step(state, batch, None)[0], None), state, tokens[:-1])
        return jax.tree.map(lambda a, b: jnp.sqrt(jnp.mean((a - b) ** 2)), measured(state["params"]), before)

    found = [moved(init_state(model, config, jax.random.key(seed))) for seed in range(arguments.seeds)]
    return {name: float(np.exp(np.mean([np.log(each[name]) for each in found]))) for name in MEASURED}


def slopes(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Least squares of log update against log width and log depth: {"stream": {"width": slope, "depth": slope}, ...}"""
    design = np.array([[1, np.log(row["width"]), np.log(row["depth"])] for row in rows])
    found = {}
    for name in MEASURED:
        _, width, depth = np.linalg.lstsq(design, np.log([row[name] for row in rows]), rcond=None)[0]
        found[name] = {"width": float(width), "depth": float(depth)}
    return found


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Updates over width, a line per depth; a column per parametrization."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(MEASURED), len(results), sharex=True, sharey="row", squeeze=False,
                                   figsize=(4 * len(results), 5), layout="constrained")
    for column, (parametrization, found) in enumerate(results.items()):
        for row, name in enumerate(MEASURED):
            panel = axes[row][column]
            for depth in sorted({each["depth"] for each in found["rows"]}):
                points = [(each["width"], each[name]) for each in found["rows"] if each["depth"] == depth]
                panel.loglog(*zip(*points, strict=True), marker="o", base=2, label=f"{depth} layers")
            slope = found["slopes"][name]
            panel.set_title(f"{parametrization}: slopes {slope['width']:+.2f} width, {slope['depth']:+.2f} depth",
                            fontsize=9)
            panel.set_ylabel(f"update of the {name}, RMS" if column == 0 else "")
            panel.set_xlabel("width" if row == len(MEASURED) - 1 else "")
    axes[0][0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=exits.count, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--depths", type=exits.count, nargs="+", default=[2, 4, 8])
    parser.add_argument("--parametrizations", nargs="+", default=["standard", "completep"])
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--init", default="paper")
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate, constant")
    parser.add_argument("--steps", type=exits.count, default=8)
    parser.add_argument("--seeds", type=exits.count, default=4)
    parser.add_argument("--cross", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--figure", type=pathlib.Path)
    arguments = parser.parse_args()
    results = {}
    for parametrization in arguments.parametrizations:
        rows = []
        for depth in arguments.depths:
            for width in arguments.widths:
                if arguments.cross and width > min(arguments.widths) and depth > min(arguments.depths):
                    continue
                rows.append({"width": width, "depth": depth, **updates(parametrization, width, depth, arguments)})
                print(parametrization, {name: round(value, 5) for name, value in rows[-1].items()}, flush=True)
        results[parametrization] = {"rows": rows, "slopes": slopes(rows)}
        for name, slope in results[parametrization]["slopes"].items():
            print(f"{parametrization}, {name}: slopes {slope['width']:+.3f} (width), {slope['depth']:+.3f} (depth)",
                  flush=True)
    if arguments.json:
        storage.publish(storage.path(arguments.json), json.dumps(results, indent=1) + "\n")
    if arguments.figure:
        draw(results, arguments.figure)


if __name__ == "__main__":
    exits.run(main)
