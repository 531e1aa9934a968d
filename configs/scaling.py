"""Trains several sizes at equal FLOPs and fits a scaling law.

    igpt scaling --config=configs/scaling.py --workdir=runs/scaling --config.pretrain.data.store=runs/store
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("scaling")
    config.budgets = (1e12, 3e12, 1e13, 3e13)
    config.sizes = ("2x32", "3x48", "4x64", "6x96", "6x128", "8x192")
    config.pretrain.eval_every_steps = 0
    return override(config, arguments)
