"""Makes a pixel store: reads images from any source, resizes and splits them, and fits or imports a palette.

The store is the workdir; `data.store` of the other jobs names it. The same command resumes an interrupted job, and
leaves a complete store as it is. Large sources are prepared in slices, for example by an array job of N tasks, and then
merged:

    python -m igpt_jax prepare --config.shard=I/N --workdir=DIR/slice-I ...   (each I from 0 to N-1)
    python -m igpt_jax prepare --config.shard=merge --workdir=DIR
"""

import contextlib
import dataclasses
import errno
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from igpt_jax import storage
from igpt_jax.config import PrepareConfig, UserError, values_with
from igpt_jax.data import color_sample, images, ingest, palette, sources, store
from igpt_jax.data.sources import contents
from igpt_jax.data.store import Split, Writer
from igpt_jax.metrics.figures import image_grid, save_png
from igpt_jax.metrics.logging import say
from igpt_jax.runtime.exits import Preempted
from igpt_jax.runtime.signals import StopSignal

SHOWN = 12  # images in before_after.png, and class names in a log line


def run(config: PrepareConfig, workdir: str) -> dict[str, Any]:
    """Writes the store.

    Returns:
      Metrics: examples, quarantined, images_per_second (0 if nothing was read).

    Raises:
      UserError: the source, the palette or the workdir cannot be used.
      Preempted: a signal asked the job to stop; its progress is saved.
    """
    if jax.process_count() > 1:
        raise UserError(f"prepare runs as one process, not as {jax.process_count()}. Start a single process.")
    path = storage.path(workdir)
    with _full_disk(path):
        if config.source.startswith("store:"):
            return _palette_alone(config, path)
        return _merge(config, path) if config.shard == "merge" else _prepare(config, path)


def _prepare(config: PrepareConfig, path: epath.Path) -> dict[str, Any]:
    asked = values_with(config, "resume", "same")
    if manifest := store.load_manifest(path) or store.load_manifest(path, store.SLICE):
        _check_same(manifest["config"], asked, path)
        store.check_files(path, manifest)
        say(f"{path} is complete already: nothing to do. Its source was not read again; for new pictures, give another "
            "--workdir.")
        return _metrics(manifest, seconds=None)

    imported, count = _palette_for(config.palette, config.source)
    given, size = _open_sources(config)
    train = given["train"]
    if round(config.held_out * train.count) == train.count:
        raise UserError(f"held_out={config.held_out} leaves none of the {train.count} images for training. Lower it.")

    writer = Writer(path, size, config.chunk or (1 if storage.is_local(path) else 64))
    notes = {"config": asked, "inputs": {split: source.count for split, source in given.items()},
             "contents": {split: dict(source.contents) for split, source in given.items()}}
    resumed = writer.resume()
    # No stored pixel depends on the palette.
    same = resumed and {**resumed["config"], "palette": config.palette} == asked
    if same:
        _check_contents(resumed, notes, path)
    if resumed and not (same and resumed["inputs"] == notes["inputs"]):
        say(f"{path} has an interrupted job of another config or source: starting over")
        writer, resumed = Writer(path, size, writer.chunk), None
    done, bad = (resumed["done"], resumed["quarantined"]) if resumed else ({}, [])
    if done:
        say("resuming after " + ", ".join(f"{number:,} {split} images" for split, number in done.items()))

    inputs = sum(notes["inputs"].values())
    quarantine = ingest.Quarantine(inputs, config.max_quarantined, bad)
    start = time.perf_counter()
    try:
        with StopSignal(saves=True) as stop:
            finished = ingest.ingest(given, writer, quarantine, image_size=size, held_out=config.held_out,
                                     seed=config.seed, workers=config.workers, notes=notes, done=done,
                                     stopping=stop.should_stop)
    finally:
        if quarantine.entries:
            storage.publish(path / "quarantined.json", json.dumps(quarantine.entries, indent=1) + "\n")
        else:
            (path / "quarantined.json").unlink(missing_ok=True)  # of an attempt that started over
    if not finished:
        raise Preempted(f"stopped; the progress on {inputs:,} images is saved.")
    seconds = time.perf_counter() - start
    if not config.shard:
        quarantine.check_some_left("train", train.count)

    resized = any(source.sizes != {size} for source in given.values())
    fields = {"source": config.source, "seed": config.seed, "config": asked, "quarantined": quarantine.entries,
              "resize": images.RESIZE_RULE if resized else "none", "class_names": list(train.class_names),
              "held_out": {"share": config.held_out, "rule": ingest.HELD_OUT_RULE}, "contents": notes["contents"],
              "skipped": {split: dict(source.skipped) for split, source in given.items() if source.skipped}}
    chosen = None if config.shard else _choose(writer.split("train"), imported, count, config.seed, path)
    manifest = writer.finish(chosen, **fields)
    _log_result(manifest, path)
    return _metrics(manifest, seconds, sum(done.values()))


