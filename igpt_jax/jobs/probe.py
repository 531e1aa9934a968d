"""Fits a linear probe to every layer of a checkpoint: how well do its features classify? (Paper, Sections 2.4, 4.)

kind=knn also classifies by nearest neighbors at every layer, kind=attention by attention pooling at the best layer.

Writes probe.json and probe.csv with a row per probe, figures/accuracy_by_layer.png, and probe.npz, the classifier of
the best layer.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import checkpoint, storage
from igpt_jax.config import ProbeConfig
from igpt_jax.evaluation.probing import PROBE, Labeled, Prober, SavedProbe, save_probe, say_if_optimistic
from igpt_jax.metrics import charts, figures
from igpt_jax.metrics.logging import say
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.storage import side_files, tables

Row = dict[str, Any]

NAMES = {"knn": "kNN", "attention": "attention pooling"}
HELD_OUT = operator.itemgetter("held_out_accuracy")


def run(config: ProbeConfig, workdir: str) -> dict[str, Any]:
    """Fits all probes. Returns `accuracy_by_layer` (test), `best_layer` (by held-out accuracy), its `test_accuracy`,
    `raw_pixel_accuracy` and `untrained_accuracy`. Other kinds add `knn_accuracy` of the best layer, `knn_layer`, or
    `attention_accuracy` of the best linear layer, `attention_layer`.

    Raises:
      UserError: the checkpoint is missing or has another objective; or the data does not fit it, or has no labels or
        too few per class.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    model, params, metadata = checkpoint.load_model(config.checkpoint, mesh, config.precision, config.attention,
                                                    config.parameters, config.compiler_options)
    checkpoint.require_objective(metadata, config.objective, config.checkpoint)
    step = checkpoint.step_path(checkpoint.locate(config.checkpoint)[0], metadata.steps_done)
    # Now, since its run may remove the step meanwhile.
    identity = checkpoint.from_process_0(lambda: checkpoint.identity(str(step), config.parameters))
    prober = Prober(config, metadata, max(config.labels_per_class, default=1))
    layers = prober.layers_of(model)
    say_if_optimistic(config.data)

    features_EPD = prober.features(model, params, mesh, config.batch_size, "features")
    by_layer, best, best_probe = prober.by_layer(features_EPD, layers, "layer")
    rows = list(by_layer)
    metrics = {"accuracy_by_layer": {str(row["layer"]): row["test_accuracy"] for row in rows},
               "best_layer": layers[best], "test_accuracy": rows[best]["test_accuracy"],
               "compiler_options": model.compiler_options}
    curves, baselines = [("linear", "linear probes, 95 % intervals", by_layer)], {}

    if of_kind := _of_kind(config, prober, model, params, mesh, features_EPD, rows[best], "layer"):
        rows += of_kind
        chosen = max(of_kind, key=HELD_OUT)
        metrics |= {f"{config.kind}_layer": chosen["layer"], f"{config.kind}_accuracy": chosen["test_accuracy"]}
        curves.append((config.kind, NAMES[config.kind], of_kind))
    if config.concatenate > 1:
        # The best layer and its neighbors, concatenated to one feature vector, as the paper does for iGPT-XL.
        around = [index for index in range(len(layers)) if abs(index - best) <= config.concatenate // 2]
        data = Labeled([each[..., around, :].reshape(*each.shape[:-2], -1) for each in features_EPD], prober.labels)
        rows.append({"features": f"layers {', '.join(str(layers[index]) for index in around)}", **prober.row(data)})
    data = Labeled([each[..., best, :] for each in features_EPD], prober.labels)
    rows += _few_labels(config, prober, data, f"layer {layers[best]}")
    if config.baselines:
        rows += (found := _baselines(config, prober, model, params, mesh, layers))
        baselines = {row["features"]: row["test_accuracy"] for row in found[:2]}
        metrics["raw_pixel_accuracy"], metrics["untrained_accuracy"] = baselines.values()

    if jax.process_index() == 0:
        width = max(32, *(len(row["features"]) for row in rows))
        for row in rows:
            low, high = row.get("interval", (None, None))
            spread = f"[{low:.2%}, {high:.2%}]" if low is not None else f"+- {row['deviation'] or 0:.2%}"
            say(f"{row['features']:{width}} {row['test_accuracy']:7.2%} {spread}")
        folder = storage.path(workdir)
        side_files.no_longer_done(folder)
        tables.publish(folder, "probe", rows)
        save_probe(folder / PROBE, SavedProbe(best_probe, layers[best], config.features, identity, prober.class_names))
        figures.save(folder / "figures" / "accuracy_by_layer.png",
                     charts.accuracy_by_layer(curves, baselines, prober.test_count))
    return metrics


def _baselines(config: ProbeConfig, prober: Prober, model: Model, params: Any, mesh: Mesh, layers: Sequence[int]
               ) -> list[Row]:
    """The rows of the raw pixels and of the best layer of an untrained copy of the model: linear probes, then those of
    `kind` and of few labels."""
    untrained = jax.jit(model.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params))(
        jax.random.key(config.seed))
    features_EPD = prober.features(model, untrained, mesh, config.batch_size, "untrained")
    found, best, _ = prober.by_layer(features_EPD, layers, "untrained model, layer")
    pixels = prober.pixels()
    rows = [{"features": "raw pixels", **prober.row(pixels)}, found[best]]
    if config.kind == "knn":
        rows.append({"features": "kNN, raw pixels", **prober.row(pixels, "knn")})
    if of_kind := _of_kind(config, prober, model, untrained, mesh, features_EPD, found[best], "untrained model, layer"):
        rows.append(max(of_kind, key=HELD_OUT))
    data = Labeled([each[..., best, :] for each in features_EPD], prober.labels)
    return (rows + _few_labels(config, prober, pixels, "raw pixels")
            + _few_labels(config, prober, data, found[best]["features"]))


def _few_labels(config: ProbeConfig, prober: Prober, data: Labeled, what: str) -> list[Row]:
    """The rows of linear probes fit on `labels_per_class` images of each class."""
    return [{"features": f"{what}, {count} labels per class", **prober.few_labels(data, count, config.draws)}
            for count in config.labels_per_class]


def _of_kind(config: ProbeConfig, prober: Prober, model: Model, params: Any, mesh: Mesh,
             features_EPD: Sequence[np.ndarray], best: Row, what: str) -> list[Row]:
    """The rows of the probes that `kind` adds to the linear probes of a model.

    Args:
      features_EPD: of the model.
      best: the row of its best linear probe.
      what: its layers, as the table names them.
    """
    what = f"{NAMES.get(config.kind)}, {what}"
    if config.kind == "knn":
        return prober.by_layer(features_EPD, prober.layers_of(model), what, "knn")[0]
    if config.kind == "attention":
        layer = checkpoint.of_process_0(best["layer"])  # the other processes' fits may differ in the last bit
        found = prober.attention(model, params, mesh, config.batch_size, layer, config.attention_rates)
        return [{"features": f"{what} {layer}", "layer": layer, **found}]
    return []
