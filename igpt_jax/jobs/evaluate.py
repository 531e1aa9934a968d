"""Computes the exact loss (nats per pixel) of one or many checkpoints over a whole split.

The result does not depend on the mesh or the batch size. Fine-tuned models also get their accuracy. Linear probes
(probe=True), per-pixel loss maps (loss_maps=N) and a score of completions (completions=K) are optional. With watch=True
the job follows runs and evaluates every step that they save.

Writes evaluation.json and evaluation.csv, a row per checkpoint as soon as it is measured, and figures. The same command
again evaluates only what is missing. An array job of n slices can share many checkpoints; merge joins their tables:

    python -m igpt_jax evaluate --config.shard=I/N --workdir=DIR/slice-I ...   (each I from 0 to N-1)
    python -m igpt_jax evaluate --config.shard=merge --workdir=DIR
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import checkpoint, storage
from igpt_jax.checkpoint import watching
from igpt_jax.config import DataConfig, EvaluateConfig, UserError, values_with
from igpt_jax.config.data import common_splits
from igpt_jax.config.evaluation import COMPLETION_MEASURES
from igpt_jax.data import open_data, open_split
from igpt_jax.data.codecs import Codec
from igpt_jax.data.store import Split
from igpt_jax.data.token_file import TokenFile, tokens_of
from igpt_jax.evaluation import completion_score, exact_loss, loss_maps, probing
from igpt_jax.evaluation.completion_score import CompletionScorer
from igpt_jax.evaluation.drawing import Drawing, default_batch_size, pairs, require_causal
from igpt_jax.evaluation.probing import Prober
from igpt_jax.metrics import charts, figures
from igpt_jax.metrics.logging import say
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.objectives import objective_of
from igpt_jax.parallel import compiler_options, sharding
from igpt_jax.runtime.exits import Ended, Failed
from igpt_jax.storage import side_files, slices, tables
from igpt_jax.storage.arrays import publish_arrays
from igpt_jax.storage.hashes import json_digest
from igpt_jax.storage.json import to_json

NAME = "evaluation"
CHARTS = ("loss", "accuracy by layer", "accuracy over loss")  # of `charts.evaluation`
CAUSAL = ("samples", "completions", "loss_maps")  # keys that need an autoregressive model

Row = dict[str, Any]


def run(config: EvaluateConfig, workdir: str) -> dict[str, Any]:
    """Evaluates each checkpoint that has no row yet.

    Returns:
      The number of `checkpoints` in the table; `nats_per_pixel`, `examples` and, where measured, `accuracy` by
      checkpoint.

    Raises:
      UserError: a checkpoint or the data is missing, or they do not fit each other or the mesh.
      Ended: some checkpoints are damaged or not finite; the table holds all others.
    """
    folder = storage.path(workdir)
    if not config.checkpoints and config.shard != "merge":
        raise UserError("checkpoints is empty. Set --config.checkpoints to workdirs of pretrain or steps of one.")
    if config.shard == "merge":
        rows = _joined(folder)
        _publish(folder, rows)
        return _metrics(rows)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, mesh)
    _check_stores(config)
    options = {"compiler_options": compiler_options.resolve(mesh, config.compiler_options)}
    scorer = CompletionScorer(config, mesh, config.batch_size) if config.completions else None
    asked = _asked(config)
    known = tables.load(folder, NAME)
    rows = [row for row in known if row.get("asked") == asked]
    former = len(rows) < len(known)  # rows of other settings, whose checkpoints may be gone
    first = not rows
    damaged, told = [], False
    for step in watching.on_all_processes(_without_row(config, rows)):
        try:
            identity, *loaded = _loaded(config, step, mesh)
        except checkpoint.NoGoodCheckpoint as error:
            if checkpoint.of_process_0(checkpoint.is_checkpoint(step)):
                say(str(error))
                damaged.append(step)
            else:
                say(f"{step}: its run has removed it in the meantime; skipped")
            continue
        row = {"checkpoint": step, **_measured(config, step, *loaded, mesh, folder, scorer), "asked": asked,
               "identity": identity}
        row = storage.parse_json(to_json(row))  # as read from the table: None for a number that is not finite
        rows = [other for other in rows if other["checkpoint"] != step] + [row]
        if former and jax.process_index() == 0:
            side_files.set_aside(folder / f"{NAME}.json", side_files.FORMER, "was measured with other settings")
        if first and jax.process_index() == 0:
            _remove_former_pictures(config, folder, row)
        former = first = False
        _publish(folder, rows)
        if not told:  # only now is it sure that no error refuses the job
            probing.say_notes(config)
        told = True
        say(f"{step}: {_summary(row)}")
    if not former:
        _publish(folder, rows)
    if damaged:
        raise Ended(f"damaged, not readable or not finite, and not in the table: {', '.join(damaged)}.",
                    _metrics(rows) | options)
    return _metrics(rows) | options


def _loaded(config: EvaluateConfig, step: str, mesh: Mesh) -> tuple[str, Model, Any, checkpoint.Metadata]:
    """(identity, model, parameters, metadata) of a checkpoint.

    Raises NoGoodCheckpoint, on all processes, where it cannot be read or its run has removed it.
    """
    try:  # before the measurement, since its run may remove the step meanwhile
        identity = checkpoint.from_process_0(lambda: checkpoint.identity(step))
    except UserError as error:
        raise checkpoint.NoGoodCheckpoint(str(error)) from None
    try:
        return identity, *checkpoint.load_model(step, mesh, config.precision, config.attention, config.parameters,
                                                config.compiler_options)
    except checkpoint.NoGoodCheckpoint:
        raise
    except UserError as error:  # on all processes
        if checkpoint.of_process_0(checkpoint.is_checkpoint(step)):
            raise
        raise checkpoint.NoGoodCheckpoint(str(error)) from None
    except FileNotFoundError as error:
        if jax.process_count() > 1:  # perhaps on this process alone, which must not wait for the others
            raise Failed(str(error)) from None
        raise checkpoint.NoGoodCheckpoint(str(error)) from None


def _asked(config: EvaluateConfig) -> str:
    """A digest of the keys that affect the table. It leaves out later keys where they have no effect, so that tables of
    versions without them stay valid."""
    keys = values_with(config, "resume", "same")
    off = [name for name in keys if name in ("samples", "views") and keys[name] == getattr(EvaluateConfig, name)
           or name.startswith("completion") and not config.completions]
    return json_digest({name: value for name, value in keys.items() if name not in off})


def _check_stores(config: EvaluateConfig) -> None:
    """Raises UserError if a store or split is missing, before the first checkpoint is waited for or measured."""
    if config.data.store and not config.tokens and not config.data.store.startswith("tfds:"):  # needs the model's size
        open_split(config.data.store, config.data.split, 0)
    if config.probe and (probed := config.probing.data.store or config.data.store):
        probing.check_store(probed, config.probing)


def _without_row(config: EvaluateConfig, rows: list[Row]) -> Iterator[str | None]:
    """Yields the checkpoints of this slice that have no row in `rows`; None before each wait (`watching.follow`)."""
    # A row is kept only if its checkpoint and its data are still the same, whatever their paths are.
    known = {row["checkpoint"]: (row.get("identity"), row.get("data")) for row in rows if "checkpoint" in row}
    fingerprint = functools.cache(lambda *given: _fingerprint(config, _examples(config, *given), *given))

    def is_known(step: str) -> bool:
        try:
            return step in known and known[step] == (checkpoint.identity(step),
                                                     fingerprint(*_needed(checkpoint.load_metadata(step))))
        except UserError:  # removed or damaged; reported when it is loaded
            return False

    def is_wanted(step: str) -> bool:
        if not watching.in_slice(step, *config.slice) or is_known(step):
            return False
        _check_causal(config, step)
        return True

    if config.watch:
        steps = watching.follow(config.checkpoints, config.idle_seconds, config.poll_seconds)
        yield from (step for step in steps if step is None or is_wanted(step))
        return
    wanted = []
    for step in watching.listed(config.checkpoints):  # all are checked before the first is measured
        yield None
        wanted += [step] if is_wanted(step) else []
    yield from wanted


def _check_causal(config: EvaluateConfig, step: str) -> None:
    """Raises UserError where a checkpoint's model cannot give the samples, completions or loss maps asked for."""
    keys = [key for key in CAUSAL if getattr(config, key)]
    try:
        trained = checkpoint.load_metadata(step).config if keys else None
    except UserError:  # removed or damaged; reported when it is loaded
        return
    for key in keys:
        require_causal(objective_of(trained).causal, trained, f"{key}={getattr(config, key)}: {step}", f"Set {key}=0.")


