"""Trains a checkpoint to classify, and to generate still; or a new model, from scratch. The same loop as pretraining.

Writes what pretrain writes. The accuracy on data.test is that of the best checkpoint by held-out accuracy.
"""

from typing import Any

import numpy as np

from igpt_jax import checkpoint, storage
from igpt_jax.config import FinetuneConfig
from igpt_jax.data import open_data, palette
from igpt_jax.evaluation import exact_loss
from igpt_jax.metrics.logging import say
from igpt_jax.parallel import sharding
from igpt_jax.training import loop, transfer


def run(config: FinetuneConfig, workdir: str) -> dict[str, Any]:
    """Trains to the end. Returns the loop's metrics and `test_accuracy`; see `loop.train` for the errors.

    Raises:
      UserError: the checkpoint is missing or of another objective; labels are missing, or all those of a class.
    """
    config = transfer.adopted(config)
    test = open_data(config.data, config.image_size).split(config.data.test) if config.data.test else None
    if test:
        test.labels(np.arange(1))  # before training: has it any?
    metrics = loop.train(config, workdir)
    if not test:
        return metrics
    step = metrics["best_step"] or metrics["steps"]
    mesh = sharding.make_mesh(config.mesh)
    model, params, record = checkpoint.load_model(str(storage.path(workdir) / "checkpoints" / str(step)), mesh,
                                                  config.precision)
    measure = exact_loss.make_measure(model, mesh, config.batch_size, palette.lookup_table(record.palette_VC))
    accuracy = measure(params, test)["accuracy"]
    say(f"step {step:,}: {accuracy:.2%} of {test.count:,} test images")
    return {**metrics, "test_accuracy": accuracy}
