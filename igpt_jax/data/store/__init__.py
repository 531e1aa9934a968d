"""The pixel store: images and labels of each split, with checksums, on a local disk or in a bucket.

A store is a folder, the workdir of the prepare job:

    manifest.json   what it holds, with SHA-256 digests of every file; written last: a store without it is incomplete
    palette.npy     float32 [V, 3]
    SPLIT/images    zarr 3 array, uint8 [n, Y, X, C]
    SPLIT/labels    zarr 3 array, int32 [n]; where the source has labels
    progress.npz    of an interrupted job: what it has read and not yet written
    slice.json      in place of the manifest and the palette, where the store is a slice to be merged

A store that was merged from slices keeps their folders and names them in its manifest: no pixel is copied.

Any zarr 3 reader opens the arrays. An inner chunk of `chunk` images has a crc32c of its own, in a shard of about 64
MiB: with chunk=1 an image is one small read, and a flipped bit is an error instead of a picture.

Dimensions: B batch, T tokens; Y rows, X columns, C channels.
"""

from igpt_jax.data.store.manifest import MANIFEST, PALETTE, PROGRESS, SLICE, files_in, load_manifest, publish_manifest
from igpt_jax.data.store.reader import Split, Store, split_of, tokens_of
from igpt_jax.data.store.verification import verify
from igpt_jax.data.store.writer import Writer

__all__ = [
    "MANIFEST", "PALETTE", "PROGRESS", "SLICE", "Split", "Store", "Writer", "files_in", "load_manifest",
    "publish_manifest", "split_of", "tokens_of", "verify",
]
