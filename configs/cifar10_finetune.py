"""The paper's fine-tuning on CIFAR-10 (Section 4.5).

    igpt finetune --config=cifar10_finetune --workdir=DIR --config.checkpoint=CHECKPOINT \
        --config.data.store=STORE

CHECKPOINT: a model of 32x32 pixels. STORE: CIFAR-10 at 32x32, a tenth of the training images held out.
Paper: generative and classification loss, equally; head on the mean of the last layer; pretraining's batch size and
betas, no cosine, about a tenth of its learning rate, no dropout; pixels padded by 4, cropped and mirrored; stopped at
the best held-out accuracy, then held-out images folded back: --config.data.split=train+held_out
--config.data.held_out= --config.patience=0 --config.steps=STEPS, the first run's best_step.
Figures, iGPT-L: 99.0%; BERT 98.6%.
Left open: the number of steps, the exact learning rate (set a tenth of the model's), warm-up (here none).
Cost: not planned; `plan` compiles pretraining, evaluation and sampling.
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("finetune")
    config.data.augment = "cifar"
    config.optimizer.learning_rate = 1e-4
    config.batch_size = 128
    config.patience = 5
    return override(config, arguments)
