"""Keys of the prepare job, of splits and of training data."""

import dataclasses
from typing import ClassVar

from igpt_jax.config.keys import (
    Keys,
    at_least,
    key,
    one_of,
    require,
    seed_range,
    shard_syntax,
    slice_of,
    within,
)


def common_splits(one: str, other: str) -> str:
    """The splits that two values such as train+held_out have in common, for a message; empty if there are none."""
    return ", ".join(sorted(set(one.split("+")) & set(other.split("+")) - {""}))


@dataclasses.dataclass(frozen=True)
class SplitConfig(Keys):
    group: ClassVar[str] = "data."

    store: str = key("", "pixel store; empty: the store that the checkpoint was trained on", resume="same")
    split: str = key("held_out", "split of the store; several joined with +", resume="same")


@dataclasses.dataclass(frozen=True)
class DataConfig(Keys):
    group: ClassVar[str] = "data."

    store: str = key("", "pixel store: a workdir of the prepare job (local path, gs:// or s3://); a comma list of "
                         "stores for a mixture; or tfds:NAME[@SPLIT] for images in ArrayRecord files",
                     resume="free", compiled=False)
    weights: tuple[int, ...] = key((), "mixture: images of each store per round; empty: one of each",
                                   resume="same", compiled=False)
    split: str = key("train", "split to train on; several joined with +", resume="same", compiled=False)
    held_out: str = key("held_out", "split to evaluate on while training; empty: none", resume="free", compiled=False)
    augment: str = key("none", "augmentation. none; shift: by up to 1 pixel, black fill; cifar: reflect-pad 4, random "
                               "crop, mirror; imagenet (tfds only): shorter side 256 to 384, random 224 crop (paper, "
                               "Section 3.1)",
                       resume="same", rule=one_of("none", "shift", "cifar", "imagenet"), compiled=False)
    reader: str = key("auto", "input pipeline. tfdata: streams from the store; resident: all tokens in memory, without "
                              "TensorFlow; auto: resident up to 256 MiB of tokens",
                      resume="free", rule=one_of("auto", "tfdata", "resident"), compiled=False)
    stage: str = key("", "local folder to copy the store to before training; empty: no copy",
                     resume="free", compiled=False)
    window: int = key(0, "chunks whose images are shuffled together, for stores with chunk > 1; 0: 1024",
                      resume="same", rule=at_least(0), compiled=False)
    prefetch: int = key(4, "batches read ahead", resume="free", rule=at_least(1), compiled=False)

    def __post_init__(self):
        super().__post_init__()
        require(all(1 <= weight <= 10_000 for weight in self.weights),
                f"data.weights={self.weights} must be integers from 1 to 10,000, such as (1,3).")
        require(not common_splits(self.split, self.held_out),
                f"data.held_out={self.held_out} is also trained on (data.split={self.split}). "
                "Evaluate on another split, or on none with --config.data.held_out=")


@dataclasses.dataclass(frozen=True)
class FinetuneDataConfig(DataConfig):
    store: str = key("", "labeled pixel store, or anything else that pretrain accepts; empty: the store that the "
                         "checkpoint was trained on", resume="free", compiled=False)
    split: str = key("train", "split to train on; train+held_out once the number of steps is chosen (paper, Section "
                              "3.1)", resume="same", compiled=False)
    test: str = key("test", "split of the reported accuracy; empty: none", resume="free", compiled=False)


@dataclasses.dataclass(frozen=True)
class ProbeDataConfig(Keys):
    group: ClassVar[str] = "data."

    store: str = key("", "labeled pixel store; empty: the store that the checkpoint was trained on", resume="same")
    train: str = key("train", "split to fit on", resume="same")
    held_out: str = key("held_out", "split that selects the layer and the penalty; the final probes are fit on both",
                        resume="same")
    test: str = key("test", "split of the reported accuracies", resume="same")

    @property
    def splits(self) -> tuple[str, str, str]:
        return self.train, self.held_out, self.test


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Keys):
    job: str = key("prepare", "the job that this configuration is for", resume="same")
    source: str = key("digits", "training images: digits[:train|:test] | synthetic[:COUNT] | npz:PATH | folder:PATH | "
                                "tar:PATH | tfds:NAME[@SPLIT] (PATH of npz and tar: a glob); store:PATH fits a palette "
                                "only", resume="same")
    test_source: str = key("", "test images, same syntax; empty: no test split", resume="same")
    image_size: int = key(0, "height and width of the stored images, pixels; 0: the source's own", resume="same",
                          rule=at_least(0))
    palette: str = key("", "fit:K (k-means, K colors), or a palette's .npy; empty: fit:17 for digits, else fit:512",
                       resume="same")
    held_out: float = key(0.1, "share of the training images held out (paper: 0.04 for ImageNet, 0.1 for others)",
                          resume="same", rule=within(0, 1, "[)"))
    max_quarantined: float = key(0.001, "maximum share of unusable images (quarantined)", resume="free",
                                 rule=within(0, 1))
    shard: str = key("", "i/n: only slice i of n, from 0; merge: join the slices in the workdir's folders; empty: all",
                     resume="same", rule=shard_syntax)
    chunk: int = key(0, "images per chunk (read together); 0: 1 on a local disk, 64 in a bucket", resume="same",
                     rule=at_least(0))
    workers: int = key(0, "decoding threads; 0: one per core", resume="free", rule=at_least(0))
    seed: int = key(0, "seed of the held-out images and of the palette's initialization", resume="same",
                    rule=seed_range)

    @property
    def slice(self) -> tuple[int, int]:
        """(i, n) of `shard`; (0, 1) if it is empty or `merge`."""
        return slice_of(self.shard)
