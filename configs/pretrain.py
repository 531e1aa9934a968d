"""Pretrains an iGPT on a pixel store.

    igpt prepare --workdir=runs/digits --config.source=digits
    igpt pretrain --config.model.name=igpt_tiny --config.steps=500 \
        --workdir=runs/pretrain --config.data.store=runs/digits

For the masked (BERT) objective: --config.objective=masked. After a colon, `--config=pretrain:steps=500` sets a key too.
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("pretrain", arguments)
