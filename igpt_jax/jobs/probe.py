"""Linear probes of every layer: what a checkpoint knows of the classes, and where (paper, Sections 2.4 and 4).

Writes probe.json and probe.csv, a row per probe, and the accuracy by layer as a figure.

E examples, P places in the stream (L + 1), D features, M masks of an example (1 but of masked models), K classes.
"""

import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from igpt_jax import checkpoint, evaluation, figures, linear_probe, palette, runtime, sharding, storage, telemetry
from igpt_jax.config import ProbeConfig, UserError
from igpt_jax.data import count_classes, order
from igpt_jax.data.store import Split, Store
from igpt_jax.features import make_feature_step
from igpt_jax.model import Model

SGD_BATCH = 1024
CHOOSING = 1e-4  # tolerance of the solver where only held-out accuracies are compared


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Features and labels of the three splits, in the order train, held-out, test; features of the test split are
    [E, M, D], under each mask."""
    features_ED: list[np.ndarray]
    labels_E: list[np.ndarray]

    def __getitem__(self, rows: np.ndarray) -> "Labelled":
        """With these rows of the training examples only."""
        return Labelled([self.features_ED[0][rows], *self.features_ED[1:]],
                        [self.labels_E[0][rows], *self.labels_E[1:]])


def run(config: ProbeConfig, workdir: str) -> dict[str, Any]:
    """Probes. Returns `accuracy_by_layer` (test), `best_layer` (by held-out accuracy), its `test_accuracy`,
    `raw_pixel_accuracy` and `untrained_accuracy`.

    Raises:
      UserError: the checkpoint is missing or of another objective, the data does not fit it, has no labels, or too
        few of a class.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    model, params, record = checkpoint.load_model(config.checkpoint, mesh, config.precision, config.attention)
    checkpoint.require_objective(record, config.objective, config.checkpoint)
    store = Store.open(config.data.store or record.config.data.store)
    if store.image_size != record.image_size:
        raise UserError(f"the store {store.path} holds images of {store.image_size} pixels, the model takes "
                        f"{record.image_size}. Prepare a store with image_size={record.image_size}.")
    splits = [store.split(name) for name in (config.data.train, config.data.held_out, config.data.test)]
    labels = [split.labels(np.arange(split.count)) for split in splits]
    classes = count_classes(store, splits[0])
    _check_labels_per_class(labels[0], splits[0].name, config)
    table = palette.lookup_table(record.palette_VC)
    layers = config.layers or tuple(range(model.dims.L + 1))
    if not all(0 <= layer <= model.dims.L for layer in layers):
        raise UserError(f"layers={config.layers}: the model has places 0 (the embedding) to {model.dims.L}.")

    fit = _Fit(config, classes)

    def features(params: Any, what: str) -> list[np.ndarray]:
        train_EMPD, held_out_EMPD, test_EMPD = (
            _features(model, params, split, config, mesh, table, layers, f"{what}, {split.name}", masks)
            for split, masks in zip(splits, (1, 1, evaluation.VOTES), strict=True))
        return [train_EMPD[:, 0], held_out_EMPD[:, 0], test_EMPD]

    def probe_layers(features_EPD: list[np.ndarray], what: str) -> tuple[list[dict[str, Any]], int]:
        """A row per layer, and the index of the best by held-out accuracy."""
        found = [{"features": f"{what} {layer}", "layer": layer,
                  **fit.row(Labelled([each[..., index, :] for each in features_EPD], labels))}
                 for index, layer in enumerate(tqdm(layers, desc=f"probes, {what}", disable=None))]
        return found, max(range(len(layers)), key=lambda index: found[index]["held_out_accuracy"])

    features_EPD = features(params, "features")
    by_layer, best = probe_layers(features_EPD, "layer")
    rows = list(by_layer)
    metrics = {"accuracy_by_layer": {str(row["layer"]): row["test_accuracy"] for row in rows},
               "best_layer": layers[best], "test_accuracy": rows[best]["test_accuracy"]}

    if config.concatenate > 1:
        around = [index for index in range(len(layers)) if abs(index - best) <= config.concatenate // 2]
        data = Labelled([each[..., around, :].reshape(*each.shape[:-2], -1) for each in features_EPD], labels)
        rows.append({"features": f"layers {', '.join(str(layers[index]) for index in around)}", **fit.row(data)})
    data = Labelled([each[..., best, :] for each in features_EPD], labels)
    for count in config.labels_per_class:
        rows.append({"features": f"layer {layers[best]}, {count} labels per class", **fit.few_labels(data, count)})
    if config.baselines:
        pixels = [split.read(np.arange(split.count)).reshape(split.count, -1).astype(np.float32) for split in splits]
        rows.append({"features": "raw pixels", **fit.row(Labelled([*pixels[:2], pixels[2][:, None]], labels))})
        metrics["raw_pixel_accuracy"] = rows[-1]["test_accuracy"]
        untrained = jax.jit(model.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params))(
            jax.random.key(config.seed))
        found, index = probe_layers(features(untrained, "untrained"), "untrained model, layer")
        rows.append(found[index])
        metrics["untrained_accuracy"] = rows[-1]["test_accuracy"]

    _report(workdir, rows, by_layer, splits[2].count)
    return metrics