def _open_sources(config: PrepareConfig) -> tuple[dict[str, sources.Source], int]:
    """Opens the sources of train and test; returns them and the images' size. Logs what they skip and their classes."""
    train = sources.open_source(config.source, config.image_size, config.seed, config.slice)
    given, size = {"train": train}, config.image_size or max(train.sizes)
    if config.test_source:  # another seed, so that synthetic test images differ from the training images
        given["test"] = sources.open_source(config.test_source, size, config.seed + 1, config.slice)
    for split, source in given.items():
        for notice in source.notices:
            say(notice)
        for kind, files in source.skipped.items():
            say(f"skipping {files:,} files that are not named like pictures: {kind}")
        if names := source.class_names:
            shown = names if len(names) <= SHOWN else (*names[:SHOWN - 2], "...", names[-1])
            plural = "es" if len(names) > 1 else ""
            say(f"{split}: {len(names):,} class{plural}: {contents.on_one_line(shown)}")
    return given, size


def _check_contents(resumed: Mapping[str, Any], notes: Mapping[str, Any], path: epath.Path) -> None:
    """Raises UserError if a source has changed since the interrupted job started."""
    for split, now in notes["contents"].items():
        then = resumed.get("contents", {}).get(split, {})
        if differs := contents.difference(then, now, ("the interrupted job", "the source now")):
            raise UserError(f"{path}: the source of {split} has changed since this job was interrupted: {differs}. "
                            f"Restore it, or remove {path / store.PROGRESS} to start over.")


def _merge(config: PrepareConfig, path: epath.Path) -> dict[str, Any]:
    """Joins the slices in the workdir's folders by a manifest that lists their arrays. No pixel is copied."""
    if manifest := store.load_manifest(path):
        _check_same(manifest["config"], {"palette": config.palette, "shard": "merge"}, path)
        store.check_files(path, manifest)
        say(f"{path} is complete already: nothing to do.")
        return _metrics(manifest, seconds=None)
    folders = storage.children(path)
    found = storage.concurrently(lambda folder: folder.is_dir() and store.load_manifest(folder, store.SLICE), folders)
    slices = {folder.name: manifest for folder, manifest in zip(folders, found, strict=True) if manifest}
    if not slices:
        raise UserError(f"shard=merge: no folder in {path} has a finished slice. Prepare shard=i/n there first.")
    first = next(iter(slices.values()))
    imported, count = _palette_for(config.palette, first["source"])
    by_number: dict[int, str] = {}
    for name, manifest in slices.items():
        number, n = map(int, manifest["config"]["shard"].split("/"))
        if number in by_number:
            raise UserError(f"{path}: {by_number[number]} and {name} are both slice {number}/{n}. Move one away.")
        by_number[number] = name
        _check_same({**first["config"], "shard": f"{number}/{first['config']['shard'].split('/')[1]}"},
                    manifest["config"], path / name)
        _check_same_contents(first, manifest, path)
    missing = [f"{i}/{n}" for i in range(n) if i not in by_number]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {n} slices are not finished: {', '.join(missing[:5])}. Run prepare "
                        "for them, then merge.")
    # A field that the fingerprints cover. Stores merged without it keep their order of ids.
    aligned = {"aligned": True} if first["chunk"] > 1 else {}
    splits, files, quarantined, skipped = {}, {}, [], {}
    for number in range(n):
        name = by_number[number]
        manifest = slices[name]
        say(f"verifying {name}")
        store.verify(path / name, manifest)
        files |= {f"{name}/{file}": known for file, known in manifest["files"].items()}
        quarantined += [{**entry, "slice": name} for entry in manifest["quarantined"]]
        skipped |= {f"{name}/{split}": kinds for split, kinds in manifest["skipped"].items()}
        for split, content in manifest["splits"].items():
            joined = splits.setdefault(split, {"count": 0, "parts": [], **aligned})
            joined["count"] += content["count"]
            joined["parts"] += [{**part, "folder": f"{name}/{part['folder']}"} for part in content["parts"]]
    for split, content in splits.items():
        if len({part["labels_sha256"] is None for part in content["parts"] if part["count"]}) > 1:
            raise UserError(f"{path}: some slices have labels for {split} and others none. Prepare all with "
                            "labels, or none.")
    fields = {name: first[name] for name in ("image_size", "chunk", "source", "seed", "resize", "held_out",
                                             "class_names")}
    fields |= {"splits": splits, "quarantined": quarantined, "skipped": skipped,
               "classes": max(manifest["classes"] for manifest in slices.values()),
               "config": {**first["config"], "shard": "merge", "palette": config.palette}}
    if quarantined:
        storage.publish(path / "quarantined.json", json.dumps(quarantined, indent=1) + "\n")
    if "train" not in splits:
        ingest.Quarantine(0, 1, quarantined).check_some_left("train", 0)
    train = store.split_of(path, "train", splits, fields["image_size"], fields["chunk"])
    manifest = store.publish_manifest(path, _choose(train, imported, count, first["seed"], path), fields, files)
    _log_result(manifest, path)
    return _metrics(manifest, seconds=None)


