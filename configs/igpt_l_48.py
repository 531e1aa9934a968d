"""iGPT-L of the paper at 48x48 pixels: 1.4B parameters, 2,304 tokens.

    igpt pretrain --config=igpt_l_48 --workdir=DIR --config.data.store=STORE

STORE: ImageNet at 48x48, with OpenAI's 512 colors and 4% of the training images held out.
Paper (Sections 3.3 and 3.4): as iGPT-L at 32x32: batch 128, 1M steps.
Figures: linear probe 65.2% on ImageNet; fine-tuned 72.6%.
Ours: the learning rate of iGPT-L at 32x32. The 0.01 that is quoted second-hand for this run is higher than those of
smaller models; launch/slurm/sweep.sh tries rates downward, as the paper did.
Left open: the learning rate, Adam's epsilon, how images are reduced to 48x48.
Cost on TPUs and GPUs, planned and not measured: docs/scaling.md.
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("pretrain")
    config.model.name = "igpt_l"
    config.model.remat = "dots"
    config.optimizer.learning_rate = 0.001
    config.batch_size = 128
    config.steps = 1_000_000
    return override(config, arguments)
