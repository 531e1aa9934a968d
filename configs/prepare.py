"""Makes a pixel store of images: reads, resizes, holds a share out, and fits or imports a palette.

    python -m igpt_jax prepare --config=configs/prepare.py --workdir=runs/digits
    python -m igpt_jax prepare --config=configs/prepare.py:image_size=16 --workdir=runs/cifar10 \
        --config.source='npz:cifar10_train_*.npz' --config.test_source=npz:cifar10_test.npz \
        --config.palette=kmeans_centers.npy
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("prepare", arguments)
