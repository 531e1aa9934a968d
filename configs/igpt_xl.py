"""iGPT-XL of the paper: 6.8B parameters, 64x64 pixels.

    igpt pretrain --config=igpt_xl --workdir=DIR --config.data.store=STORE

STORE: the paper used ImageNet and 100M web images that are not public, in a mixture of unknown weights. ImageNet at
64x64 is what others can prepare; several stores are mixed by --config.data.store=A,B --config.data.weights='(1,9)'.
Paper (Sections 3.3 and 3.4): batch 64, 2M steps, Adam (0.9, 0.95), one epoch of warm-up, then cosine to 0, float32,
no weight decay, dropout or clipping. The learning rate 0.0003 is quoted second-hand.
Figures: 68.7% by linear probe on ImageNet, 72.0% on the features of five layers. No loss was published.
Ours: products and activations in bfloat16 over float32 parameters; --config.precision=float32 is the paper's.
Left open: the number of heads (24 of 128 here, for matrix units), what one epoch is on 101M images, Adam's epsilon.
Memory: parameters and Adam's moments take 82 GB, split over mesh.fsdp; with more than 64 devices
there are fewer images than devices: let several share each image with mesh.tensor or mesh.context.
Cost on TPUs and GPUs, planned and not measured: docs/scaling.md.
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("pretrain")
    config.model.name = "igpt_xl"
    config.model.remat = "full"
    config.optimizer.learning_rate = 0.0003
    config.batch_size = 64
    config.steps = 2_000_000
    return override(config, arguments)
