"""Packs labeled images as palette colors into one small file, for machines that can download nothing, and unpacks it.

    python benchmarks/pack.py FILE.xz --palette=kmeans_centers.npy --train cifar10_train_*.npz --test cifar10_test.npz
    python benchmarks/pack.py FILE.xz --unpack=FOLDER        # train.npz, test.npz and palette.npy, for `prepare`

An .npz has `images` uint8 [n, Y, X, 3] and `labels` [n]; or, instead of images, sprites in WebP: the files one after
the other (`webp`), their lengths in bytes (`webp_len`), and the images along each side of a sprite (`grid`).

A pixel is stored as the luminance rank of its palette color. Similar colors then have similar numbers, and xz packs
CIFAR-10 into 670 bytes an image, 40 MB in all. Only the palette color of each pixel is kept. It maps back to its own
index, so a store of the unpacked images has exactly the tokens of a store of the originals.

Shapes in names: B images, T tokens, V palette; Y rows, X columns, C channels.
"""

import argparse
import io
import lzma
import pathlib
from collections.abc import Sequence

import exits
import numpy as np
from PIL import Image

from igpt_jax import storage
from igpt_jax.config import UserError
from igpt_jax.data import palette

SPLITS = ("train", "test")


def read(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [B, Y, X, 3] and labels [B] of an .npz."""
    with exits.readable(file, "an .npz of images and labels"), np.load(file) as arrays:
        labels_B = arrays["labels"]
        if "images" in arrays:
            return arrays["images"], labels_B
        images, side = [], int(arrays["grid"])
        for data in np.split(arrays["webp"], np.cumsum(arrays["webp_len"], dtype=np.int64)[:-1]):
            sprite = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
            size = len(sprite) // side
            tiles = sprite.reshape(side, size, side, size, 3).swapaxes(1, 2)
            images.append(tiles.reshape(side * side, size, size, 3))
        return np.concatenate(images)[:len(labels_B)], labels_B


def pack(file: str, palette_VC: np.ndarray, splits: dict[str, Sequence[str]]) -> None:
    """Writes the .npz files of each split into `file`.

    Raises:
      UserError: two colors of the palette are the same in 8 bits.
    """
    table, order_V = palette.lookup_table(palette_VC), by_luminance(palette_VC)
    own_V = palette.encode(palette.decode(np.arange(len(palette_VC)), palette_VC)[:, None, None], table)[:, 0]
    if (own_V != np.arange(len(own_V))).any():
        raise UserError("two colors of the palette are equal in 8 bits, and could not be told apart. Give another one.")
    rank_V = np.argsort(order_V).astype("<u2")
    arrays = {"palette": palette_VC}
    for split, files in splits.items():
        images, labels = zip(*map(read, files), strict=True)
        images_BYXC = np.concatenate(images)
        arrays[f"{split}_ranks"] = rank_V[palette.encode(images_BYXC, table)].reshape(images_BYXC.shape[:3])
        arrays[f"{split}_labels"] = np.concatenate(labels)
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    storage.publish(storage.path(file), lzma.compress(packed.getvalue()))


def unpack(file: str, folder: str) -> None:
    """Writes SPLIT.npz and palette.npy, which the prepare job reads, into `folder`."""
    target = pathlib.Path(folder)
    with exits.readable(file, "a file of pack.py"), lzma.open(file) as packed:
        arrays = np.load(io.BytesIO(packed.read()))
        palette_VC = arrays["palette"]
        found = {split: (arrays[f"{split}_ranks"], arrays[f"{split}_labels"]) for split in SPLITS}
    target.mkdir(parents=True, exist_ok=True)
    colors_VC = palette.decode(by_luminance(palette_VC), palette_VC)
    np.save(target / "palette.npy", palette_VC)
    for split, (ranks_BYX, labels_B) in found.items():
        np.savez(target / f"{split}.npz", images=colors_VC[ranks_BYX], labels=labels_B)


def by_luminance(palette_VC: np.ndarray) -> np.ndarray:
    """The indices of the colors from dark to light, [V]."""
    return np.argsort(palette_VC @ np.float32([0.299, 0.587, 0.114]), kind="stable")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the packed file")
    parser.add_argument("--unpack", metavar="FOLDER", help="unpack into this folder instead")
    parser.add_argument("--palette", help=".npy, such as OpenAI's kmeans_centers.npy")
    for split in SPLITS:
        parser.add_argument(f"--{split}", nargs="+", metavar="NPZ", help=f"{split} images and labels")
    arguments = parser.parse_args()
    if arguments.unpack:
        unpack(arguments.file, arguments.unpack)
        return 0
    if not (arguments.palette and arguments.train and arguments.test):
        parser.error("--palette, --train and --test are needed to pack; --unpack=FOLDER to unpack")
    pack(arguments.file, palette.load(arguments.palette), {split: getattr(arguments, split) for split in SPLITS})
    print(f"{arguments.file}: {pathlib.Path(arguments.file).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    exits.run(main)
