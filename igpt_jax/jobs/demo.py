"""Serves a page to play with a model: completions row by row, loss maps, samples, predicted classes.

Drop a picture on the page, and choose the rows to keep, the temperature and how many completions to draw. The page
needs no network, and is served to this machine alone unless host says otherwise. Ctrl-C stops it. It writes nothing
unless --workdir is given.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from igpt_jax import api
from igpt_jax.config import DemoConfig, UserError
from igpt_jax.config.data import SplitConfig
from igpt_jax.data import open_split
from igpt_jax.demo.server import Server
from igpt_jax.metrics.logging import say
from igpt_jax.runtime.signals import StopSignal


def run(config: DemoConfig, workdir: str) -> dict[str, Any]:
    """Serves the page until a signal asks to stop. Returns the number of images `drawn`.

    Raises:
      UserError: the checkpoint is missing or cannot draw, or the port is in use.
    """
    if jax.process_count() > 1:
        raise UserError("demo runs in one process. Start it without launch/local.sh and without srun.")
    with Server(config.host, config.port) as server:
        server.model = model = api.load(config.checkpoint, precision=config.precision, palette=config.palette,
                                        probe=config.probe, parameters=config.parameters)
        if not model.causal:
            raise UserError(f"checkpoint {config.checkpoint} was trained with objective="
                            f"{model.metadata.config.objective}, which cannot draw pixel by pixel. Give a checkpoint "
                            "with objective=autoregressive.")
        server.example = _examples(config, model)
        with StopSignal(saves=True, reply="stopping") as stop:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            say(f"{model}\nOpen {server.url} in a browser. The first drawing compiles. Ctrl-C stops.")
            while not stop.should_stop():
                time.sleep(0.2)
        server.shutdown()
        return {"drawn": server.drawn}


def _examples(config: DemoConfig, model: api.ImageModel) -> Callable[[int], np.ndarray] | None:
    """Images of the data by any number; None if there is no pixel store here."""
    store = config.data.store or model.metadata.config.data.store
    if store.startswith("tfds:"):
        return None
    try:
        split = open_split(store, config.data.split, model.image_size)
    except (UserError, OSError):
        if config.data != SplitConfig():  # asked for
            raise
        return None
    return lambda number: split.read(np.array([number % split.count]))[0]
