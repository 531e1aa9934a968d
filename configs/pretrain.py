"""Pretrains an iGPT on a pixel store.

    python -m igpt_jax prepare --workdir=runs/digits --config.source=digits
    python -m igpt_jax pretrain --config=configs/pretrain.py:model=igpt_tiny,steps=500,batch_size=64 \
        --workdir=runs/pretrain --config.data.store=runs/digits

For the masked (BERT) objective, add objective=masked after the colon.
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("pretrain", arguments)
