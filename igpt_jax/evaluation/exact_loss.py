"""Exact loss and accuracy over a whole split: every example counts once, at any batch size and number of devices.

B global batch, T tokens of an image, E examples, M masks of an example, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax.data.codecs import Codec
from igpt_jax.data.resident import process_rows, put
from igpt_jax.data.store import Split
from igpt_jax.data.token_file import Tokens, tokens_of
from igpt_jax.evaluation.steps import make_eval_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.runtime import startup

VIEWS = 5  # random views of an image: votes for its class (paper, Section 4.6), or those that a bound is the mean of


def placed(split: Split | Tokens, batches: Iterable[np.ndarray], mesh: Mesh, codec: Codec | None
           ) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Tokens int32 [B, T] and ids int32 [B] of batches of examples, on the devices. The next batch is read ahead.

    Args:
      split: to read.
      batches: ids of the examples of each global batch. All have the same size, which divides over data x fsdp.
      mesh: of the devices.
      codec: of the model; None where the split has tokens.
    """
    by_image = sharding.batch_sharding(mesh)

    def read(ids: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        mine = ids[process_rows(by_image, len(ids))]
        return len(ids), tokens_of(split, codec, mine), mine.astype(np.int32)

    def put_on_devices(count: int, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
        return tuple(put(rows, by_image, count) for rows in arrays)

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = None
        for ids in batches:
            now, ahead = ahead, reader.submit(read, ids)
            if now is not None:
                yield put_on_devices(*now.result())
        if ahead is not None:
            yield put_on_devices(*ahead.result())


def over_split(step: Callable, params: Any, split: Split | Tokens, mesh: Mesh, batch_size: int,
               codec: Codec | None, give_up: Callable[[], bool] | None = None, ids_E: np.ndarray | None = None
               ) -> Iterator[Any]:
    """Runs a step on the examples of a split, in order, and yields the results of each batch as NumPy arrays [B, ...].

    The last batch is padded with repeated examples, whose results are dropped.

    Args:
      step: `step(params, tokens_BT, ids_B)`, jitted with a replicated result (`jit_over_batches`).
      params: its first argument.
      split: to read.
      mesh: of the parameters.
      batch_size: global; must divide over data x fsdp.
      codec: of the model; None where the split has tokens.
      give_up: called before each batch; once it returns True, a last None is yielded.
      ids_E: the examples; None: all.
    """
    startup.agree(data=split.fingerprint)
    ids_E = np.arange(split.count) if ids_E is None else ids_E
    starts = range(0, len(ids_E), batch_size)
    batches = placed(split, (np.take(ids_E, np.arange(start, start + batch_size), mode="wrap") for start in starts),
                     mesh, codec)
    running: Any = None
    for _ in starts:
        if give_up and give_up():
            yield None
            return
        tokens, ids = next(batches)
        # Run one step at a time: on CPU devices, the collectives of two steps in flight can deadlock. The next batch is
        # read and copied meanwhile.
        if running is not None:
            yield jax.tree.map(np.asarray, running)
        with jax.set_mesh(mesh):
            running = step(params, tokens, ids)
    yield jax.tree.map(lambda x: np.asarray(x)[:len(ids_E) - starts[-1]], running)


def jit_over_batches(step: Callable, model: Model, mesh: Mesh) -> Callable:
    """Jits a step of `model` for `over_split`, with its result on all devices."""
    return jax.jit(step, out_shardings=sharding.replicated(mesh), compiler_options=model.compiler_options)


def make_measure(model: Model, mesh: Mesh, batch_size: int, codec: Codec, seed: int = 0,
                 views: int = VIEWS) -> Callable[..., dict[str, float] | None]:
    """Makes `measure(params, split, give_up=None, labeled=True)`, which returns the mean loss over all examples.

    Its result is None if it gave up (see `over_split`), or else a dict of:

    - `nats_per_pixel`, for a masked model per hidden pixel, for a diffusion model an upper bound (`Objective.bound`);
      with a codec that loses nothing else, also `bits_per_dim`;
    - `accuracy`, if `labeled` and the model has a class head. A masked model classifies each image under several
      masks, and the majority decides.

    Args:
      seed: of the masks, and of ties between classes.
      views: of each image, for classes or a bound.
    """
    views = views if model.dims.K or model.objective.bound else 1
    step = jit_over_batches(make_eval_step(model, views, seed), model, mesh)

    def measure(params: Any, split: Split | Tokens, give_up: Callable[[], bool] | None = None,
                labeled: bool = True) -> dict[str, float] | None:
        results = list(over_split(step, params, split, mesh, batch_size, codec, give_up))
        if results[-1] is None:
            return None
        whole = {name: np.concatenate([batch[name] for batch in results]) for name in results[0]}
        # Images are summed here in float64, so that neither batch size nor mesh changes the order of the sum.
        figures = {"nats_per_pixel": float(whole["nats_per_pixel"].mean(dtype=np.float64))}
        if codec.has_bits:
            figures["bits_per_dim"] = codec.bits_per_dimension(figures["nats_per_pixel"])
        if labeled and model.dims.K:
            classes_E = majority(whole["classes"], model.dims.K, seed)
            figures["accuracy"] = float((classes_E == split.labels(np.arange(split.count))).mean())
        return figures

    return measure


def majority(votes_EM: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """The class [E] with the most votes for each example (paper, Section 4.6).

    Args:
      votes_EM: classes in [0, classes).
      seed: of the random choice between tied classes, which also depends on the example's index.
    """
    counts_EK = (votes_EM[:, :, None] == np.arange(classes)).sum(axis=1)
    return (counts_EK + np.random.default_rng(seed).random(counts_EK.shape)).argmax(axis=1)
