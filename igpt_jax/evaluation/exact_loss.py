"""Exact figures over a whole split: every example counts once, at any batch size and on any number of devices.

B global batch, T tokens of an image, E examples, M masks of an example, K classes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax.data.resident import process_rows, put
from igpt_jax.data.store import Split, tokens_of
from igpt_jax.data.token_file import TokenFile
from igpt_jax.evaluation.steps import make_eval_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.runtime import startup

VOTES = 5  # masks under which a masked model classifies an image (paper, Section 4.6)


def over_split(step: Callable, params: Any, split: Split | TokenFile, mesh: Mesh, batch_size: int, table: np.ndarray,
               give_up: Callable[[], bool] | None = None) -> Iterator[Any]:
    """Yields `step(params, tokens_BT, ids_B)`, arrays [B, ...], of all examples in order, batch by batch, on the host.

    The last batch is filled up with repeated examples, whose results are dropped. `give_up()` is asked before each
    batch; once it is true, None is yielded last.

    Args:
      step: jitted, its result on all devices (`jit_over_batches`).
      params: its first argument.
      split: to read; a file of tokens needs no table.
      mesh: of the parameters.
      batch_size: global; must divide over data x fsdp.
      table: `palette.lookup_table`'s.
    """
    startup.agree(data=split.fingerprint)
    place = sharding.batch_sharding(mesh)
    rows = process_rows(place, batch_size)

    def read(start: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(start, start + batch_size)[rows] % split.count
        tokens = split.tokens(ids) if isinstance(split, TokenFile) else tokens_of(split, table, ids).astype(np.int32)
        return tokens, ids.astype(np.int32)

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, 0)
        running: Any = None
        for start in range(0, split.count, batch_size):
            if give_up and give_up():
                yield None
                return
            tokens, ids = (put(rows, place, batch_size) for rows in ahead.result())
            if start + batch_size < split.count:
                ahead = reader.submit(read, start + batch_size)
            # One step at a time: steps that do not wait for each other meet in the wrong order in the collectives
            # of CPU devices, and stand still. Reading and copying go on beside it.
            if running is not None:
                yield jax.tree.map(np.asarray, running)
            with jax.set_mesh(mesh):
                running = step(params, tokens, ids)
        yield jax.tree.map(lambda x: np.asarray(x)[:split.count - start], running)


def jit_over_batches(step: Callable, mesh: Mesh) -> Callable:
    """`step` jitted for `over_split`."""
    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def make_evaluate(model: Model, mesh: Mesh, batch_size: int, table: np.ndarray) -> Callable[..., float | None]:
    """`evaluate(params, split, give_up=None)`: mean nats per pixel alone; see `make_measure`."""
    measure = make_measure(model, mesh, batch_size, table)

    def evaluate(params: Any, split: Split | TokenFile, give_up: Callable[[], bool] | None = None) -> float | None:
        found = measure(params, split, give_up, labelled=False)
        return None if found is None else found["nats_per_pixel"]

    return evaluate


def make_measure(model: Model, mesh: Mesh, batch_size: int, table: np.ndarray, seed: int = 0
                 ) -> Callable[..., dict[str, float] | None]:
    """`measure(params, split, give_up=None, labelled=True)`: figures over all examples of a split; see `over_split`.

    `nats_per_pixel`, of a masked model per hidden pixel; and, of a model with a class head, its `accuracy`, where a
    masked model's class is the one that it takes most of an image's masks for. Losses of single images come from the
    devices and are added up here in float64, so that neither batch size nor mesh decides the order of the sum.

    Args:
      seed: of the masks, and of ties between classes.
    """
    votes = VOTES if model.dims.K and model.objective.random else 1
    step = jit_over_batches(make_eval_step(model, votes, seed), mesh)

    def measure(params: Any, split: Split | TokenFile, give_up: Callable[[], bool] | None = None,
                labelled: bool = True) -> dict[str, float] | None:
        results = list(over_split(step, params, split, mesh, batch_size, table, give_up))
        if results[-1] is None:
            return None
        whole = {name: np.concatenate([batch[name] for batch in results]) for name in results[0]}
        figures = {"nats_per_pixel": float(whole["nats_per_pixel"].mean(dtype=np.float64))}
        if labelled and model.dims.K:
            classes_E = majority(whole["classes"], model.dims.K, seed)
            figures["accuracy"] = float((classes_E == split.labels(np.arange(split.count))).mean())
        return figures

    return measure


def majority(votes_EM: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """The class [E] that most of an example's votes are for; of several the same, one at random (paper, Section 4.6).

    Args:
      votes_EM: classes in [0, classes).
      seed: of the choices, which an example's place decides besides.
    """
    counts_EK = (votes_EM[:, :, None] == np.arange(classes)).sum(axis=1)
    return (counts_EK + np.random.default_rng(seed).random(counts_EK.shape)).argmax(axis=1)
