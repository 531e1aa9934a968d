"""Fine-tunes a checkpoint to classify images, or trains a classifier from scratch.

Writes the same files as pretrain. The accuracy on data.test is that of the checkpoint with the best held-out accuracy.
The loss has a generative term too, so that the model still generates images. The same command resumes a stopped run.
"""

from typing import Any

import numpy as np

from igpt_jax import checkpoint, storage
from igpt_jax.config import FinetuneConfig, UserError
from igpt_jax.config.data import common_splits
from igpt_jax.data import open_data
from igpt_jax.evaluation import exact_loss
from igpt_jax.metrics.logging import say
from igpt_jax.parallel import sharding
from igpt_jax.runtime.exits import Failed
from igpt_jax.training import loop, transfer


def run(config: FinetuneConfig, workdir: str) -> dict[str, Any]:
    """Trains to the end. Returns the loop's metrics and `test_accuracy`; see `loop.train` for the errors.

    Raises:
      UserError: the checkpoint is missing or has another objective; labels are missing, or a class has no images.
      Failed: the best checkpoint or a test image is damaged.
    """
    config = transfer.adopted(config)
    if both := common_splits(config.data.split, config.data.test):
        raise UserError(f"data.test={config.data.test}: {both} is also trained on (data.split={config.data.split}). "
                        "Test on another split, or on none with --config.data.test=")
    test = open_data(config.data, config.image_size).split(config.data.test) if config.data.test else None
    if test:
        test.labels(np.arange(1))  # raises UserError now, not after training, if the split has no labels
    metrics = loop.train(config, workdir)
    if not test:
        return metrics
    step = metrics["best_step"] or metrics["steps"]
    mesh = sharding.make_mesh(config.mesh)
    try:
        model, params, metadata = checkpoint.load_model(str(storage.path(workdir) / "checkpoints" / str(step)), mesh,
                                                        config.precision, options=config.compiler_options)
        measure = exact_loss.make_measure(model, mesh, config.batch_size, metadata.codec)
        accuracy = measure(params, test)["accuracy"]
    except UserError as error:  # damage found after the training, whose files stay as they are
        raise Failed(str(error), metrics) from None
    say(f"step {step:,}: {accuracy:.2%} of {test.count:,} test images")
    if common_splits(config.data.held_out, config.data.test):
        say(f"the accuracy is optimistic: the images of {config.data.held_out!r} also choose the best step")
    return {**metrics, "test_accuracy": accuracy}
