"""The pixel store: uint8 images and labels of each split, with checksums, on a local disk or in a bucket.

A store is a folder, the workdir of the prepare job:

    manifest.json   splits, settings and the SHA-256 of every file; written last: a store without it is incomplete
    palette.npy     float32 [V, 3]
    SPLIT/images    zarr 3 array, uint8 [n, Y, X, C]
    SPLIT/labels    zarr 3 array, int32 [n]; only if the source has labels
    progress.npz    only of an interrupted job: its state, and images not yet written
    slice.json      only of a slice that is to be merged: replaces manifest.json and palette.npy

A store merged from slices keeps the slices' folders, and its manifest lists them. No pixel is copied. Where a split is
`aligned`, the images of whole chunks have the first ids.

Any zarr 3 reader opens the arrays. A shard has about 64 MiB and consists of inner chunks of `chunk` images, each with
its own crc32c. With chunk=1 an image is one small read. A flipped bit is an error instead of a wrong image.

Dimensions: B batch, T tokens; Y rows, X columns, C channels.
"""

from igpt_jax.data.store.manifest import (
    MANIFEST,
    PALETTE,
    PROGRESS,
    SLICE,
    check_files,
    damaged,
    files_in,
    load_manifest,
    publish_manifest,
    size_and_hash,
)
from igpt_jax.data.store.reader import Split, Store, split_of
from igpt_jax.data.store.verification import verify
from igpt_jax.data.store.writer import Writer

__all__ = [
    "MANIFEST", "PALETTE", "PROGRESS", "SLICE", "Split", "Store", "Writer", "check_files", "damaged", "files_in",
    "load_manifest", "publish_manifest", "size_and_hash", "split_of", "verify",
]