def _measured(config: EvaluateConfig, step: str, model: Model, params: Any, metadata: checkpoint.Metadata, mesh: Mesh,
             folder: storage.Path, scorer: CompletionScorer | None) -> Row:
    """Measures one checkpoint and writes its loss maps. Returns its columns of the table."""
    prober = _prober(config, model, metadata) if config.probe else None
    if not config.tokens:
        checkpoint.store_of(metadata, config.data.store)  # raises UserError where it has moved
    split = _examples(config, *_needed(metadata))
    codec = metadata.codec
    labelled = not isinstance(split, TokenFile) and split.labeled
    if labelled and model.dims.K and config.data.store and _renumbered(config.data.store, metadata):
        say(f"{step}: no accuracy, since {config.data.store} has other classes than the store of its training")
        labelled = False
    measure = exact_loss.make_measure(model, mesh, config.batch_size, codec, views=config.views)
    found = measure(params, split, labeled=labelled)
    row = {"steps": metadata.steps_done, "objective": metadata.config.objective,
           "split": config.tokens or config.data.split, "examples": split.count, **found,
           "bits_per_pixel": found["nats_per_pixel"] / math.log(2)}
    if model.objective.bound:
        row["bound"] = "upper"
    trained = metadata.config.data
    own = not config.tokens and (not config.data.store or bool(
        {*storage.patterns(config.data.store)} & {*storage.patterns(trained.store)}))
    if own and (both := common_splits(config.data.split, trained.split)):
        say(f"{step} was trained on {both}: its figures are of images that it has seen")
        row["trained_on"] = both
    if prober:
        row |= prober.columns(model, params, mesh, config.batch_size)
    if scorer:
        row |= scorer.columns(step, model, params, metadata, split)
    if config.loss_maps:
        found = loss_maps.measure(model, params, split, mesh, config.batch_size, codec, config.loss_maps)
        if jax.process_index() == 0:
            store = config.data.store or metadata.config.data.store
            names = _class_names(store, metadata.image_size) if found.by_class else {}
            _publish_loss_maps(folder, step, found, split, metadata, names)
    if config.samples:
        _draw(config.samples, step, model, params, metadata, mesh, split, folder)
    return row | {"data": _fingerprint(config, split, *_needed(metadata))}