def _check_labels_per_class(labels_E: np.ndarray, split: str, config: ProbeConfig) -> None:
    """Raises UserError where a class has fewer training examples than `labels_per_class` asks for."""
    counts = np.bincount(labels_E)
    if max(config.labels_per_class, default=0) > counts.min():
        raise UserError(f"labels_per_class={max(config.labels_per_class)}: class {int(counts.argmin())} has only "
                        f"{counts.min()} examples in split {split!r}. Ask for fewer.")


def _features(model: Model, params: Any, split: Split, config: ProbeConfig, mesh: Any, table: np.ndarray,
              layers: tuple[int, ...], what: str, masks: int) -> np.ndarray:
    """Features float32 [E, M, P, D] of a whole split, at the places `layers`; M is 1 unless the model is masked."""
    masks = 1 if model.causal else masks
    step = evaluation.jit_over_batches(make_feature_step(model, config.features, masks, config.seed), mesh)
    out = np.empty((split.count, masks, len(layers), model.dims.D), np.float32)
    at = 0
    with tqdm(total=split.count, unit="image", desc=what, disable=None) as bar:
        for batch_BMPD in evaluation.over_split(step, params, split, mesh, config.batch_size, table):
            out[at:at + len(batch_BMPD)] = batch_BMPD[:, :, layers]
            at += len(batch_BMPD)
            bar.update(len(batch_BMPD))
    return out


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How a row of the table is made: fit on train, choose on held-out, fit on both, count on test."""
    config: ProbeConfig
    classes: int

    def row(self, data: Labelled) -> dict[str, Any]:
        options = self.config.strengths if self.config.solver == "lbfgs" else self.config.rates
        probes = self._fit(data.features_ED[0], data.labels_E[0], options, tolerance=CHOOSING)
        held_out = [probe.accuracy(data.features_ED[1], data.labels_E[1]) for probe in probes]
        chosen = max(range(len(options)), key=lambda index: held_out[index])
        both = [np.concatenate(each[:2]) for each in (data.features_ED, data.labels_E)]
        probe, = self._fit(*both, options[chosen:chosen + 1])
        accuracy = self._test_accuracy(probe, data)
        return {"solver": self.config.solver, "chosen": options[chosen], "held_out_accuracy": held_out[chosen],
                "test_accuracy": accuracy, "interval": linear_probe.wilson(accuracy, len(data.labels_E[2]))}

    def few_labels(self, data: Labelled, count: int) -> dict[str, Any]:
        """`count` labels of each class, drawn several times: fit on those, choose on held-out, count on test."""
        rows = []
        for draw in range(self.config.draws):
            random = np.random.default_rng([self.config.seed, count, draw])
            few = data[np.concatenate([random.permutation(np.flatnonzero(data.labels_E[0] == label))[:count]
                                       for label in range(self.classes)])]
            probes = linear_probe.fit(few.features_ED[0], few.labels_E[0], self.classes, self.config.strengths,
                                      CHOOSING)
            chosen = max(probes, key=lambda probe: probe.accuracy(few.features_ED[1], few.labels_E[1]))
            rows.append(self._test_accuracy(chosen, few))
        return {"solver": "lbfgs", "test_accuracy": float(np.mean(rows)), "deviation": float(np.std(rows, ddof=1))
                if len(rows) > 1 else None, "draws": rows}

    def _test_accuracy(self, probe: linear_probe.Probe, data: Labelled) -> float:
        votes_EM = probe.predict(data.features_ED[2])
        classes_E = evaluation.majority(votes_EM, self.classes, self.config.seed)
        return float((classes_E == data.labels_E[2]).mean())

    def _fit(self, features_ED: np.ndarray, labels_E: np.ndarray, options: tuple[float, ...],
             tolerance: float = 1e-6) -> list[linear_probe.Probe]:
        if self.config.solver == "lbfgs":
            return linear_probe.fit(features_ED, labels_E, self.classes, options, tolerance)
        return linear_probe.fit_sgd(features_ED, labels_E, self.classes, options, self._batches(len(labels_E)),
                                    self.config.steps)

    def _batches(self, count: int) -> Iterator[np.ndarray]:
        return (order.batch(self.config.seed, step, min(SGD_BATCH, count), count) for step in range(self.config.steps))


def _report(workdir: str, rows: list[dict[str, Any]], by_layer: list[dict[str, Any]], test_count: int) -> None:
    if jax.process_index() != 0:
        return
    for row in rows:
        low, high = row.get("interval", (None, None))
        spread = f"[{low:.2%}, {high:.2%}]" if low is not None else f"+- {row['deviation'] or 0:.2%}"
        telemetry.say(f"{row['features']:32} {row['test_accuracy']:7.2%} {spread}")
    folder = storage.path(workdir)
    storage.publish(folder / "probe.json", runtime.to_json(rows))
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    storage.publish(folder / "probe.csv", text.getvalue())
    others = {row["features"]: row["test_accuracy"] for row in rows if row["features"].startswith(("raw", "untrained"))}
    figures.accuracy_curve(folder / "figures" / "accuracy_by_layer.png", by_layer, others, test_count)
