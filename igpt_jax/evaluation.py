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
        starts = range(0, split.count, batch_size)
        results = []
        with jax.set_mesh(mesh), ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(read, split, 0)
            for start in starts:
                if give_up and give_up():
                    return None
                tokens = put(ahead.result(), place, batch_size)
                if start + batch_size < split.count:
                    ahead = reader.submit(read, split, start + batch_size)
                results.append(eval_step(params, tokens))
        nats = np.concatenate([np.asarray(result, np.float64) for result in results])[:split.count]
        return float(nats.mean())

    return evaluate
