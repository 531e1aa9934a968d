"""Makes a pixel store: images from any source, resized, split, and a palette fit to them or imported.

The store is the workdir; `data.store` of the other jobs names it. An interrupted job starts over; a complete store is
left as it is.

Dimensions: B images of a chunk, P pixels; Y rows, X columns, C channels.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from igpt_jax import palette, storage, telemetry
from igpt_jax.config import PrepareConfig, UserError
from igpt_jax.data import order, sources
from igpt_jax.data.store import Writer, load_manifest

HELD_OUT_RULE = "train image i of n, in the source's order, is held out if order.permute(i, n, seed, 0) < round(h n)"
SHOWN = 12  # images in before_after.png


def run(config: PrepareConfig, workdir: str) -> dict[str, Any]:
    """Writes the store.

    Returns:
      Metrics: examples, quarantined, images_per_second (0 where the store was there already).

    Raises:
      UserError: the source, the palette or the workdir do not do.
    """
    if jax.process_count() > 1:
        raise UserError(f"prepare runs as one process, not as {jax.process_count()}. Start it by itself.")
    path, asked = storage.path(workdir), dataclasses.asdict(config)
    if manifest := load_manifest(path):
        _check_same(manifest["config"], asked, path)
        telemetry.say(f"{path} is complete already: nothing to do.")
        return _metrics(manifest, seconds=None)

    imported, colours = _palette_for(config)
    train = sources.open_source(config.source, config.image_size, config.seed)
    size = config.image_size or max(train.sizes)
    test = None
    if config.test_source:  # made-up test images must not be the training images again
        test = sources.open_source(config.test_source, size, config.seed + 1)
    held_out = round(config.held_out * train.count)
    if held_out == train.count:
        raise UserError(f"held_out={config.held_out} leaves none of the {train.count} images to train on. Lower it.")

    writer, start = Writer(path, size), time.perf_counter()
    pixels, shown = _PixelSample(train.count, size, config.seed), []
    ids = np.arange(train.count)
    is_held_out = order.permute(ids, train.count, config.seed, epoch=0) < held_out
    for first, images, labels in _resized(train, size, "train"):
        out = is_held_out[first:first + len(images)]
        for split, chosen in (("train", ~out), ("held_out", out)):
            writer.add(split, images[chosen], None if labels is None else labels[chosen])
        pixels.add(images[~out])
        shown = shown or [images[:SHOWN]]
    for _, images, labels in _resized(test, size, "test") if test else ():
        writer.add("test", images, labels)
    seconds = time.perf_counter() - start

    if imported is None:
        telemetry.say(f"fits a palette of {colours} colours")
    palette_VC = palette.fit(pixels.pixels_PC, colours, config.seed) if imported is None else imported
    _draw(path / "figures", palette_VC, shown[0])
    resized = train.sizes != {size} or test is not None and test.sizes != {size}
    manifest = writer.finish(palette_VC, source=config.source, seed=config.seed, config=asked,
                             resize=sources.RESIZE_RULE if resized else "none",
                             held_out={"share": config.held_out, "rule": HELD_OUT_RULE})
    counts = ", ".join(f"{split['count']:,} {name}" for name, split in manifest["splits"].items())
    telemetry.say(f"{path}: {counts} images of {size}x{size}, {len(palette_VC)} colours")
    return _metrics(manifest, seconds)


def _metrics(manifest: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    examples = sum(split["count"] for split in manifest["splits"].values())
    return {"examples": examples, "quarantined": len(manifest["quarantined"]),
            "images_per_second": examples / seconds if seconds else 0.0}


def _check_same(stored: dict[str, Any], asked: dict[str, Any], path: epath.Path) -> None:
    differences = [f"{name}={asked[name]!r} (there: {stored.get(name)!r})"
                   for name in asked if stored.get(name) != asked[name]]
    if differences:
        raise UserError(f"workdir {path} holds a pixel store of another config: {', '.join(differences)}. "
                        "Give another --workdir.")


def _palette_for(config: PrepareConfig) -> tuple[np.ndarray | None, int]:
    """The imported palette, or None and the number of colours to fit."""
    text = config.palette or ("fit:17" if config.source == "digits" else "fit:512")
    if not text.startswith("fit:"):
        return palette.load(text), 0
    colours = text.removeprefix("fit:")
    if not (colours.isdigit() and 2 <= int(colours) <= palette.LARGEST):
        raise UserError(f"palette={text!r}: fit:K takes a whole number of 2 to {palette.LARGEST} colours.")
    return None, int(colours)


def _resized(source: sources.Source, size: int, name: str) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yields the first index, the images uint8 [B, size, size, 3] and the labels of each chunk."""
    first = 0
    with tqdm(total=source.count, desc=name, unit="image", disable=not sys.stderr.isatty()) as bar:
        for images, labels in source.chunks():
            yield first, sources.resize(images, size), labels
            first += len(images)
            bar.update(len(images))


class _PixelSample:
    """A seeded sample of the pixels of a stream, for the palette: the same share of each chunk."""

    def __init__(self, images: int, size: int, seed: int):
        self._share = min(1.0, 2 * palette.FIT_PIXELS / (images * size**2))
        self._rng, self._chosen = np.random.default_rng(seed), []

    def add(self, images_BYXC: np.ndarray) -> None:
        pixels_PC = images_BYXC.reshape(-1, 3)
        if self._share < 1:
            count = round(self._share * len(pixels_PC))
            pixels_PC = pixels_PC[self._rng.integers(len(pixels_PC), size=count)] if count else pixels_PC[:0]
        self._chosen.append(pixels_PC)

    @property
    def pixels_PC(self) -> np.ndarray:
        return np.concatenate(self._chosen)


def _draw(folder: epath.Path, palette_VC: np.ndarray, images_BYXC: np.ndarray) -> None:
    """palette.png: a square for each colour. before_after.png: images above, the same in the palette below."""
    colours_V1XC = palette.decode(np.arange(len(palette_VC)), palette_VC)[:, None, None, :]
    columns = int(np.ceil(np.sqrt(2 * len(palette_VC))))
    telemetry.save_png(folder / "palette.png", telemetry.image_grid(colours_V1XC, columns, scale=16, gap=0))
    table = palette.lookup_table(palette_VC)
    after_BYXC = palette.decode(palette.encode(images_BYXC, table), palette_VC).reshape(images_BYXC.shape)
    both, scale = np.concatenate([images_BYXC, after_BYXC]), max(1, 96 // images_BYXC.shape[1])
    telemetry.save_png(folder / "before_after.png", telemetry.image_grid(both, len(images_BYXC), scale))
    ratio = palette.psnr(images_BYXC, table, palette_VC)
    quality = f"{ratio:.1f} dB PSNR" if np.isfinite(ratio) else "exact"
    telemetry.say(f"palette: {len(palette_VC)} colours, {quality} on {len(images_BYXC)} images")
