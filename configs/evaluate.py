"""Measures the exact loss of checkpoints over a whole split.

    python -m igpt_jax evaluate --config=configs/evaluate.py --workdir=runs/evaluate \
        --config.checkpoints=runs/pretrain --config.data.store=runs/digits
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("evaluate", arguments)
