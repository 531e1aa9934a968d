"""Makes a pixel store of images: reads, resizes, holds a share out, and fits or imports a palette.

    igpt prepare --config=prepare --workdir=runs/digits
    igpt prepare --config=prepare:data=cifar10 --workdir=runs/cifar10
    igpt prepare --config=prepare:image_size=16 --workdir=runs/cifar10_16 \
        --config.source='npz:cifar10_train_*.npz' --config.test_source=npz:cifar10_test.npz \
        --config.palette=kmeans_centers.npy

`data=NAME` sets source, test_source, image_size and held_out to a row of DATA; any other TFDS image set goes by its
name, --config.source=tfds:NAME.
"""

from igpt_jax.config import UserError, base_config, nearest, override

# Source, test source, image size, share held out (paper, Section 3.1: 0.04 of ImageNet, 0.1 of the others).
DATA = {
    "cifar10": ("tfds:cifar10", "tfds:cifar10@test", 32, 0.1),
    "cifar100": ("tfds:cifar100", "tfds:cifar100@test", 32, 0.1),
    "stl10": ("tfds:stl10", "tfds:stl10@test", 32, 0.1),
    "imagenet2012": ("tfds:imagenet2012", "tfds:imagenet2012@validation", 32, 0.04),
    "imagenet2012_48": ("tfds:imagenet2012", "tfds:imagenet2012@validation", 48, 0.04),
    "imagenet2012_64": ("tfds:imagenet2012", "tfds:imagenet2012@validation", 64, 0.04),
    "imagenet_resized_32": ("tfds:imagenet_resized/32x32", "tfds:imagenet_resized/32x32@validation", 32, 0.04),
    "imagenet_resized_64": ("tfds:imagenet_resized/64x64", "tfds:imagenet_resized/64x64@validation", 64, 0.04),
    "downsampled_imagenet_64": ("tfds:downsampled_imagenet/64x64", "tfds:downsampled_imagenet/64x64@validation", 64,
                                0.04),
}


def get_config(arguments: str = ""):
    named = [part for part in arguments.split(",") if part.startswith("data=")]
    config = base_config("prepare")
    for name in (part.removeprefix("data=") for part in named):
        if name not in DATA:
            raise UserError(f"data={name!r} is not known. {nearest(name, list(DATA))}")
        config.source, config.test_source, config.image_size, config.held_out = DATA[name]
    return override(config, ",".join(part for part in arguments.split(",") if part not in named))
