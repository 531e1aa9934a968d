"""The probe's solver beside scikit-learn's LogisticRegression, on the same features, in turn.

    python benchmarks/probe.py [--examples 10000] [--dims 512] [--classes 10] [--layers 25] [--json FILE]

Features of each layer are synthetic and correlated, as a network's are. scikit-learn solves in float32 and in float64,
to a tolerance at which its objective is no lower than ours. Prints seconds, their ratio, and how the optima differ.
"""

import argparse
import json
import pathlib
import time

import numpy as np
from sklearn.linear_model import LogisticRegression

from igpt_jax import linear_probe


def features(examples: int, dims: int, classes: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [E, D] whose principal deviations fall off exponentially, and labels that depend on them with noise."""
    random = np.random.default_rng(layer)
    mix_DD = random.normal(size=(dims, dims)) * np.exp(-np.arange(dims) * 8 / dims)[:, None]
    x_ED = random.normal(size=(examples, dims)) @ mix_DD / dims ** 0.5 + 0.05 * random.normal(size=(examples, dims))
    logits_EK = 2 * x_ED @ random.normal(size=(dims, classes)) + 2 * random.gumbel(size=(examples, classes))
    return x_ED.astype(np.float32), logits_EK.argmax(1)


def objective(x_ED: np.ndarray, labels_E: np.ndarray, weights_DK: np.ndarray, biases_K: np.ndarray,
              strength: float) -> float:
    """Mean cross entropy + strength / 2 |weights|^2 in float64."""
    logits_EK = x_ED.astype(np.float64) @ weights_DK.astype(np.float64) + biases_K
    logits_EK -= logits_EK.max(axis=1, keepdims=True)
    entropy = np.log(np.exp(logits_EK).sum(axis=1)) - logits_EK[np.arange(len(labels_E)), labels_E]
    return float(entropy.mean() + strength / 2 * np.square(weights_DK, dtype=np.float64).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("examples", 10_000), ("dims", 512), ("classes", 10), ("layers", 25)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--strength", type=float, default=1e-3)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of scikit-learn's gradient")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    strength, classes = arguments.strength, arguments.classes
    rows = []
    for layer in range(arguments.layers):
        x_ED, labels_E = features(arguments.examples, arguments.dims, classes, layer)
        if layer == 0:
            linear_probe.fit(x_ED, labels_E, classes, (strength,))  # compiles
        start = time.perf_counter()
        (probe,) = linear_probe.fit(x_ED, labels_E, classes, (strength,))
        row = {"layer": layer, "ours_seconds": time.perf_counter() - start}
        standard_ED = (x_ED - probe.mean_D) / probe.deviation_D
        ours = objective(standard_ED, labels_E, probe.weights_DK, probe.biases_K, strength)
        for dtype in (np.float32, np.float64):
            start = time.perf_counter()
            theirs = LogisticRegression(C=1 / (strength * len(x_ED)), tol=arguments.tolerance, max_iter=5000).fit(
                standard_ED.astype(dtype), labels_E)
            name = f"sklearn_{np.dtype(dtype).name}"
            row[f"{name}_seconds"] = time.perf_counter() - start
            value = objective(standard_ED, labels_E, theirs.coef_.T, theirs.intercept_, strength)
            row[f"{name}_objective_above_ours"] = value / ours - 1
            row[f"{name}_same_predictions"] = float((theirs.predict(standard_ED) == probe.predict(x_ED)).mean())
        rows.append(row)
        print({name: float(f"{value:.4g}") for name, value in row.items()}, flush=True)
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_seconds")}
    for name, seconds in total.items():
        print(f"{name:28} {seconds:8.2f} s  {seconds / total['ours_seconds']:6.2f} x")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
