"""Completion score: how close a model's completions of images' upper halves come to the images.

Models are ranked by the Frechet distance between N images and as many completions, as in arXiv 2511.08704. Distances in
different features are not comparable, so each kind of features has a column of its own.

N images, K completions of each, B batch, F features, T tokens; Y rows, X columns, C channels.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import scipy.stats
from jax.sharding import Mesh

from igpt_jax import checkpoint
from igpt_jax.checkpoint import Metadata
from igpt_jax.config import CompletionKeys, UserError
from igpt_jax.config.evaluation import COMPLETION_MEASURES, FUNCTION
from igpt_jax.data.store import Split
from igpt_jax.data.token_file import Tokens, tokens_of
from igpt_jax.evaluation import exact_loss
from igpt_jax.evaluation.drawing import Drawing, pairs, require_causal
from igpt_jax.metrics.logging import say
from igpt_jax.model.features import make_feature_step
from igpt_jax.model.image_gpt import Model

FEWEST = 4  # images: the covariance of each half needs two
SMALLEST = 3  # pixels: `random_conv` halves the rows twice

Features = Callable[[np.ndarray], np.ndarray]  # of images uint8 [B, Y, X, 3]: float [B, F]


def frechet_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """The squared Frechet distance of two Gaussians with the means and covariances of two sets of features, float64.

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, for covariances A and B. With A = R^T R and
    B = S^T S, the last trace is the sum of the singular values of R S^T. R and S are QR factors of the centered
    features, so that no root of a nearly singular matrix is taken. The sets may differ in size.
    """
    a_NF, b_NF = np.asarray(a_NF, np.float64), np.asarray(b_NF, np.float64)
    R, S = (np.linalg.qr(x_NF - x_NF.mean(axis=0), mode="r") / np.sqrt(len(x_NF) - 1) for x_NF in (a_NF, b_NF))
    means = ((a_NF.mean(axis=0) - b_NF.mean(axis=0)) ** 2).sum()
    traces = (R ** 2).sum() + (S ** 2).sum() - 2 * np.linalg.svd(R @ S.T, compute_uv=False).sum()
    return float(means + max(traces, 0.0))


def random_conv(images_BYXC: np.ndarray) -> np.ndarray:
    """64 features of images uint8 [B, Y, X, 3], by a fixed random network. It needs no download.

    Values p become p / 127.5 - 1. Two 3x3 convolutions with zero padding and without biases, each followed by ReLU: 16
    channels at stride 1, then 32 at stride 2. The features are the channels' means over the upper half of the rows,
    then over the lower half; of an odd number of rows, the middle one is in the upper half.

    Weights [3, 3, in, out] are uniform in +-sqrt(6 / (9 in)), drawn one layer after the other from NumPy's
    `RandomState(0)`, whose streams never change. All is float64, so that machines differ by rounding alone.
    """
    random, x_BYXC = np.random.RandomState(0), images_BYXC / 127.5 - 1
    for stride, channels in ((1, 16), (2, 32)):
        bound = np.sqrt(6 / (9 * x_BYXC.shape[-1]))
        weights = random.uniform(-bound, bound, (3, 3, x_BYXC.shape[-1], channels))
        padded_BYXC = np.pad(x_BYXC, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(padded_BYXC, (3, 3), (1, 2))[:, ::stride, ::stride]
        x_BYXC = np.maximum(np.einsum("byxcij,ijcd->byxd", patches, weights, optimize=True), 0)
    return np.concatenate([half.mean(axis=(1, 2)) for half in np.array_split(x_BYXC, 2, axis=1)], axis=1)


def identity(keys: CompletionKeys) -> str:
    """What decides the features: a digest of their checkpoint, or else the key's value itself."""
    of_checkpoint = keys.completion_measure == "checkpoint_frechet"
    return checkpoint.identity(keys.completion_features) if of_checkpoint else keys.completion_features


