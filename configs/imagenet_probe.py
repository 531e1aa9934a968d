"""The paper's linear probe of ImageNet (Section 4.4), by SGD.

    igpt probe --config=imagenet_probe --workdir=DIR --config.checkpoint=CHECKPOINT \
        --config.data.store=STORE

STORE: ImageNet at the model's resolution, labeled, 4% of the training images held out.
Paper (Section 3.4): momentum 0.9, learning rates tried from 30 down, 1M iterations, cosine; XL also on five layers
(--config.concatenate=5).
Figures: S 41.9%, M 54.5%, L 60.3%, L at 48x48 65.2%, XL at 64x64 68.7%, on five layers 72.0%.
Left open: batch size (here 1024), weight decay and augmentation (here none).
Memory: the features of all layers are kept, float32: 5.5 GB per layer of 1,024 features, and of one layer
twice; name fewer with layers.
Cost: not planned; `plan` compiles pretraining, evaluation and sampling.
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("probe")
    config.solver = "sgd"
    config.steps = 1_000_000
    config.baselines = False
    return override(config, arguments)
