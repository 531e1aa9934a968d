"""Probes every layer of a model on a labeled store, and chooses layer and penalty (paper, Section 2.4).

Besides linear probes: nearest neighbors of every layer, and attention-pooled probes of one layer.

E examples, P layers (0 is the embedding, L the last block's output), D features, M masks of an example (1 unless the
model is masked), K classes.
"""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from igpt_jax import storage
from igpt_jax.checkpoint import Metadata, store_of
from igpt_jax.config import EvaluateConfig, ProbingConfig, ScalingConfig, UserError
from igpt_jax.config.data import ProbeDataConfig, common_splits
from igpt_jax.data import count_classes, order
from igpt_jax.data.store import Split, Store
from igpt_jax.evaluation import attention_probe, exact_loss, knn_probe, linear_probe
from igpt_jax.metrics.logging import say
from igpt_jax.model.dims import Dims
from igpt_jax.model.features import make_feature_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.storage.arrays import publish_arrays

PROBE = "probe.npz"
SGD_BATCH = 1024
CHOOSING = 1e-4  # tolerance of the solver where only held-out accuracies are compared


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Features and labels of three splits: train, held-out, test. Test features are [E, M, D], one under each mask."""
    features_ED: Sequence[np.ndarray]
    labels_E: Sequence[np.ndarray]

    def __getitem__(self, rows: np.ndarray) -> "Labeled":
        """The same, with only these rows of the training split."""
        return Labeled([self.features_ED[0][rows], *self.features_ED[1:]],
                        [self.labels_E[0][rows], *self.labels_E[1:]])


def _opened(path: str, config: ProbingConfig, image_size: int = 0) -> tuple[Store, list[Split]]:
    """The store to probe and its splits (train, held-out, test). image_size=0: images of any size.

    Raises UserError where it is missing, not one pixel store or of another image size, where a split is missing, or
    fitted and measured on, and where `limit` cuts off classes.
    """
    if len(storage.patterns(path)) > 1 or path.startswith("tfds:"):
        raise UserError(f"probes read one pixel store, not {path}. Name a labeled one in data.store; in evaluate and "
                        "scaling, in probing.data.store.")
    store, data = Store.open(path), config.data
    if store.image_size != (image_size or store.image_size):
        raise UserError(f"the store {store.path} holds images of {store.image_size} pixels, the model takes "
                        f"{image_size}. Prepare a store with image_size={image_size}.")
    for name, value in (("test", data.test), ("held_out", data.held_out)):
        if both := common_splits(data.train, value):
            raise UserError(f"data.{name}={value}: {both} is also fitted on (data.train={data.train}). Name another "
                            "split.")
    splits = [store.split(name) for name in data.splits]
    train, limit = splits[0], config.limit
    if 0 < limit < train.count and (held := len(np.unique(train.labels(np.arange(limit))))) < store.classes:
        raise UserError(f"limit={limit}: the first {limit:,} examples of split {train.name!r} have {held} of "
                        f"{store.classes} classes. Raise limit, or leave it out.")
    return store, splits


def check_store(path: str, config: ProbingConfig, image_size: int = 0) -> list[str]:
    """The fingerprints of the splits to probe. Raises UserError where they could not be; 0: images of any size."""
    _, splits = _opened(path, config, image_size)
    for split in splits:
        split.labels(np.arange(1))
    return [split.fingerprint for split in splits]


def say_if_optimistic(data: ProbeDataConfig) -> None:
    """Says so where the images that accuracies are measured on also select."""
    if (both := common_splits(data.test, data.held_out)) and jax.process_index() == 0:
        say(f"accuracies are optimistic: the images of {both!r} also choose the layer and the penalty")


def say_notes(config: EvaluateConfig | ScalingConfig) -> None:
    """What users of `probe`, `probing.*` and `completion*` should know, once no check can refuse the job any more."""
    if config.probe:
        say_if_optimistic(config.probing.data)
    elif config.probing != ProbingConfig():
        say(f"igpt_jax {config.job}: probing.* has no effect without --config.probe=True.")
    if config.without_effect:
        say(f"igpt_jax {config.job}: completion_* has no effect without --config.completions=K.")


class Prober:
    """Probes models on the train, held-out and test splits of one labeled store.

    Probes are fit on train. The penalty is chosen by held-out accuracy, fit again on both, and measured on test.

    Args:
      config: solver, penalties, layers and data.
      record: metadata of the checkpoint; its store is the default, its image size and codec are the model's.
      labels_per_class: required number of training examples of each class.

    Raises:
      UserError: the store does not match the checkpoint, has no labels, or too few of a class.
    """

    def __init__(self, config: ProbingConfig, record: Metadata, labels_per_class: int = 1):
        self.config, data = config, config.data
        store, self.splits = _opened(store_of(record, data.store), config, record.image_size)
        for split in self.splits:
            split.count = min(split.count, config.limit or split.count)
        self.labels = [split.labels(np.arange(split.count)) for split in self.splits]
        self.classes = count_classes(store, self.splits[0])
        self.class_names = tuple(store.manifest["class_names"])
        self._check_labels_per_class(labels_per_class)
        self._codec = record.codec

    @property
    def test_count(self) -> int:
        """Number of examples that accuracies are measured on."""
        return self.splits[2].count

    def _check_labels_per_class(self, wanted: int) -> None:
        """Raises UserError where a class has fewer training examples than `wanted`."""
        counts = np.bincount(self.labels[0])
        if wanted > counts.min():
            raise UserError(f"labels_per_class={wanted}: class {int(counts.argmin())} has only {counts.min()} examples "
                            f"in split {self.splits[0].name!r}. Ask for fewer.")

    def layers_of(self, model: Model) -> tuple[int, ...]:
        """The layers to probe. Raises UserError if the model has no such layer."""
        layers = self.config.layers or tuple(range(model.dims.L + 1))
        if not all(0 <= layer <= model.dims.L for layer in layers):
            raise UserError(f"layers={self.config.layers}: choose among 0 (the embedding) to {model.dims.L}.")
        return layers

    def features(self, model: Model, params: Any, mesh: Mesh, batch_size: int, what: str) -> list[np.ndarray]:
        """Features, float32, of the three splits at `layers_of(model)`: [E, P, D], and [E, M, P, D] of test."""
        layers = self.layers_of(model)

        def of_split(split: Split, masks: int) -> np.ndarray:
            masks = masks if model.objective.random else 1
            step = exact_loss.jit_over_batches(make_feature_step(model, self.config.features, masks, self.config.seed),
                                               model, mesh)
            out_EMPD = np.empty((split.count, masks, len(layers), model.dims.D), np.float32)
            at = 0
            with tqdm(total=split.count, unit="image", desc=f"{what}, {split.name}", disable=None) as bar:
                for batch_BMPD in exact_loss.over_split(step, params, split, mesh, batch_size, self._codec):
                    out_EMPD[at:at + len(batch_BMPD)] = batch_BMPD[:, :, layers]
                    at += len(batch_BMPD)
                    bar.update(len(batch_BMPD))
            return out_EMPD

        train, held_out, test = self.splits
        return [of_split(train, 1)[:, 0], of_split(held_out, 1)[:, 0], of_split(test, exact_loss.VIEWS)]

    def pixels(self) -> Labeled:
        """The raw pixels of the three splits as features."""
        train, held_out, test = (split.read(np.arange(split.count)).reshape(split.count, -1).astype(np.float32)
                                 for split in self.splits)
        return Labeled([train, held_out, test[:, None]], self.labels)

    def by_layer(self, features_EPD: Sequence[np.ndarray], layers: Sequence[int], what: str, kind: str = "linear"
                 ) -> tuple[list[dict[str, Any]], int, linear_probe.Probe | None]:
        """Probes each layer. Returns a row per layer, the index of the best by held-out accuracy, and its probe."""
        probes, rows = [], []
        for index, layer in enumerate(tqdm(layers, desc=f"probes, {what}", disable=None)):
            probe, figures = self.fit(Labeled([each[..., index, :] for each in features_EPD], self.labels), kind)
            probes.append(probe)
            rows.append({"features": f"{what} {layer}", "layer": layer, **figures})
        best = max(range(len(layers)), key=lambda index: rows[index]["held_out_accuracy"])
        return rows, best, probes[best]

    def columns(self, model: Model, params: Any, mesh: Mesh, batch_size: int) -> dict[str, Any]:
        """Probes each layer of a model. Returns the columns that tables of many models have: the best layer by held-out
        accuracy, its test accuracy and interval, the number of test examples, and the row of each layer."""
        features_EPD = self.features(model, params, mesh, batch_size, "features")
        by_layer, best, _ = self.by_layer(features_EPD, self.layers_of(model), "layer")
        chosen = by_layer[best]
        return {"probe_layer": chosen["layer"], "probe_accuracy": chosen["test_accuracy"],
                "probe_interval": chosen["interval"], "probe_examples": self.test_count, "accuracy_by_layer": by_layer}

    def row(self, data: Labeled, kind: str = "linear") -> dict[str, Any]:
        """Fits one probe and returns its figures."""
        return self.fit(data, kind)[1]

    def fit(self, data: Labeled, kind: str = "linear") -> tuple[linear_probe.Probe | None, dict[str, Any]]:
        """Chooses a penalty, fits the final probe, and returns it with its figures.

        With kind=knn it chooses the number of neighbors instead, and there is no probe.
        """
        return self._nearest(data) if kind == "knn" else self._linear(data)

    def _linear(self, data: Labeled) -> tuple[linear_probe.Probe, dict[str, Any]]:
        options = self.config.l2 if self.config.solver == "lbfgs" else self.config.rates
        probes = self._fit(data.features_ED[0], data.labels_E[0], options, tolerance=CHOOSING)
        held_out = [probe.accuracy(data.features_ED[1], data.labels_E[1]) for probe in probes]
        chosen = max(range(len(options)), key=lambda index: held_out[index])
        probe, = self._fit(*self._final(data), options[chosen:chosen + 1])
        return probe, self._figures(self.config.solver, options[chosen], held_out[chosen],
                                    probe.predict(data.features_ED[2]), data.labels_E[2])

    def _nearest(self, data: Labeled) -> tuple[None, dict[str, Any]]:
        (train_ED, held_out_ED, test_EMD), (train_E, held_out_E, test_E) = data.features_ED, data.labels_E
        options = knn_probe.neighbors_for(len(train_E))
        classes_RE = knn_probe.predict(train_ED, train_E, held_out_ED, self.classes, options)
        held_out = (classes_RE == held_out_E).mean(axis=1).tolist()
        chosen = max(range(len(options)), key=lambda index: held_out[index])
        classes_1E = knn_probe.predict(*self._final(data), test_EMD.reshape(-1, test_EMD.shape[-1]), self.classes,
                                       options[chosen:chosen + 1])
        classes_EM = classes_1E.reshape(test_EMD.shape[:2])
        return None, self._figures("knn", options[chosen], held_out[chosen], classes_EM, test_E)

    def attention(self, model: Model, params: Any, mesh: Mesh, batch_size: int, layer: int, rates: Sequence[float]
                  ) -> dict[str, Any]:
        """Fits attention-pooled probes of one layer to the training split. Returns the figures of the one whose
        learning rate has the best held-out accuracy."""
        frozen = attention_probe.Frozen(model, params, mesh, layer, self.config.features, batch_size, self._codec,
                                        self.config.seed)
        train, held_out, test = self.splits
        probes = attention_probe.fit(frozen, train, self.labels[0], self.classes, rates, self.config.steps)
        accuracies = (probes.predict(frozen, held_out)[:, 0] == self.labels[1][:, None]).mean(axis=0).tolist()
        chosen = max(range(len(rates)), key=lambda index: accuracies[index])
        views = exact_loss.VIEWS if model.objective.random else 1
        return self._figures("adamw", rates[chosen], accuracies[chosen],
                             probes[chosen].predict(frozen, test, views)[..., 0], self.labels[2])

    def _final(self, data: Labeled) -> list[np.ndarray]:
        """The features and labels of the final fit: train and held-out."""
        # Not those that the accuracy is measured on, where the config names held-out images as the test split.
        fitted = 1 if common_splits(self.config.data.test, self.config.data.held_out) else 2
        return [np.concatenate(each[:fitted]) for each in (data.features_ED, data.labels_E)]

    def _figures(self, solver: str, chosen: float, held_out: float, classes_EM: np.ndarray, labels_E: np.ndarray
                 ) -> dict[str, Any]:
        accuracy = self._test_accuracy(classes_EM, labels_E)
        return {"solver": solver, "chosen": chosen, "held_out_accuracy": held_out, "test_accuracy": accuracy,
                "interval": linear_probe.wilson(accuracy, len(labels_E))}

    def few_labels(self, data: Labeled, count: int, draws: int) -> dict[str, Any]:
        """Probes on `count` labels of each class, drawn `draws` times. Returns mean and deviation of test accuracy."""
        accuracies = []
        for draw in range(draws):
            random = np.random.default_rng([self.config.seed, count, draw])
            few = data[np.concatenate([random.permutation(np.flatnonzero(data.labels_E[0] == label))[:count]
                                       for label in range(self.classes)])]
            probes = linear_probe.fit(few.features_ED[0], few.labels_E[0], self.classes, self.config.l2,
                                      CHOOSING)
            chosen = max(probes, key=lambda probe: probe.accuracy(few.features_ED[1], few.labels_E[1]))
            accuracies.append(self._test_accuracy(chosen.predict(few.features_ED[2]), few.labels_E[2]))
        return {"solver": "lbfgs", "test_accuracy": float(np.mean(accuracies)),
                "deviation": float(np.std(accuracies, ddof=1)) if draws > 1 else None, "draws": accuracies}

    def _test_accuracy(self, classes_EM: np.ndarray, labels_E: np.ndarray) -> float:
        """The accuracy of the majority over the masks of each example."""
        return float((exact_loss.majority(classes_EM, self.classes, self.config.seed) == labels_E).mean())

    def _fit(self, features_ED: np.ndarray, labels_E: np.ndarray, options: Sequence[float],
             tolerance: float = 1e-6) -> list[linear_probe.Probe]:
        if self.config.solver == "lbfgs":
            return linear_probe.fit(features_ED, labels_E, self.classes, options, tolerance)
        return linear_probe.fit_sgd(features_ED, labels_E, self.classes, options, self._batches(len(labels_E)),
                                    self.config.steps)

    def _batches(self, count: int) -> Iterator[np.ndarray]:
        return (order.batch(self.config.seed, step, min(SGD_BATCH, count), count) for step in range(self.config.steps))


class SavedProbe(NamedTuple):
    """The classifier that a probe job saved."""
    probe: linear_probe.Probe
    layer: int
    kind: str  # of the features that it reads
    checkpoint: str  # `checkpoint.identity` of the step that it was fit on; empty in probes of former versions
    class_names: tuple[str, ...] = ()  # of its store; empty where that has none

    def fits(self, dims: Dims, identity: str) -> bool:
        """Whether the probe can be of a model with these dims and, unless it is empty, this identity."""
        return (len(self.probe.mean_D) == dims.D and self.layer <= dims.L
                and (not identity or self.checkpoint in ("", identity)))


def save_probe(file: storage.Path, saved: SavedProbe) -> None:
    """Writes a probe as .npz."""
    arrays = {name: array.astype(np.float32) for name, array in dataclasses.asdict(saved.probe).items()}
    publish_arrays(file, layer=saved.layer, kind=saved.kind, checkpoint=saved.checkpoint,
                   class_names=np.array(saved.class_names, np.str_), **arrays)


def load_probe(workdir: str) -> SavedProbe:
    """The probe that a probe job saved. Raises UserError if there is none."""
    file = storage.path(workdir) / PROBE
    try:
        with np.load(io.BytesIO(storage.read(file))) as given:
            probe = linear_probe.Probe(*(given[field.name] for field in dataclasses.fields(linear_probe.Probe)))
            return SavedProbe(probe, int(given["layer"]), str(given["kind"]),
                              str(given["checkpoint"]) if "checkpoint" in given else "",
                              tuple(given["class_names"].tolist()) if "class_names" in given else ())
    except (ValueError, TypeError, RuntimeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} is not a probe written by the probe job: {error}. Give a workdir of probe.") from None
