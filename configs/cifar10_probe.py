"""The paper's linear probe of CIFAR-10 (Section 4.3) and its low-data rows (Section 4.7).

    igpt probe --config=cifar10_probe --workdir=DIR --config.checkpoint=CHECKPOINT \
        --config.data.store=STORE

CHECKPOINT: a model of 32x32 pixels. STORE: CIFAR-10 at 32x32 (`prepare --config.source=tfds:cifar10
--config.test_source=tfds:cifar10@test`), a tenth of the training images held out, no augmentation.
Paper: logistic regression by L-BFGS on the best layer's pooled features; low data with 4, 25 and 400 labels per class,
five draws.
Figures, iGPT-L: 96.3%; low data 73.2, 87.6 and 94.3%. The last layer costs 2.4 points.
Left open: the strength of the penalty (here chosen on the held-out images) and the scale of features (here 1).
Cost: not planned; `plan` compiles pretraining, evaluation and sampling.
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("probe")
    config.labels_per_class = (4, 25, 400)
    config.draws = 5
    return override(config, arguments)