def _check_same_contents(one: Mapping[str, Any], other: Mapping[str, Any], path: epath.Path) -> None:
    """Raises UserError if the source changed between two slices, according to their manifests."""
    names = tuple(f"slice {manifest['config']['shard']}" for manifest in (one, other))
    try:
        known = [manifest.get("contents", {"train": {"classes": list(map(contents.nfc, manifest["class_names"]))}})
                 for manifest in (one, other)]
        found = {split: contents.difference(content, known[1].get(split, {}), names)
                 for split, content in known[0].items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: {' or '.join(names)} has a {store.SLICE} that was changed after it was written. "
                        "Restore it, or remove it and prepare the slice again.") from None
    for split, differs in found.items():
        if differs:
            raise UserError(f"{path}: the source of {split} changed between {' and '.join(names)}: {differs}. Remove "
                            "the slice that is wrong and prepare it again.")


def _palette_alone(config: PrepareConfig, path: epath.Path) -> dict[str, Any]:
    """Makes a palette for an existing store: palette.npy in the workdir, for the key `palette` of other jobs."""
    if any((path / name).exists() for name in (store.MANIFEST, store.SLICE, store.PROGRESS)):
        raise UserError(f"{path} holds a pixel store, which keeps its palette. Give the new palette another --workdir.")
    for name in ("image_size", "test_source", "chunk", "shard"):
        if getattr(config, name) != getattr(PrepareConfig, name):
            raise UserError(f"{name} has no effect on source={config.source}, of which only a palette is made. Leave it"
                            " out, or prepare the images again from their source.")
    opened = store.Store.open(config.source.removeprefix("store:"))
    split = opened.split("train")
    chosen = _imported_or_fit(split, *_palette_for(config.palette, config.source), config.seed)
    if (path / store.PALETTE).exists() and not np.array_equal(palette.load(str(path / store.PALETTE)), chosen):
        raise UserError(f"{path} holds another palette. Give the new one another --workdir.")
    _report(split, chosen, config.seed, path)
    palette.save(path / store.PALETTE, chosen)
    say(f"the palette is ready: --config.palette={path / store.PALETTE}")
    return _metrics(opened.manifest, seconds=None)


def _metrics(manifest: dict[str, Any], seconds: float | None, earlier: int = 0) -> dict[str, Any]:
    examples, bad = sum(split["count"] for split in manifest["splits"].values()), len(manifest["quarantined"])
    return {"examples": examples, "quarantined": bad,
            "images_per_second": (examples + bad - earlier) / seconds if seconds else 0.0}