def _needed(metadata: checkpoint.Metadata) -> tuple[str, int, Codec]:
    """The metadata that decides which examples a checkpoint is measured on: its own store, image size and codec."""
    return metadata.config.data.store, metadata.image_size, metadata.codec


def _examples(config: EvaluateConfig, store: str, image_size: int, codec: Codec) -> Split | TokenFile:
    """The examples to evaluate: a file of tokens, or a split of the given or the checkpoint's own store."""
    if config.tokens:
        split = TokenFile(config.tokens, image_size, codec)
    else:
        split = open_split(config.data.store or store, config.data.split, image_size)
    split.count = min(split.count, config.limit or split.count)
    return split


def _draw(count: int, step: str, model: Model, params: Any, metadata: checkpoint.Metadata, mesh: Mesh,
          split: Split | TokenFile, folder: storage.Path) -> None:
    """Draws samples and completions of the first examples' upper halves, as the sample job does by default.

    Writes samples/STEP-DIGEST.npz with all tokens.
    """
    draw = Drawing(model, params, mesh, f"checkpoint {step}")
    ids = np.arange(min(count, split.count))
    originals_BT = tokens_of(split, metadata.codec, ids)
    given = model.dims.Y // 2 * model.dims.row

    def drawn(kind: str, given_BP: np.ndarray) -> np.ndarray:
        return draw(kind, given_BP, pairs(len(given_BP)), batch_size=min(default_batch_size(mesh), len(given_BP)))

    arrays = {"samples": drawn("samples", np.zeros((count, 0), np.int32)), "originals": originals_BT,
              "completions": drawn("completions", originals_BT[:, :given])[:, None],
              "names": [f"example {i}" for i in ids]}
    if jax.process_index() == 0:
        publish_arrays(folder / "samples" / f"{_samples_name(step, metadata.steps_done)}.npz",
                       palette=metadata.palette_VC, codec=metadata.codec.name, checkpoint=step,
                       step=metadata.steps_done, **arrays)


