"""iGPT-L of the paper: 1.4B parameters, 32x32 pixels.

    igpt pretrain --config=igpt_l --workdir=DIR --config.data.store=STORE

STORE: ImageNet at 32x32, with OpenAI's 512 colors and 4% of the training images held out.
Paper (Sections 3.3 and 3.4): batch 128, 1M steps, Adam (0.9, 0.95), one epoch of warm-up, then cosine to 0, float32,
no weight decay, dropout or clipping. The learning rate 0.001 is quoted second-hand.
Figures: 2.0466 nats per pixel on the ImageNet test split (OpenAI's released checkpoint); linear probes 60.3% on
ImageNet, 96.3% on CIFAR-10. At 48x48: igpt_l_48.py.
Ours: products and activations in bfloat16 over float32 parameters; --config.precision=float32 is the paper's.
Left open: Adam's epsilon, how images are reduced to 32x32.
Memory: parameters and Adam's moments take 16 GB; the backward pass recomputes each block.
Cost on TPUs and GPUs, planned and not measured: docs/scaling.md.
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("pretrain")
    config.model.name = "igpt_l"
    config.model.remat = "full"
    config.optimizer.learning_rate = 0.001
    config.batch_size = 128
    config.steps = 1_000_000
    return override(config, arguments)