def score(originals_NYXC: np.ndarray, completed: Iterable[np.ndarray], features: Features, name: str
          ) -> dict[str, Any]:
    """Scores K completions of the upper half of each image.

    Args:
      originals_NYXC: uint8.
      completed: K times uint8 [N, Y, X, C].
      features: of images.
      name: of the column of the distance.

    Returns:
      Columns of a table. The mean over the K draws of the distance between the originals and the N completions of a
      draw; its 95% interval, by the t distribution over draws (None for one draw); the distance between the originals
      with even and odd index. The mean squared error over the lower half, of values from 0 to 1: of the best of the K
      completions and of their mean. The same figures where the lower half is the mirrored upper half, or the lower half
      of another image.
    """
    rows, real_NF = originals_NYXC.shape[1] // 2, features(originals_NYXC)
    N, F = real_NF.shape
    if N <= F:
        say(f"completion_images={N} does not determine the covariance of {F} features, which makes {name} too large. "
            f"Use more than {F} images.")

    def compared(images_NYXC: np.ndarray) -> tuple[float, np.ndarray]:
        difference = (images_NYXC[:, rows:].astype(np.float64) - originals_NYXC[:, rows:]) / 255
        return frechet_distance(real_NF, features(images_NYXC)), (difference ** 2).mean(axis=(1, 2, 3))

    distances_K, errors_KN = (np.array(each) for each in zip(*map(compared, completed), strict=True))
    mean, K = distances_K.mean(), len(distances_K)
    interval = None
    if K > 1:
        margin = scipy.stats.t.ppf(0.975, K - 1) * distances_K.std(ddof=1) / np.sqrt(K)
        interval = [float(mean - margin), float(mean + margin)]
    found = {name: float(mean), f"{name}_interval": interval,
             f"{name}_halves": frechet_distance(real_NF[::2], real_NF[1::2]),
             "completion_mse_best": float(errors_KN.min(axis=0).mean()), "completion_mse_mean": float(errors_KN.mean())}
    upper_NYXC = originals_NYXC[:, :rows]
    padding = ((0, 0), (0, originals_NYXC.shape[1] - rows), (0, 0), (0, 0))
    other_NYXC = np.roll(originals_NYXC, N // 2, axis=0)
    for baseline, images_NYXC in (("mirror", np.pad(upper_NYXC, padding, "symmetric")),
                                  ("other_image", np.concatenate([upper_NYXC, other_NYXC[:, rows:]], axis=1))):
        distance, errors_N = compared(images_NYXC)
        found |= {f"{name}_{baseline}": distance, f"completion_mse_{baseline}": float(errors_N.mean())}
    return found


class CompletionScorer:
    """Draws completions with models, and scores them all in the same features.

    Args:
      keys: number of completions and images; features.
      mesh: of the models' parameters.
      batch_size: images at once over all devices; must divide over data x fsdp.

    Raises:
      UserError: the features' checkpoint or function cannot be loaded.
    """

    def __init__(self, keys: CompletionKeys, mesh: Mesh, batch_size: int):
        self._keys, self._mesh, self._batch_size = keys, mesh, batch_size
        loaders = dict(zip(COMPLETION_MEASURES, (lambda _: random_conv, self._of_checkpoint, _function), strict=True))
        self._features = loaders[keys.completion_measure](keys.completion_features)

    def columns(self, source: str, model: Model, params: Any, metadata: Metadata, split: Split | Tokens
                ) -> dict[str, Any]:
        """Completes the first images of a split and returns `score`'s columns, with the number of images and draws.

        Images are compared as the model sees them, in the colors of its codec. The completions are those of the
        sample job with seed 0.

        Args:
          source: of the parameters, for messages.
          model, params, metadata: from `checkpoint.load_model`.
          split: of the images.

        Raises:
          UserError: the model cannot draw, there are too few images, or they do not fit the features.
        """
        K, N = self._keys.completions, min(self._keys.completion_images, split.count)
        require_causal(model.causal, metadata.config, f"completions={K}: {source}", "Set completions=0.")
        if metadata.image_size < SMALLEST:
            raise UserError(f"completions={K}: images of {metadata.image_size} pixels have no halves to compare. Set "
                            "completions=0.")
        if N < FEWEST:
            raise UserError(f"completions={K}: there are {N} images, and a distance needs at least {FEWEST}. Name a "
                            "larger split.")
        ids = np.arange(N)
        tokens_NT, codec = tokens_of(split, metadata.codec, ids), metadata.codec
        given_NP = tokens_NT[:, :model.dims.Y // 2 * model.dims.row]
        drawing = Drawing(model, params, self._mesh, source)

        def completed() -> Iterator[np.ndarray]:
            for k in range(K):
                drawn_NT = drawing("completions", given_NP, pairs(N, K)[k::K], batch_size=min(self._batch_size, N),
                                   progress=True)
                yield codec.decode(drawn_NT)

        return {"completion_images": N, "completion_draws": K, "completion_features": self._keys.completion_features,
                **score(codec.decode(tokens_NT), completed(), self._of,
                        self._keys.completion_measure)}

    def _of(self, images_NYXC: np.ndarray) -> np.ndarray:
        """Features [N, F] of all images, batch by batch."""
        found = []
        for start in range(0, len(images_NYXC), self._batch_size):
            images_BYXC = images_NYXC[start:start + self._batch_size]
            features_BF = np.asarray(self._features(images_BYXC))
            if features_BF.shape[:1] != images_BYXC.shape[:1] or features_BF.ndim != 2 or not np.issubdtype(
                    features_BF.dtype, np.number) or not np.isfinite(features_BF).all():
                raise UserError(f"completion_features={self._keys.completion_features}: the features of "
                                f"{len(images_BYXC)} images must be finite numbers [{len(images_BYXC)}, F]; these are "
                                f"{features_BF.dtype} {list(features_BF.shape)}.")
            found.append(features_BF)
        return np.concatenate(found)

    def _of_checkpoint(self, given: str) -> Features:
        """The middle layer of a model, near which features classify best (paper, Section 4.1), pooled as for probes."""
        try:
            model, params, metadata = checkpoint.load_model(given, self._mesh, "float32")
        except UserError as error:
            raise UserError(f"completion_features={given!r}: {error} Or use random, or MODULE:FUNCTION.") from None
        if model.objective.random:
            raise UserError(f"completion_features={given}: its features depend on random masks. Name a checkpoint with "
                            "objective=autoregressive.")
        step = exact_loss.jit_over_batches(make_feature_step(model, "normalized"), model, self._mesh)

        def features(images_BYXC: np.ndarray) -> np.ndarray:
            if images_BYXC.shape[1] != metadata.image_size:
                raise UserError(f"completion_features={given}: its model takes images of {metadata.image_size} pixels, "
                                f"and these have {images_BYXC.shape[1]}. Name a checkpoint of that size.")
            tokens = Tokens(metadata.codec.encode(images_BYXC))
            with jax.default_matmul_precision("highest"):  # whatever the precision of the model that is scored
                features_BMPD, = exact_loss.over_split(step, params, tokens, self._mesh, self._batch_size, None)
            return features_BMPD[:, 0, model.dims.L // 2]

        return features


def _function(given: str) -> Features:
    """The user's function MODULE:FUNCTION. Raises UserError if it cannot be imported."""
    module, name = FUNCTION.fullmatch(given).groups()
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"completion_features={given}: it cannot be imported ({type(error).__name__}: {reason}). Put "
                        "the folder of the module into PYTHONPATH.") from None
    if not callable(found):
        raise UserError(f"completion_features={given} is not a function. Name one that takes uint8 [B, Y, X, 3] and "
                        "returns numbers [B, F].")
    return found