def _samples_name(step: str, steps_done: int) -> str:
    """NAME of a checkpoint's samples: its step and a digest of its path."""
    return f"{steps_done}-{json_digest(step)[:8]}"


def _class_names(store: str, image_size: int) -> Mapping[int, str]:
    """The names of a data set's classes by label; empty if it has none, or if its stores name them differently."""
    data = open_data(DataConfig(store=store, held_out=""), image_size)
    named = getattr(data, "class_names", None) or [getattr(data, "manifest", {}).get("class_names", ())]
    return dict(enumerate(named[0])) if len(named) == 1 else {}


def _renumbered(store: str, metadata: checkpoint.Metadata) -> bool:
    """Whether `store` and that of the training name their classes differently, so that their numbers differ."""
    with contextlib.suppress(UserError, OSError):
        names = [_class_names(each, metadata.image_size) for each in (checkpoint.store_of(metadata), store)]
        return all(names) and names[0] != names[1]
    return False


def _fingerprint(config: EvaluateConfig, split: Split | TokenFile, store: str, *_: Any) -> str:
    """A digest of the evaluated split, of the probed splits and of the features of completions."""
    found = [split.fingerprint]
    if config.probe:
        found += probing.check_store(config.probing.data.store or config.data.store or store, config.probing)
    if config.completions:
        found.append(completion_score.identity(config))
    return json_digest(found)


def _prober(config: EvaluateConfig, model: Model, metadata: checkpoint.Metadata) -> Prober:
    """Raises UserError if the checkpoint could not be probed."""
    data = config.probing.data
    data = dataclasses.replace(data, store=data.store or config.data.store)
    prober = Prober(dataclasses.replace(config.probing, data=data), metadata)
    prober.layers_of(model)
    return prober


def _publish(folder: storage.Path, rows: list[Row]) -> None:
    """Writes the table, sorted by run and step, and its figures. Other processes than process 0 write nothing."""
    if jax.process_index() != 0:
        return
    rows = sorted(rows, key=lambda row: (str(watching.run_of(row["checkpoint"])), row["steps"]))
    tables.publish(folder, NAME, rows)
    drawn = {chart.name: [chart] for chart in charts.evaluation(rows)}
    for name in CHARTS:  # without a chart, a former one is removed
        figures.save(folder / "figures" / f"{name.replace(' ', '_')}.png", *drawn.get(name, []))


def _remove_former_pictures(config: EvaluateConfig, folder: storage.Path, row: Row) -> None:
    """Removes loss maps and samples of other settings: all but those of `row`, the first one of these settings."""
    step, steps_done = row["checkpoint"], row["steps"]
    names = (config.loss_maps and _file_name(folder, step, steps_done),
             config.samples and _samples_name(step, steps_done))
    for place, files in (("surprise", "*.json"), ("figures", "surprise*.png"), ("samples", "*.npz")):
        for file in (folder / place).glob(files):
            if not file.stem.endswith(tuple(filter(None, names))):
                file.unlink()


