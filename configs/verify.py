"""Checks every byte of checkpoints, or of a pixel store, against checksums.

    igpt verify --config=verify --workdir=runs/verify --config.path=runs/pretrain
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("verify", arguments)
