"""Exact figures over a whole split: every example counts once, at any batch size and on any number of devices.

B global batch, T tokens of an image.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import sharding
from igpt_jax.data import process_rows, put
from igpt_jax.data.store import Split, tokens_of
from igpt_jax.model import Model
from igpt_jax.steps import make_eval_step


def make_evaluate(model: Model, mesh: Mesh, batch_size: int, table: np.ndarray) -> Callable[..., float | None]:
    """`evaluate(params, split, give_up=None)`: mean nats per pixel over all examples of the split.

    `give_up()` is asked before each batch; once it is true the result is None.

    The last batch is filled up with repeated examples whose figures are dropped. Losses of single images come from
    the devices and are added up here in float64, so that neither batch size nor mesh decides the order of the sum.

    Args:
      model: the model.
      mesh: of the parameters.
      batch_size: global; must divide over data x fsdp.
      table: `palette.lookup_table`'s.
    """
    place = sharding.batch_sharding(mesh)
    rows = process_rows(place, batch_size)
    eval_step = jax.jit(make_eval_step(model), out_shardings=sharding.replicated(mesh))

    def read(split: Split, start: int) -> np.ndarray:
        ids = np.arange(start, start + batch_size)[rows] % split.count
        return tokens_of(split, table, ids).astype(np.int32)

    def evaluate(params: Any, split: Split, give_up: Callable[[], bool] | None = None) -> float | None:
        results: list[np.ndarray] = []
        running: jax.Array | None = None
        with jax.set_mesh(mesh), ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(read, split, 0)
            for start in range(0, split.count, batch_size):
                if give_up and give_up():
                    return None
                tokens = put(ahead.result(), place, batch_size)
                if start + batch_size < split.count:
                    ahead = reader.submit(read, split, start + batch_size)
                # One step at a time: steps that do not wait for each other meet in the wrong order in the collectives
                # of CPU devices, and stand still. Reading and copying go on beside it.
                if running is not None:
                    results.append(np.asarray(running))
                running = eval_step(params, tokens)
            results.append(np.asarray(running))
        return float(np.concatenate(results)[:split.count].mean(dtype=np.float64))

    return evaluate
