"""Draws images with a model, batch by batch: samples from nothing, and completions of given pixels.

B batch, T tokens of an image, P given tokens.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.data.resident import process_rows, put
from igpt_jax.model import sampling
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import NOT_FINITE, Sampling
from igpt_jax.parallel import sharding

KINDS = ("samples", "completions")
UNKNOWN = 127  # gray level of pixels that are not given, or not drawn yet


def require_causal(causal: bool, trained: PretrainConfig, source: str, fix: str) -> None:
    """Raises UserError for a model that does not predict one pixel after the other.

    Args:
      causal: `Objective.causal` of the model.
      trained: the config that it was trained with.
      source: of its parameters, as the message begins.
      fix: the sentence that ends it.
    """
    if not causal:
        raise UserError(f"{source} was trained with objective={trained.objective}, which is not autoregressive. {fix}")


def default_batch_size(mesh: Mesh) -> int:
    """Images drawn at once where the user does not say: 16 on CPU, 64 elsewhere."""
    return 16 if mesh.devices.flat[0].platform == "cpu" else 64


def pairs(images: int, n: int = 1) -> np.ndarray:
    """[images * n, 2]: the index of the image, and that of the drawing among its n, of each drawing."""
    return np.stack(np.divmod(np.arange(images * n), n), axis=1)


class Drawing:
    """Draws images with one model; compiled once per number of given pixels and batch size.

    The random key of a drawn image is the seed folded with its kind and its two indices: the image's, and its own among
    those drawn for that image. It depends neither on the batch size nor on the number of images.

    Args:
      model, params: autoregressive.
      mesh: of the parameters.
      source: of the parameters, for messages.
      top_k, top_p: see `Sampling`.
      cache_dtype: of cached keys and values; None: that of `products.Product`.
    """

    def __init__(self, model: Model, params: Any, mesh: Mesh, source: str, top_k: int = 0, top_p: float = 1.0,
                 cache_dtype: Any = None):
        self._params, self._mesh, self._source = params, mesh, source
        self._precision, self._dims = model.precision.compute.name, model.dims
        replicated, by_image = sharding.replicated(mesh), sharding.batch_sharding(mesh)

        def keys(key: jax.Array, index_B2: jax.Array) -> jax.Array:
            return jax.vmap(lambda index_2: jax.random.fold_in(jax.random.fold_in(key, index_2[0]), index_2[1])
                            )(index_B2)

        def run(params, given_BP, index_B2, key, temperature):
            drawn = Sampling(temperature, top_k, top_p)
            return sampling.generate(model, params, given_BP, keys(key, index_B2), drawn, cache_dtype)

        def begin(params, tokens_BT, given):
            return sampling.begin(model, params, tokens_BT, given)

        def extend(params, carry, start, end, index_B2, key, temperature):
            drawn = Sampling(temperature, top_k, top_p)
            return sampling.extend(model, params, carry, start, end, keys(key, index_B2), drawn)

        jit = functools.partial(jax.jit, compiler_options=model.compiler_options)
        self._run = jit(run, out_shardings=replicated)
        self._begin = jit(begin, out_shardings=by_image)
        self._extend = jit(extend, donate_argnums=1, out_shardings=by_image)

    def __call__(self, kind: str, given_BP: np.ndarray, index_B2: np.ndarray, *, temperature: float = 1.0,
                 seed: int = 0, batch_size: int, progress: bool = False) -> np.ndarray:
        """Tokens int32 [B, T] of images whose first P pixels are given. All processes must call it together.

        Args:
          kind: one of KINDS.
          given_BP: the given tokens.
          index_B2: the two indices of each image.
          temperature: divisor of the logits; 0: always the most likely color.
          seed: another one draws other images.
          batch_size: images at once over all devices, rounded up to a multiple of the mesh's shards of a batch.
          progress: shows a progress bar, in a terminal.

        Raises:
          UserError: the logits are not finite.
        """
        count, batch_size = len(given_BP), sharding.whole_batch(batch_size, self._mesh)
        key, temperature = _key(kind, seed), _float32(temperature)
        out = []
        with (jax.set_mesh(self._mesh),
              tqdm(total=count, unit="image", desc=kind, disable=None if progress else True) as bar):
            for start in range(0, count, batch_size):
                # The last batch is filled up with rows of the first one, whose copies are dropped below.
                rows = np.arange(start, start + batch_size) % count
                arguments = (self._put(whole[rows]) for whole in (given_BP, index_B2))
                out.append(np.asarray(self._run(self._params, *arguments, key, temperature)))
                bar.update(min(batch_size, count - start))
        return self._finite(np.concatenate(out)[:count])

    def by_row(self, kind: str, tokens_BT: np.ndarray, index_B2: np.ndarray, rows: int, *, temperature: float = 1.0,
               seed: int = 0) -> Iterator[np.ndarray]:
        """Yields the tokens int32 [B, T] after each row of pixels; the last ones are those of `__call__`.

        Compiled once per batch size, for any number of given rows. All images are drawn at once, padded to a power of
        two, by one process.

        Args:
          kind, index_B2, temperature, seed: those of `__call__`.
          tokens_BT: the images; pixels below the given rows are not looked at.
          rows: number of given rows.
        """
        count, width = len(tokens_BT), self._dims.row
        batch_size = max(2, 1 << (count - 1).bit_length())  # one image alone is drawn twice (see `generate`)
        padded = np.arange(sharding.whole_batch(batch_size, self._mesh)) % count
        key, temperature, index_B2 = _key(kind, seed), _float32(temperature), self._put(index_B2[padded])
        with jax.set_mesh(self._mesh):
            carry = self._begin(self._params, self._put(tokens_BT[padded]), np.int32(rows * width))
        for row in range(rows, self._dims.Y):
            # Not across the yield: the caller's own code would run with this mesh.
            with jax.set_mesh(self._mesh):
                carry = self._extend(self._params, carry, np.int32(row * width), np.int32((row + 1) * width),
                                     index_B2, key, temperature)
            yield self._finite(np.array(carry[0])[:count])  # a copy: the next row overwrites the array

    def _put(self, rows: np.ndarray) -> jax.Array:
        """A batch's integers on the devices; each process places the rows that its devices hold."""
        by_image = sharding.batch_sharding(self._mesh)
        return put(rows[process_rows(by_image, len(rows))].astype(np.int32), by_image, len(rows))

    def _finite(self, tokens_BT: np.ndarray) -> np.ndarray:
        if (tokens_BT == NOT_FINITE).any():
            raise UserError(f"{self._source}: its logits are not finite although its weights are: they overflow in "
                            f"{self._precision}. Give another checkpoint.")
        return tokens_BT


def _key(kind: str, seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), KINDS.index(kind))


def _float32(temperature: float) -> np.ndarray:
    """The temperature as an argument of a compiled program."""
    return np.float32(min(temperature, float(np.finfo(np.float32).max)))
