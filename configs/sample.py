"""Samples images, and completes the lower halves of held-out ones.

    igpt sample --config=sample:count=64 --workdir=runs/sample \
        --config.checkpoint=runs/pretrain --config.data.store=runs/digits
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("sample", arguments)