def _log_result(manifest: dict[str, Any], path: epath.Path) -> None:
    counts = ", ".join(f"{split['count']:,} {name}" for name, split in manifest["splits"].items())
    bad = f", {len(manifest['quarantined'])} in quarantine (quarantined.json)" if manifest["quarantined"] else ""
    say(f"{path}: {counts} images of {manifest['image_size']}x{manifest['image_size']}{bad}")
    images = sum(split["count"] for split in manifest["splits"].values())
    if manifest["classes"] > images and not manifest["class_names"]:
        say(f"the labels run to {manifest['classes'] - 1}, with {images:,} images: to probe or finetune, number the "
            "classes 0, 1, 2, ... without a gap")


def _check_same(stored: Mapping[str, Any], asked: Mapping[str, Any], path: epath.Path) -> None:
    differences = [f"{name}={asked[name]!r} (there: {stored.get(name)!r})"
                   for name in asked if stored.get(name) != asked[name]]
    if differences:
        raise UserError(f"workdir {path} has a pixel store of another config: {', '.join(differences)}. "
                        "Give another --workdir.")


def _palette_for(text: str, source: str) -> tuple[np.ndarray | None, int]:
    """The imported palette and 0, or None and the number of colors to fit.

    Args:
      text: the config's `palette`.
      source: of the training images; decides the default.
    """
    text = text or ("fit:17" if source.startswith("digits") else "fit:512")
    if not text.startswith("fit:"):
        return palette.load(text), 0
    count = text.removeprefix("fit:")
    if not (re.fullmatch(r"\d{1,6}", count) and 2 <= int(count) <= palette.LARGEST):
        raise UserError(f"palette={text!r}: the K of fit:K must be an integer from 2 to {palette.LARGEST}.")
    return None, int(count)


def _choose(split: Split, imported: np.ndarray | None, count: int, seed: int, path: epath.Path) -> np.ndarray:
    """The palette [V, 3] of a split, with its report."""
    if imported is None:
        say(f"fitting a palette of {count} colors")
    palette_VC = _imported_or_fit(split, imported, count, seed)
    _report(split, palette_VC, seed, path)
    return palette_VC


def _imported_or_fit(split: Split, imported: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    if imported is not None:
        return imported
    return palette.fit(color_sample.sample_pixels(split, seed), count, seed)


def _report(split: Split, palette_VC: np.ndarray, seed: int, path: epath.Path) -> None:
    """Writes palette.json and figures, which show a palette's quality on a split."""
    report = color_sample.report(split, palette_VC, seed)
    storage.publish(path / "palette.json", json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    quality = "exact" if report.psnr_db is None else f"{report.psnr_db:.2f} dB PSNR"
    say(f"palette: {report.used} of {report.colours} colors used, {quality} on {report.images:,} images")
    _draw(path / "figures", palette_VC, split.read(color_sample.sample_ids(split, seed, SHOWN)))


def _draw(folder: epath.Path, palette_VC: np.ndarray, images_BYXC: np.ndarray) -> None:
    """Draws palette.png, a square per color, and before_after.png, images above and their quantized versions below."""
    colors_V1XC = palette.decode(np.arange(len(palette_VC)), palette_VC)[:, None, None, :]
    columns = int(np.ceil(np.sqrt(2 * len(palette_VC))))
    save_png(folder / "palette.png", image_grid(colors_V1XC, columns, scale=16, gap=0))
    table = palette.lookup_table(palette_VC)
    after_BYXC = palette.decode(palette.encode(images_BYXC, table), palette_VC).reshape(images_BYXC.shape)
    both, scale = np.concatenate([images_BYXC, after_BYXC]), max(1, 96 // images_BYXC.shape[1])
    save_png(folder / "before_after.png", image_grid(both, len(images_BYXC), scale))


@contextlib.contextmanager
def _full_disk(path: epath.Path) -> Iterator[None]:
    """Turns the error of a full disk into a UserError. TensorStore raises ValueError with the system's message."""
    try:
        yield
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(f"no space is left for {path}. Free disk space and run the same command: it resumes from "
                            "its last save.") from None
        raise