def _publish_loss_maps(folder: storage.Path, step: str, found: loss_maps.LossMaps, split: Split | TokenFile,
                      metadata: checkpoint.Metadata, names: Mapping[int, str]) -> None:
    """Writes surprise/NAME.json with all losses, and two figures: pictures with loss maps, and mean losses by position
    and class."""
    size, name = metadata.image_size, _file_name(folder, step, metadata.steps_done)
    ids = np.arange(len(found.shown_NT))
    tokens_BT = tokens_of(split, metadata.codec, ids)
    shown_NYXC, by_position_YXC = (each.reshape(-1, size, size, metadata.codec.channels)
                                   for each in (found.shown_NT, found.by_position_T))
    shown_NYX, by_position_YX = (each.sum(axis=-1) for each in (shown_NYXC, by_position_YXC))
    storage.publish(folder / "surprise" / f"{name}.json", to_json({
        "checkpoint": step, "examples": split.count, "nats_by_place": by_position_YX[0].round(6).tolist(),
        **({"nats_by_channel": by_position_YXC[0].mean(axis=(0, 1)).round(6).tolist()} if by_position_YXC.shape[-1] > 1
           else {}),
        "nats_by_class": {label: {"nats_per_pixel": nats, "examples": count}
                          for label, (nats, count) in found.by_class.items()},
        "pictures": [{"example": index, "nats_per_pixel": float(nats_YX.mean(dtype=np.float64)),
                      "nats": nats_YX.astype(np.float64).round(5).tolist()} for index, nats_YX in enumerate(shown_NYX)],
    }, indent=None))
    images_NYXC = metadata.codec.decode(tokens_BT)
    labels = split.labels(ids) if found.by_class else ()
    figures.loss_maps(folder / "figures" / f"surprise-{name}.png", images_NYXC, shown_NYXC,
                      [names.get(label, str(label)) for label in labels])
    figures.loss_by_position(folder / "figures" / f"surprise_means-{name}.png", by_position_YX[0],
                             {names.get(label, str(label)): nats for label, (nats, _) in found.by_class.items()})


def _file_name(folder: storage.Path, step: str, steps_done: int) -> str:
    """NAME of a checkpoint's loss maps: its path, with a dash for all that is no letter or digit."""
    name = re.sub(r"\W+", "-", f"{watching.run_of(step)}-{steps_done}").strip("-")
    # Two paths can have one name, such as `a b` and `a-b`. The second one to be measured gets a digest of its path.
    written = side_files.look(folder / "surprise" / f"{name}.json")
    return name if written is None or written.get("checkpoint") == step else f"{name}-{json_digest(step)[:8]}"


def _joined(folder: storage.Path) -> list[Row]:
    """The rows of all slices, each in a folder of the workdir. Raises UserError if a slice is missing or not done."""
    config, rows = slices.joined(folder, "evaluate", NAME)
    same_data = bool(config["tokens"] or config["data"]["store"])  # else each run is measured on its own store
    if len({(row["asked"], same_data and row.get("data")) for row in rows}) > 1:
        raise UserError(f"shard=merge: {folder}: the slices differ in settings or data. Evaluate them again.")
    return rows


def _metrics(rows: list[Row]) -> dict[str, Any]:
    """The job's metrics: the number of checkpoints, and figures by checkpoint."""
    by_checkpoint = {name: {row["checkpoint"]: row[name] for row in rows if name in row}
                     for name in ("nats_per_pixel", "bits_per_dim", "bound", "accuracy", "examples",
                                  *COMPLETION_MEASURES)}
    by_checkpoint = {name: found for name, found in by_checkpoint.items() if found}
    return {"checkpoints": len(rows), **by_checkpoint}


def _summary(row: Row) -> str:
    """One line about a checkpoint."""
    nats = row["nats_per_pixel"]
    nats = "a loss that is not finite" if nats is None else f"{'at most ' * ('bound' in row)}{nats:.6f} nats per pixel"
    nats += f" ({row['bits_per_dim']:.4f} bits per dimension)" if row.get("bits_per_dim") else ""
    accuracy = f", accuracy {row['accuracy']:.2%}" if "accuracy" in row else ""
    probe = f", probe of layer {row['probe_layer']} {row['probe_accuracy']:.2%}" if "probe_accuracy" in row else ""
    completions = "".join(f", {name} {row[name]:.4g}" for name in COMPLETION_MEASURES if row.get(name) is not None)
    return f"step {row['steps']:,}, {nats} over {row['examples']:,} images{accuracy}{probe}{completions}"
