"""The Python interface: load a trained model; features, losses, samples, completions and classes in one call each.

    import igpt_jax

    model = igpt_jax.load("runs/pretrain")
    features = model.features("digit.png")                 # float32 [1, D], of the best layer
    nats = model.nats("digit.png")                         # float32 [1], nats per pixel
    samples = model.sample(4, temperature=0.9)             # uint8 [4, Y, X, 3]
    completed = model.complete("digit.png", rows=4, n=6)   # uint8 [1, 6, Y, X, 3]

Images are uint8 arrays [N, H, W, 3], Pillow's images or paths, of any size: each is cut to the largest centered square
and reduced to the model's size by area averaging (data/images.py). Results are NumPy arrays.

N images, n drawings, H and W height and width of a picture, Y = X the model's image size, T tokens, V vocabulary,
L layers, D embed, K classes, B batch.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import checkpoint, storage, weights
from igpt_jax.checkpoint import Metadata
from igpt_jax.config import MeshConfig, SampleConfig, SampleMeshConfig, UserError
from igpt_jax.config.keys import PRECISIONS, at_least, one_of
from igpt_jax.config.training import PARAMETERS
from igpt_jax.data.pictures import Pictures, pixels
from igpt_jax.data.store.manifest import load_manifest
from igpt_jax.data.token_file import Tokens
from igpt_jax.evaluation import exact_loss, loss_maps
from igpt_jax.evaluation.drawing import UNKNOWN, Drawing, default_batch_size, pairs, require_causal
from igpt_jax.evaluation.probing import PROBE, SavedProbe, load_probe
from igpt_jax.evaluation.steps import make_class_step, make_eval_step
from igpt_jax.model.features import KINDS, make_feature_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.runtime import startup
from igpt_jax.runtime.precision import in_precision
from igpt_jax.weights import ours

Path = str | os.PathLike


def load(path: Path, step: int | None = None, *, device: jax.Device | str | None = None,
         mesh: Mesh | MeshConfig | Mapping[str, int] | None = None, precision: str = "float32",
         attention: str = "auto", batch_size: int = 0, palette: Path = "", probe: Path = "",
         parameters: str = "raw") -> "ImageModel":
    """Loads a trained model.

    Args:
      path: a workdir of pretrain or finetune (its newest good step), one step of it (DIR/checkpoints/STEP),
        `huggingface:DIR` or `openai:PREFIX`.
      step: of the workdir; None: the newest.
      device: to run on: 'cpu', 'gpu', 'tpu' or one of jax.devices(); None: all local devices of JAX's default platform,
        each with a copy of the weights.
      mesh: instead of `device`, sizes of the mesh axes, such as {"data": 1, "fsdp": 8} where one device is too small.
      precision: of activations and matrix products: float32, bfloat16 or float64.
      attention: the attention back-end.
      batch_size: most images computed at once; 0: 16 on CPU, 64 elsewhere. It changes no result.
      palette: a palette's .npy, for weights that come without one, such as OpenAI's.
      probe: workdir of the probe job whose classifier and layer to use; empty: that of a workdir beside this one which
        probed this very step, if there is one.
      parameters: raw, or ema: their moving average, of a run with optimizer.ema.

    Raises:
      UserError: there is no such checkpoint, it is damaged, it holds no moving average, or it does not fit the devices
        or the probe.
    """
    one_of(*PRECISIONS)("precision", precision)
    one_of(*PARAMETERS)("parameters", parameters)
    at_least(0)("batch_size", batch_size)
    startup.find_devices()
    path, on, beside = os.fspath(path), _mesh(device, mesh), []
    with in_precision(precision):
        if path.startswith(("huggingface:", "openai:")):
            if step is not None:
                raise UserError(f"step={step}: {path} is not a workdir with steps. Leave step out.")
            model, params, metadata = _foreign(path, on, precision, attention, os.fspath(palette), parameters)
            source, identity = path, ""
        else:
            folder, steps = checkpoint.steps_of(path)
            if step is not None and step not in steps:
                raise UserError(f"step={step}: {path} has the steps {', '.join(map(str, steps))}. Name one of them.")
            wanted = path if step is None else str(checkpoint.step_path(folder, step))
            model, params, metadata = checkpoint.load_model(wanted, on, precision, attention, parameters)
            done = metadata.steps_done
            source = path if storage.path(path).name == str(done) else f"{path} step {done}"
            identity = checkpoint.identity(str(checkpoint.step_path(folder, done)), parameters)
            with contextlib.suppress(UserError, OSError):  # not readable; the probe is optional
                beside = storage.children(storage.absolute(storage.path(folder)).parent.parent)
    saved = _given_probe(os.fspath(probe), model, identity) if probe else _probe_of(identity, beside)
    return ImageModel(model, params, metadata, on, source, precision, batch_size or default_batch_size(on), saved)


def _mesh(device: jax.Device | str | None, mesh: Mesh | MeshConfig | Mapping[str, int] | None) -> Mesh:
    if device is not None and mesh is not None:
        raise UserError("device and mesh are both given. Give one of them.")
    if isinstance(mesh, Mesh):
        return mesh
    if device is not None:
        try:
            devices = [jax.local_devices(backend=str(device))[0] if not isinstance(device, jax.Device) else device]
        except RuntimeError as error:
            raise UserError(f"device={device!r}: {' '.join(str(error).split())}. Use one of jax.devices().") from None
        return sharding.make_mesh(MeshConfig(), devices)
    try:
        sizes = mesh if isinstance(mesh, MeshConfig) else SampleMeshConfig(**(mesh or {}))
    except TypeError:
        raise UserError(f"mesh={mesh!r} must map mesh axes to sizes. Axes: {', '.join(sharding.AXES)}.") from None
    return sharding.make_mesh(sizes, jax.local_devices())


def _foreign(path: str, mesh: Mesh, precision: str, attention: str, palette: str, parameters: str
             ) -> tuple[Model, dict[str, Any], Metadata]:
    """A model of Hugging Face's or OpenAI's files, as the convert job would write it."""
    source = weights.open_weights(*weights.kind_and_path("path", path), parameters)
    record = ours.record_for(source, weights.palette_for(source, path, palette, "palette"))
    weights.refuse_non_square(source, path)
    model = Model.of(record.config, record.codec.vocabulary, record.image_size, mesh, record.classes, precision,
                     attention)
    params = ours.parameters(source, lambda shape, name: np.empty(shape, np.float32))
    like = model.abstract_parameters()
    on = sharding.parameter_shardings(like, mesh)
    return model, jax.tree.map(lambda array, leaf, to: jax.device_put(array.astype(leaf.dtype), to), params, like,
                               on), record


def _probe_of(identity: str, folders: list[storage.Path]) -> SavedProbe | None:
    """The probe of the step with this identity, from the first of the folders that has one."""
    for folder in folders:
        with contextlib.suppress(UserError, OSError):  # not a probe, or an unreadable one
            if (folder / PROBE).exists() and (saved := load_probe(str(folder))).checkpoint == identity:
                return saved
    return None


def _given_probe(workdir: str, model: Model, identity: str) -> SavedProbe:
    saved = load_probe(workdir)
    if not saved.fits(model.dims, identity):
        raise UserError(f"probe={workdir} is a probe of another checkpoint. Probe this one: python -m igpt_jax probe "
                        f"--workdir=... --config.checkpoint=...")
    return saved


class ImageModel:
    """A trained model on its devices. Each method compiles on its first call, once per size of batch.

    A batch is the number of images rounded up to a power of two, at most `batch_size`; the padding is dropped.

    Attributes:
      source: where it was loaded from.
      metadata: of the checkpoint: the run's config, palette and metrics.
      image_size: Y and X, pixels.
      layers: L; `features` has layers 0 (the embedding) to L.
      probe: the classifier of a probe job; None if there is none.
      best_layer: the layer that the probe chose by held-out accuracy; without a probe the middle one, L // 2 (features
        classify best about there: paper, Section 4.1).
    """

    def __init__(self, model: Model, params: Any, metadata: Metadata, mesh: Mesh, source: str, precision: str,
                 batch_size: int, probe: SavedProbe | None):
        self.source, self.metadata, self.probe = source, metadata, probe
        self.image_size, self.layers = metadata.image_size, model.dims.L
        self.best_layer = probe.layer if probe else self.layers // 2
        self._model, self._params, self._mesh = model, params, mesh
        self._precision, self._batch_size = precision, batch_size
        # Compiled steps, in a cache of this model alone, so that they end with it.
        self._step, self._drawing = functools.cache(self._make_step), functools.cache(self._make_drawing)

    def __repr__(self) -> str:
        dims, device = self._model.dims, self._mesh.devices.flat[0]
        return (f"ImageModel({self.source}: {dims.L} layers, width {dims.D}, {self.image_size}x{self.image_size} "
                f"pixels, {self.metadata.codec}, on {self._mesh.size} {device.platform})")

    @property
    def guessing(self) -> float:
        """The loss of uniform guessing, nats per pixel."""
        return self._model.dims.C * math.log(self._model.dims.V)

    @property
    def causal(self) -> bool:
        """Whether it predicts each pixel from those before it, and so draws images."""
        return self._model.causal

    @property
    def classifier(self) -> str:
        """What `classify` uses: the fine-tuned head, a probe, or nothing (empty)."""
        if self._model.dims.K:
            return "fine-tuned head"
        return f"linear probe of layer {self.probe.layer}" if self.probe else ""

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes: of the store that the classifier was trained on, or else their numbers; empty where
        `classify` has no classifier."""
        if self.probe and not self._model.dims.K:
            count, names = len(self.probe.probe.biases_K), self.probe.class_names
        else:
            count, names = self._model.dims.K, ()
            with contextlib.suppress(UserError, OSError):
                names = (load_manifest(storage.path(checkpoint.store_of(self.metadata))) or {}).get("class_names", ())
        return tuple(names) if len(names) == count else tuple(map(str, range(count)))

    def quantize(self, images: Pictures) -> np.ndarray:
        """Images as the model sees them, uint8 [N, Y, X, 3]: of its size, in the colors of its codec."""
        return self._pictures(self._tokens(images))

    def features(self, images: Pictures, layer: int | Literal["best", "all"] = "best",
                 kind: Literal["", "normalized", "residual"] = "") -> np.ndarray:
        """Features of images: means over the pixels of a layer's activations, as the probe job classifies.

        Args:
          images: N images.
          layer: 0 (the embedding) to L, or from the last, -1; 'best': `best_layer`; 'all'.
          kind: normalized: after the next norm, as in the paper; residual: the stream itself; empty: the probe's, or
            normalized. A masked model sees one view of each image, with random pixels hidden.

        Returns:
          float32 [N, D]; [N, L + 1, D] of all layers.
        """
        kind = kind or (self.probe.kind if self.probe else "normalized")
        one_of(*KINDS)("kind", kind)
        features_NPD = self._compute("features", kind, self._tokens(images))[:, 0]
        if layer == "all":
            return features_NPD
        index = self.best_layer if layer == "best" else layer
        if not isinstance(index, int | np.integer) or not -self.layers - 1 <= index <= self.layers:
            raise UserError(f"layer={layer!r} must be 'best', 'all' or 0 (the embedding) to {self.layers}.")
        return features_NPD[:, index]

    def nats(self, images: Pictures, per_pixel: bool = False) -> np.ndarray:
        """How well the model predicts images: negative log likelihood in nats per pixel. Divide by ln 2 for bits, and
        with codec=rgb by 3 for bits per dimension.

        Args:
          images: N images.
          per_pixel: the loss map instead: nats of each pixel, given those before it.

        Returns:
          float32 [N], the mean over all pixels; of a masked model over the hidden ones; of a diffusion model an upper
          bound, estimated from five random views. [N, Y, X] per pixel. float64 at precision float64.

        Raises:
          UserError: a loss map of a model that is not autoregressive.
        """
        if not self.causal:
            if per_pixel:
                raise UserError("per_pixel=True: only an autoregressive model predicts each pixel from those before. "
                                "Leave per_pixel out.")
            return self._compute("nats", "", self._tokens(images))["nats_per_pixel"]
        self._require_pixel_head()
        nats_NT = self._compute("loss maps", "", self._tokens(images))
        nats_NYX = nats_NT.reshape(-1, self.image_size, self.image_size, self._model.dims.C).sum(axis=-1)
        return nats_NYX if per_pixel else nats_NYX.mean(axis=(1, 2))

    def sample(self, n: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
               ) -> np.ndarray:
        """Draws images from nothing, as the sample job does with the same seed.

        Args:
          n: how many.
          temperature: divisor of the logits; 0: always the most likely color.
          top_k: draws from so many most likely colors; 0: from all.
          top_p: draws from the most likely colors that together have this probability.
          seed: another one draws other images.

        Returns:
          uint8 [n, Y, X, 3].
        """
        self._check_drawing(n, 0, temperature, top_k, top_p, seed)
        return self._pictures(self._draw("samples", np.zeros((n, 0), np.int32), pairs(n), top_k, top_p, temperature,
                                         seed))

    def complete(self, images: Pictures, rows: int | None = None, n: int = 1, *, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
        """Completes images below their first rows.

        Args:
          images: N images.
          rows: rows that are kept; None: the upper half. Each number compiles anew.
          n: completions of each image.
          temperature, top_k, top_p, seed: those of `sample`.

        Returns:
          uint8 [N, n, Y, X, 3].
        """
        rows = self.image_size // 2 if rows is None else rows
        self._check_drawing(n, rows, temperature, top_k, top_p, seed)
        tokens_NT = self._tokens(images)
        index_B2 = pairs(len(tokens_NT), n)
        given_BP = tokens_NT[index_B2[:, 0], :rows * self._model.dims.row]
        return self._pictures(self._draw("completions", given_BP, index_B2, top_k, top_p, temperature, seed), n)

    def complete_by_row(self, images: Pictures | None, rows: int | None = None, n: int = 1, *,
                        temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
                        ) -> Iterator[np.ndarray]:
        """`complete`, yielding uint8 [N, n, Y, X, 3] after each row; the rows still to come are gray.

        It compiles once for any number of rows, and draws all images at once. Without images it yields the `sample`s of
        that seed, [1, n, Y, X, 3], from no given rows.
        """
        size = self.image_size
        rows = 0 if images is None else size // 2 if rows is None else rows
        self._check_drawing(n, rows, temperature, top_k, top_p, seed)
        if images is None:
            kind, index_B2, tokens_BT = "samples", pairs(n), np.zeros((n, self._model.dims.T), np.int32)
        else:
            tokens_NT = self._tokens(images)
            kind, index_B2 = "completions", pairs(len(tokens_NT), n)
            tokens_BT = tokens_NT[index_B2[:, 0]]
        drawing = self._drawing(top_k, top_p).by_row(kind, tokens_BT, index_B2, rows, temperature=temperature,
                                                     seed=seed)
        for done in range(rows + 1, size + 1):
            with in_precision(self._precision):  # not across the yield: the caller's code keeps its settings
                tokens_BT = next(drawing)
            images_NnYXC = self._pictures(tokens_BT, n)
            images_NnYXC[:, :, done:] = UNKNOWN
            yield images_NnYXC

    def classify(self, images: Pictures) -> np.ndarray:
        """The most probable class of each image, int [N]; `class_names` names them. See `probabilities`."""
        return self.probabilities(images).argmax(axis=1)

    def probabilities(self, images: Pictures) -> np.ndarray:
        """Probabilities of the classes, float32 [N, K]: by the head of a fine-tuned model, or else by the probe.

        The head of a masked model averages over five masks; a probe sees one.

        Raises:
          UserError: the model has neither.
        """
        if self._model.dims.K:
            return self._compute("classes", "", self._tokens(images))
        if self.probe is None:
            raise UserError(f"{self.source} has no class head, and no probe of it is known. Fine-tune it, or probe it: "
                            "python -m igpt_jax probe --workdir=PROBE --config.checkpoint=..., then load(..., "
                            "probe='PROBE').")
        logits_NK = self.probe.probe.logits(self.features(images, self.probe.layer, self.probe.kind))
        odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
        return odds_NK / odds_NK.sum(axis=1, keepdims=True)

    def _tokens(self, images: Pictures) -> np.ndarray:
        """Tokens int32 [N, T] of images."""
        return self.metadata.codec.encode(pixels(images, self.image_size)).astype(np.int32)

    def _pictures(self, tokens_BT: np.ndarray, n: int = 0) -> np.ndarray:
        """uint8 [B, Y, X, 3] of tokens; [N, n, Y, X, 3] where n is given."""
        images_BYXC = self.metadata.codec.decode(tokens_BT)
        return images_BYXC.reshape(-1, n, *images_BYXC.shape[1:]) if n else images_BYXC

    def _batch(self, count: int) -> int:
        return sharding.whole_batch(min(self._batch_size, 1 << (count - 1).bit_length()), self._mesh)

    def _make_step(self, what: str, kind: str) -> Callable:
        model = self._model
        makers: dict[str, Callable] = {"features": lambda: make_feature_step(model, kind),
                                       "nats": lambda: make_eval_step(
                                           model, exact_loss.VIEWS if model.objective.bound else 1),
                                       "loss maps": lambda: loss_maps.make_pixel_step(model),
                                       "classes": lambda: make_class_step(model, exact_loss.VIEWS)}
        return exact_loss.jit_over_batches(makers[what](), model, self._mesh)

    def _compute(self, what: str, kind: str, tokens_NT: np.ndarray) -> Any:
        """Results of a step for all images, NumPy arrays [N, ...]."""
        with in_precision(self._precision):
            found = exact_loss.over_split(self._step(what, kind), self._params, Tokens(tokens_NT), self._mesh,
                                          self._batch(len(tokens_NT)), None)
            return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def _make_drawing(self, top_k: int, top_p: float) -> Drawing:
        return Drawing(self._model, self._params, self._mesh, self.source, top_k, top_p)

    def _require_pixel_head(self) -> None:
        """Raises UserError for a classifier of other frameworks, whose missing head for pixels is zero here."""
        if self.source.startswith(("huggingface:", "openai:")) and not self._params["head_VD"].any():
            raise UserError(f"{self.source} holds no head for pixels, so that it predicts none. Take features from it.")

    def _draw(self, kind: str, given_BP: np.ndarray, index_B2: np.ndarray, top_k: int, top_p: float,
              temperature: float, seed: int) -> np.ndarray:
        self._require_pixel_head()
        with in_precision(self._precision):
            return self._drawing(top_k, top_p)(kind, given_BP, index_B2, temperature=temperature, seed=seed,
                                               batch_size=self._batch(len(given_BP)))

    def _check_drawing(self, n: int, rows: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        """Raises UserError for settings that cannot be used, or a model that does not draw."""
        require_causal(self.causal, self.metadata.config, self.source,
                       "Load a checkpoint with objective=autoregressive.")
        SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)  # by the rules of these keys
        if n < 1:
            raise UserError(f"n={n} must be at least 1.")
        if not 0 <= rows <= self.image_size:
            raise UserError(f"rows={rows}: the images have {self.image_size} rows. Choose 0 to {self.image_size}.")
