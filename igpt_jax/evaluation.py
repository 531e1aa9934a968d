"""Exact figures over a whole split: every example counts once, at any batch size and on any number of devices.

B global batch, T tokens of an image.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import sharding, startup
from igpt_jax.data import process_rows, put
from igpt_jax.data.store import Split, tokens_of
from igpt_jax.data.tokens import TokenFile
from igpt_jax.model import Model
from igpt_jax.steps import make_eval_step


def over_split(step: Callable, params: Any, split: Split | TokenFile, mesh: Mesh, batch_size: int, table: np.ndarray,
               give_up: Callable[[], bool] | None = None) -> Iterator[np.ndarray | None]:
    """Yields `step(params, tokens_BT)` [B, ...] of all examples in order, batch by batch, on the host.

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
    startup.agree(data=split.count if isinstance(split, TokenFile) else split.fingerprint)
    place = sharding.batch_sharding(mesh)
    rows = process_rows(place, batch_size)

    def read(start: int) -> np.ndarray:
        ids = np.arange(start, start + batch_size)[rows] % split.count
        return split.tokens(ids) if isinstance(split, TokenFile) else tokens_of(split, table, ids).astype(np.int32)

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(read, 0)
        running: jax.Array | None = None
        for start in range(0, split.count, batch_size):
            if give_up and give_up():
                yield None
                return
            tokens = put(ahead.result(), place, batch_size)
            if start + batch_size < split.count:
                ahead = reader.submit(read, start + batch_size)
            # One step at a time: steps that do not wait for each other meet in the wrong order in the collectives
            # of CPU devices, and stand still. Reading and copying go on beside it.
            if running is not None:
                yield np.asarray(running)
            with jax.set_mesh(mesh):
                running = step(params, tokens)
        yield np.asarray(running)[:split.count - start]


def jit_over_batches(step: Callable, mesh: Mesh) -> Callable:
    """`step` jitted for `over_split`."""
    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def make_evaluate(model: Model, mesh: Mesh, batch_size: int, table: np.ndarray) -> Callable[..., float | None]:
    """`evaluate(params, split, give_up=None)`: mean nats per pixel over all examples of the split; see `over_split`.

    Losses of single images come from the devices and are added up here in float64, so that neither batch size nor mesh
    decides the order of the sum.
    """
    step = jit_over_batches(make_eval_step(model), mesh)

    def evaluate(params: Any, split: Split | TokenFile, give_up: Callable[[], bool] | None = None) -> float | None:
        results = list(over_split(step, params, split, mesh, batch_size, table, give_up))
        return None if results[-1] is None else float(np.concatenate(results).mean(dtype=np.float64))

    return evaluate
