"""Fits a linear probe to every layer of a checkpoint; chooses on the held-out split and reports test accuracy.

    igpt probe --config=probe --workdir=runs/probe --config.checkpoint=runs/pretrain

The paper's low-data rows (Section 4.7): --config.labels_per_class='(4, 25, 400)'.
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("probe", arguments)
