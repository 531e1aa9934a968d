"""Fine-tunes a checkpoint on a labeled store: L_GEN + L_CLF, each with weight 1 (paper, Section 2.3).

    igpt finetune --config=finetune --workdir=runs/finetune --config.checkpoint=runs/pretrain \
        --config.data.augment=cifar --config.eval_every_steps=200 --config.patience=5

Then train again on all labels, for `best_step` steps (from result.json; paper, Section 3.1):

    igpt finetune --config=finetune --workdir=runs/finetune_all \
        --config.checkpoint=runs/pretrain --config.data.augment=cifar --config.data.split=train+held_out \
        --config.data.held_out= --config.steps=1200

Classification alone: --config.generative_weight=0. From scratch: no checkpoint, --config.model.name=igpt_tiny, and
perhaps --config.model.dropout=0.1. At another resolution: --config.data.store=, a store of that size.
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("finetune", arguments)
