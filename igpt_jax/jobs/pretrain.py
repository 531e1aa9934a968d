"""Trains a model on a pixel store, on one device or many. The same command resumes a stopped run.

Writes checkpoints/, metrics.jsonl, tensorboard/ and figures/loss.png.
"""

from igpt_jax.config import PretrainConfig
from igpt_jax.training import loop


def run(config: PretrainConfig, workdir: str) -> dict[str, float]:
    """Trains to the end. Returns the metrics for result.json; see `loop.train` for the errors."""
    return loop.train(config, workdir)
