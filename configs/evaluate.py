"""Measures the exact loss of checkpoints over a whole split.

    igpt evaluate --config=evaluate --workdir=runs/evaluate \
        --config.checkpoints=runs/pretrain --config.data.store=runs/digits
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("evaluate", arguments)
