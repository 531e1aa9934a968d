"""Opens the data of a run: splits, codec, classes, and batches from any position on."""

import dataclasses

from jax.sharding import Mesh

from igpt_jax import checkpoint
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.data import Batches, count_classes, open_data, palette, train_batches
from igpt_jax.data.codecs import Codec, codec_of
from igpt_jax.data.store import Split
from igpt_jax.parallel import sharding
from igpt_jax.runtime.startup import agree


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The opened and checked data of a run."""
    config: PretrainConfig
    split: Split  # trained on
    held_out: Split | None
    image_size: int
    classes: int  # number of label classes; 0: the run does not train on labels
    codec: Codec

    @property
    def chunks(self) -> str:
        """Images per chunk of each store, such as `64` or `64,1`. The order of the images follows them."""
        return ",".join(str(component.chunk) for component in self.split.components)

    @property
    def held_out_fingerprint(self) -> str:
        """Of the held-out images; empty if there are none."""
        return self.held_out.fingerprint if self.held_out else ""

    def batches(self, position: int, mesh: Mesh) -> Batches:
        """Batches from `position`, a number of steps in the data order, on."""
        data = self.config.data
        return train_batches(self.split, self.codec, reader=data.reader, seed=self.config.seed,
                             batch_size=self.config.batch_size, start_step=position,
                             sharding=sharding.batch_sharding(mesh), prefetch=data.prefetch, augment=data.augment,
                             window=data.window, labeled=self.classes > 0)


def open_inputs(config: PretrainConfig) -> Inputs:
    """Opens the data that the config names, and checks that all processes see the same.

    Raises:
      UserError: the store, a split or the palette is missing, a key has no effect on such a store, or processes see
        different data.
    """
    if config.data.store.startswith("tfds:"):
        config.data.refuse_given("weights", why="on tfds:, which is no mixture of stores. Leave it out; to resume "
                                 "a run that had it, with accept_changes=data.weights.")
    store = open_data(config.data, config.image_size)
    split = store.split(config.data.split)
    held_out = store.split(config.data.held_out) if config.data.held_out else None
    finetuning = config.finetuning
    classes = count_classes(store, split) if finetuning else 0
    codec = _codec_for(config, store)
    inputs = Inputs(config, split, held_out, store.image_size, classes, codec)
    agree(palette=palette.digest(codec.palette_VC), data=split.fingerprint, chunks=inputs.chunks,
          held_out=inputs.held_out_fingerprint)
    return inputs


def _codec_for(config: PretrainConfig, store) -> Codec:
    """The codec of the checkpoint that a run fine-tunes, or that of its config."""
    if config.finetuning and config.finetuning.checkpoint:
        return checkpoint.load_metadata(config.finetuning.checkpoint).codec
    if config.codec != "palette":
        return codec_of(config.codec, Codec.palette_VC)
    palette_VC = palette.load(config.palette) if config.palette else store.palette
    if palette_VC is None:
        raise UserError(f"data.store={store.path} has no palette of its own. Set --config.palette to the .npy file of "
                        "a palette, or another --config.codec.")
    return codec_of("palette", palette_VC)
