"""Decodes the images of sources into a store's splits, on all cores, in bounded memory, and resumably.

Dimensions: B images of a group; Y rows, X columns, C channels.
"""

import collections
import concurrent.futures
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from igpt_jax.config import UserError
from igpt_jax.data import images, order
from igpt_jax.data.sources.base import Item, Source
from igpt_jax.data.sources.contents import on_one_line
from igpt_jax.data.store import Writer

GROUP, GROUP_BYTES = 64, 2**23  # images per task of a decoding thread, and bytes that end one with fewer
WAITING_BYTES = 2**30  # of all tasks
SAVE_SECONDS = 60.0
# Every fingerprint covers this text, so not even its spelling may change.
HELD_OUT_RULE = ("train image i of n, in the source's order (each slice's own), is held out if "
                 "order.permute(i, n, seed, 0) < round(h n)")


class Quarantine:
    """The list of unusable images with their reasons. Too many of them end the job.

    Args:
      inputs: number of all images.
      share: the largest fraction of them that may be unusable.
      entries: from an interrupted job.
    """

    def __init__(self, inputs: int, share: float, entries: Sequence[Mapping[str, str]] = ()):
        self.entries, self._inputs, self._share = [dict(entry) for entry in entries], inputs, share

    def add(self, split: str, name: str, reason: str) -> None:
        """Adds an image to the list."""
        self.entries.append({"split": split, "name": name, "reason": reason})

    def check(self) -> None:
        """Raises UserError if too many images are unusable."""
        if len(self.entries) > self._share * self._inputs:
            raise UserError(f"{len(self.entries)} of {self._inputs:,} images cannot be used, more than max_quarantined="
                            f"{self._share:g} allows; {self._first()} Fix or remove them, or raise "
                            "--config.max_quarantined.")

    def check_some_left(self, split: str, count: int) -> None:
        """Raises UserError if all `count` images of a split are in quarantine."""
        if sum(entry["split"] == split for entry in self.entries) >= count:
            raise UserError(f"none of the {count:,} {split} images can be used; {self._first()} Fix them, or give "
                            "another source.")

    def _first(self) -> str:
        first = self.entries[0]
        return f"the first: {first['name']}: {first['reason']}. quarantined.json lists them all."


def ingest(sources: Mapping[str, Source], writer: Writer, quarantine: Quarantine, *, image_size: int, held_out: float,
           seed: int, workers: int, notes: Mapping[str, Any], done: Mapping[str, int],
           stopping: Callable[[], bool]) -> bool:
    """Reads all images of `sources` into `writer`; the fraction `held_out` of train goes to the split of that name.

    Args:
      sources: split -> its source.
      writer: of the store.
      quarantine: receives the unusable images.
      image_size: of the store, pixels.
      held_out: fraction of the training images.
      seed: chooses the held-out images.
      workers: decoding threads; 0: one per core.
      notes: JSON to save with the progress once a minute; `done` and `quarantined` are added.
      done: split -> number of images that an interrupted job has read.
      stopping: returns whether to save and stop early.

    Returns:
      Whether all images are read; False if it stopped early.

    Raises:
      UserError: too many images are unusable, some have labels and others none, or a source has changed.
    """
    done, saved = {split: done.get(split, 0) for split in sources}, time.monotonic()

    def save() -> None:
        writer.save({**notes, "done": done, "quarantined": quarantine.entries})

    for split, source in sources.items():
        chosen = round(held_out * source.count) if split == "train" else 0
        relabel = _relabelling(sources["train"], source, split)
        with tqdm(total=source.count, initial=done[split], desc=split, unit="image", dynamic_ncols=True,
                  disable=not sys.stderr.isatty()) as bar:
            for group in _decoded(source.items(done[split]), image_size, workers):
                ids = np.arange(done[split], done[split] + len(group))
                out = order.permute(ids, source.count, seed, 0) < chosen
                for name, mask in (("held_out", out), (split, ~out)) if chosen else ((split, ~out),):
                    _add(writer, name, [pair for pair, wanted in zip(group, mask, strict=True) if wanted], relabel)
                for item, result in group:
                    if isinstance(result, images.Unusable):
                        quarantine.add(split, item.name, str(result))
                quarantine.check()
                done[split] += len(group)
                bar.update(len(group))
                if stopping():
                    save()
                    return False
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        if done[split] != source.count:
            raise UserError(f"the source of {split} gave {done[split]:,} of {source.count:,} images: it is damaged, or "
                            "changed in the meantime. Restore it and run the same command again.")
    save()  # what follows may fail, for example where there are fewer colors than the palette should have
    return True


Decoded = tuple[Item, "np.ndarray | images.Unusable"]


def _decoded(items: Iterator[Item], image_size: int, workers: int) -> Iterator[list[Decoded]]:
    """Yields groups in order. At most two groups per thread, or WAITING_BYTES, and one group more are in memory."""
    workers = workers or os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # Pillow releases Python's lock
        waiting: collections.deque[tuple[concurrent.futures.Future, int]] = collections.deque()
        try:
            for group, size in _groups(items):
                waiting.append((pool.submit(_decode, group, image_size), size))
                while len(waiting) > 2 * workers or sum(size for _, size in waiting) > WAITING_BYTES:
                    yield waiting.popleft()[0].result()
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()


def _groups(items: Iterator[Item]) -> Iterator[tuple[list[Item], int]]:
    """Yields groups of at most GROUP items with their bytes in memory; GROUP_BYTES end a group early."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += 0 if callable(item.content) else memoryview(item.content).nbytes
        if len(group) == GROUP or size >= GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _decode(group: list[Item], image_size: int) -> list[Decoded]:
    return [(item._replace(content=b""), _one(item, image_size)) for item in group]


def _one(item: Item, image_size: int) -> "np.ndarray | images.Unusable":
    try:
        content = item.content
        if isinstance(content, np.ndarray):
            return images.shrink(content, image_size)
        return images.decode(content() if callable(content) else content, image_size)
    except images.Unusable as reason:
        return reason


def _add(writer: Writer, split: str, group: list[Decoded], relabel: Callable[[int], int]) -> None:
    good = [(item, image) for item, image in group if not isinstance(image, images.Unusable)]
    if not good:
        return
    labels = [item.label for item, _ in good if item.label is not None]
    try:
        if len(labels) not in (0, len(good)):
            raise ValueError("some images have no labels")
        labels_B = np.array([relabel(label) for label in labels], np.int32) if labels else None
        writer.add(split, np.stack([image for _, image in good]), labels_B)
    except ValueError:
        raise UserError(f"images of {split} near {good[0][0].name}: some have labels and others none. Give "
                        "labels to all or none.") from None


def _relabelling(train: Source, source: Source, split: str) -> Callable[[int], int]:
    """A function from a source's class numbers to those of the training images, by class name if both have names."""
    if not train.class_names or not source.class_names or train.class_names == source.class_names:
        return lambda label: label
    number = {name: i for i, name in enumerate(train.class_names)}
    unknown = sorted(set(source.class_names) - number.keys())
    if unknown:
        raise UserError(f"the {split} images have classes that the training images lack: {on_one_line(unknown[:5])}. "
                        "Give the folders the same names.")
    numbers = [number[name] for name in source.class_names]
    return lambda label: numbers[label]
