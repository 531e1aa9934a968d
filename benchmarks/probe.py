"""Measures probing: the solver against scikit-learn's LogisticRegression, features of all layers against those of one.

    python benchmarks/probe.py solver [--examples 10000] [--dims 512] [--classes 10] [--layers 25] [--json FILE]
    python benchmarks/probe.py features [--layers 24] [--embed 64] [--size 16] [--rounds 25] [--json FILE]

solver: the features of each layer are synthetic and correlated, like a network's. scikit-learn solves in float32 and in
float64, to a tolerance at which its objective is no lower than ours. Prints seconds, their ratio, and the differences
of the optima.

features: both programs take turns on the same batch. Prints medians of wall time, of CPU time, which other jobs on the
machine disturb less, and of the ratio in each round.
"""

import argparse
import json
import time
from typing import Any

import exits
import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

from igpt_jax import storage
from igpt_jax.config import ModelConfig
from igpt_jax.evaluation import linear_probe
from igpt_jax.model.attention import attention
from igpt_jax.model.features import make_feature_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.layers import norm


def synthetic(examples: int, dims: int, classes: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [E, D] whose principal deviations decay exponentially, and noisy labels that depend on them."""
    random = np.random.default_rng(layer)
    mix_DD = random.normal(size=(dims, dims)) * np.exp(-np.arange(dims) * 8 / dims)[:, None]
    x_ED = random.normal(size=(examples, dims)) @ mix_DD / dims ** 0.5 + 0.05 * random.normal(size=(examples, dims))
    logits_EK = 2 * x_ED @ random.normal(size=(dims, classes)) + 2 * random.gumbel(size=(examples, classes))
    return x_ED.astype(np.float32), logits_EK.argmax(1)


def objective(x_ED: np.ndarray, labels_E: np.ndarray, weights_DK: np.ndarray, biases_K: np.ndarray,
              l2: float) -> float:
    """Mean cross entropy + l2 / 2 |weights|^2 in float64."""
    logits_EK = x_ED.astype(np.float64) @ weights_DK.astype(np.float64) + biases_K
    logits_EK -= logits_EK.max(axis=1, keepdims=True)
    entropy = np.log(np.exp(logits_EK).sum(axis=1)) - logits_EK[np.arange(len(labels_E)), labels_E]
    return float(entropy.mean() + l2 / 2 * np.square(weights_DK, dtype=np.float64).sum())


def solver(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one layer each: seconds of both solvers, and how their optima differ."""
    l2, classes = arguments.l2, arguments.classes
    rows = []
    for layer in range(arguments.layers):
        x_ED, labels_E = synthetic(arguments.examples, arguments.dims, classes, layer)
        if layer == 0:
            linear_probe.fit(x_ED, labels_E, classes, (l2,))  # compiles
        start = time.perf_counter()
        (probe,) = linear_probe.fit(x_ED, labels_E, classes, (l2,))
        row = {"layer": layer, "ours_seconds": time.perf_counter() - start}
        standard_ED = (x_ED - probe.mean_D) / probe.deviation_D
        ours = objective(standard_ED, labels_E, probe.weights_DK, probe.biases_K, l2)
        for dtype in (np.float32, np.float64):
            start = time.perf_counter()
            theirs = LogisticRegression(C=1 / (l2 * len(x_ED)), tol=arguments.tolerance, max_iter=5000).fit(
                standard_ED.astype(dtype), labels_E)
            name = f"sklearn_{np.dtype(dtype).name}"
            row[f"{name}_seconds"] = time.perf_counter() - start
            value = objective(standard_ED, labels_E, theirs.coef_.T, theirs.intercept_, l2)
            row[f"{name}_objective_above_ours"] = value / ours - 1
            row[f"{name}_same_predictions"] = float((theirs.predict(standard_ED) == probe.predict(x_ED)).mean())
        rows.append(row)
        print({name: float(f"{value:.4g}") for name, value in row.items()}, flush=True)
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_seconds")}
    for name, seconds in total.items():
        print(f"{name:28} {seconds:8.2f} s  {seconds / total['ours_seconds']:6.2f} x")
    return rows


def features(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one round each: seconds for features of all layers, and of the last one."""
    config = ModelConfig("igpt_tiny", layers=arguments.layers, embed=arguments.embed, heads=arguments.heads)
    model = Model(config, 512, arguments.size, "float32")
    params = jax.jit(model.init)(jax.random.key(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (arguments.batch, model.dims.T), 0, 512)

    def last_layer(params: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
        """Features of the last layer alone: the same forward pass, whose scan returns no features."""
        gpt = model.bind(params)

        def block(block, x_BTD, _):
            return block.after_attention(x_BTD, attention(*block.qkv(x_BTD), causal=True,
                                                          backend=gpt.config.attention)), None

        return norm(gpt.scan_blocks(block, gpt.embed(tokens_BT))[0], gpt.final_norm_D[...]).mean(axis=1)

    programs = {"one": jax.jit(last_layer), "all": jax.jit(make_feature_step(model, "normalized"))}
    found = {name: np.asarray(program(params, tokens_BT)) for name, program in programs.items()}  # compiles
    np.testing.assert_allclose(found["all"][:, -1], found["one"], atol=1e-5)
    rows = []
    for _ in range(arguments.rounds):
        row = {}
        for name, program in programs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(params, tokens_BT))
            row |= {f"{name}_seconds": time.perf_counter() - start,
                    f"{name}_cpu_seconds": time.process_time() - cpu_start}
        rows.append({**row, **{f"{unit}_ratio": row[f"all_{unit}"] / row[f"one_{unit}"]
                               for unit in ("seconds", "cpu_seconds")}})
    for name in rows[0]:
        values = sorted(row[name] for row in rows)
        print(f"{name:18} median {np.median(values):.4f}  from {values[0]:.4f} to {values[-1]:.4f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    defaults = {solver: {"examples": 10_000, "dims": 512, "classes": 10, "layers": 25},
                features: {"layers": 24, "embed": 64, "heads": 4, "size": 16, "batch": 32, "rounds": 25}}
    for function, numbers in defaults.items():
        part = parts.add_parser(function.__name__)
        part.set_defaults(function=function)
        for name, default in numbers.items():
            part.add_argument(f"--{name}", type=exits.count, default=default)
        part.add_argument("--json", help="file for the figures")
    parts.choices["solver"].add_argument("--l2", type=float, default=1e-3, help="penalty")
    parts.choices["solver"].add_argument("--tolerance", type=float, default=1e-5, help="of scikit-learn's gradient")
    arguments = parser.parse_args()
    rows = arguments.function(arguments)
    if arguments.json:
        given = {name: value for name, value in vars(arguments).items() if name != "function"}
        storage.publish(storage.path(arguments.json), json.dumps({"arguments": given, "rows": rows}, indent=1))


if __name__ == "__main__":
    exits.run(main)
