"""Trains several sizes at equal FLOPs and fits a scaling law: which size is best for which budget?

    python -m igpt_jax scaling --workdir=runs/scaling --config.pretrain.data.store=STORE \
        --config.budgets='(1e12,3e12,1e13)' --config.sizes="('2x32','4x48','4x64','6x96','6x128')"

Every run is an ordinary pretrain job in a folder of the workdir. The same command resumes: finished runs are skipped.
More budgets or sizes can be added later. Writes scaling.json and scaling.csv with a row per run, result.json with the
fitted laws, best sizes and predictions, and figures. An array job of n slices can share the runs:

    python -m igpt_jax scaling --config.shard=I/N --workdir=DIR/slice-I ...   (each I from 0 to N-1)
    python -m igpt_jax scaling --config.shard=merge --workdir=DIR ...
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from igpt_jax import checkpoint, storage
from igpt_jax.config import (
    PlanConfig,
    PretrainConfig,
    ScalingConfig,
    UserError,
    key_attributes,
    parse,
    precision_on,
    values_with,
)
from igpt_jax.data import palette
from igpt_jax.data.store import Split
from igpt_jax.evaluation import completion_score, probing
from igpt_jax.evaluation.completion_score import CompletionScorer
from igpt_jax.evaluation.probing import Prober
from igpt_jax.metrics import figures
from igpt_jax.metrics.logging import say
from igpt_jax.model.dims import Dims
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.objectives import objective_of
from igpt_jax.parallel import sharding, topology
from igpt_jax.parallel.topology import GIB
from igpt_jax.planner.estimate import estimate
from igpt_jax.runtime.exits import Diverged
from igpt_jax.runtime.job import run_in_workdir
from igpt_jax.runtime.precision import set_precision
from igpt_jax.scaling import analysis, charts
from igpt_jax.scaling.study import Planned, model_of, parameter_counts, planned
from igpt_jax.storage import side_files, slices, tables
from igpt_jax.storage.hashes import json_digest
from igpt_jax.training import loop
from igpt_jax.training.inputs import open_inputs

NAME = "scaling"
# Keys in which slices must agree: those that decide the list of runs, and those that change a run's results.
STUDY = {"budgets", "held_out_budgets", "sizes", "batch_size", "probe",
         *(name for name, resume in key_attributes(NAME, "resume").items() if resume != "free")}

Row = dict[str, Any]


def run(config: ScalingConfig, workdir: str) -> dict[str, Any]:
    """Trains the runs that are not done, then fits. Returns `analysis.analyze`'s results; of a slice, only `runs`.

    Raises:
      UserError: the data or a config does not fit, a run's folder holds another run, or runs are of different data.
      Preempted: a stop was requested; the same command resumes.
    """
    folder = storage.path(workdir)
    precision = precision_on(config.pretrain.precision, jax.devices()[0].platform)
    config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, precision=precision))
    data = _open(config.pretrain)
    if config.shard == "merge":
        given, rows = slices.joined(folder, config.job, NAME, STUDY)
        if config.held_out_budgets != tuple(given.get("held_out_budgets", ())):
            raise UserError(f"held_out_budgets={config.held_out_budgets} are not those of the slices. Give the same.")
    else:
        rows = tables.load(folder, NAME)
    if other := [row["run"] for row in rows if row.get("data") != data.fingerprint]:
        raise UserError(f"{folder}: {other[0]} has other images, held-out images or another palette than "
                        f"data.store={config.pretrain.data.store}. Name its store, or give another --workdir.")
    # The machine that merges may have another precision than those that trained.
    precisions = {row["precision"] for row in rows if "precision" in row}
    if len(precisions if config.shard == "merge" else precisions | {precision}) > 1:
        raise UserError(f"{folder} has runs in {' and '.join(sorted(precisions))} (now {precision}). Set "
                        "--config.pretrain.precision, or give another --workdir.")
    if config.shard != "merge":
        rows = _trained(config, planned(config, data.image_size, data.vocabulary), data, folder)
    rows.sort(key=lambda row: (row["budget"], row["parameters_all"]))  # however they were shared, one fit
    rows = [row | {"short": row["steps"] < config.fewest_steps} for row in rows]
    if jax.process_index() == 0:
        tables.publish(folder, NAME, rows)
    if config.slice[1] > 1:
        return {"runs": len(rows)}
    done = [row for row in rows if math.isfinite(row.get("nats_per_pixel") or math.inf)]
    paper = {name: parameter_counts(Dims.of(model_of(name, config.pretrain.model), data.vocabulary, data.image_size,
                                            channels=config.pretrain.channels))["all"]
             for name in analysis.PAPER_TOKENS}
    found = analysis.analyze(done, config.held_out_budgets, config.predict, paper)
    say(found.get("sentence") or f"no law: {found['not_fitted']}")
    if "probe_sentence" in found:
        say(found["probe_sentence"])
    elif "probe_not_fitted" in found:
        say(f"no law of the probe: {found['probe_not_fitted']}")
    if jax.process_index() == 0:
        folder = folder / "figures"
        figures.save(folder / "profiles.png", charts.profiles(done))
        figures.save(folder / "frontier.png", *charts.frontier(found))
        figures.save(folder / "probe_profiles.png", charts.profiles(done, "probe_accuracy"))
        if config.completions:
            figures.save(folder / "completion_profiles.png", charts.profiles(done, config.completion_measure))
    return {"runs": len(rows), **found}


@dataclasses.dataclass(frozen=True)
class _Data:
    """The data of all runs."""
    image_size: int
    vocabulary: int
    examples: int  # of the training split
    fingerprint: str  # of the images, the held-out images and the palette
    held_out: Split


def _open(config: PretrainConfig) -> _Data:
    """Raises UserError if something is missing."""
    if not config.data.held_out:
        raise UserError("pretrain.data.held_out is empty, but runs are compared by their loss on held-out images.")
    inputs = open_inputs(config)
    fingerprint = json_digest([inputs.split.fingerprint, inputs.held_out.fingerprint,
                               palette.digest(inputs.codec.palette_VC)])
    return _Data(inputs.image_size, inputs.codec.vocabulary, inputs.split.count, fingerprint, inputs.held_out)


def _trained(config: ScalingConfig, runs: Sequence[Planned], data: _Data, folder: storage.Path) -> list[Row]:
    """Trains and measures the runs of this slice. Returns their rows."""
    index, count = config.slice
    mine, rows = [run for run in runs if run.turn % count == index], []
    mesh = sharding.make_mesh(config.pretrain.mesh)
    # Everything is checked before any time is spent.
    probed = _check_probes(config, mine, data) if config.probe else []
    scorer = _scorer(config, mesh)
    for each in mine:
        _check(each, data, mesh)
        _check_folder(each, folder / each.name)
    probing.say_notes(config)
    for number, each in enumerate(mine, 1):
        say(f"run {number} of {len(mine)}: {each.name}, {each.parameters['all']:,} parameters, {each.tokens:,} tokens, "
            f"{each.config.steps:,} steps of {each.config.batch_size} images, {each.budget:.3g} FLOPs")
        rows.append(_row(config, each, data, folder / each.name, probed, scorer))
        if jax.process_index() == 0:
            tables.publish(folder, NAME, rows)
    return rows


def _check_probes(config: ScalingConfig, runs: Sequence[Planned], data: _Data) -> list[str]:
    """The fingerprints of the splits to probe. Raises UserError where a run could not be probed on them."""
    for each in runs:
        if not all(0 <= layer <= each.config.model.layers for layer in config.probing.layers):
            raise UserError(f"probing.layers={config.probing.layers}: {each.name} has layers 0 (the embedding) to "
                            f"{each.config.model.layers}. Leave it empty to probe all.")
    store = config.probing.data.store or config.pretrain.data.store
    return probing.check_store(store, config.probing, data.image_size)


def _scorer(config: ScalingConfig, mesh: Mesh) -> CompletionScorer | None:
    """Scores the runs' completions; None without `completions`. Raises UserError if the runs cannot draw."""
    if not config.completions:
        return None
    if not objective_of(config.pretrain).causal:
        raise UserError(f"completions={config.completions}: models with pretrain.objective={config.pretrain.objective} "
                        "cannot sample pixel by pixel. Set completions=0.")
    return CompletionScorer(config, mesh, sharding.whole_batch(config.pretrain.batch_size, mesh))


def _check(planned: Planned, data: _Data, mesh: Mesh) -> None:
    """Raises UserError if a run does not fit the mesh, or by the planner's formula not the devices' memory."""
    config = planned.config
    sharding.check_batch(config.batch_size, mesh, config.accumulate)
    Model.of(config, data.vocabulary, data.image_size, mesh)
    chip = topology.chip_for(mesh.devices.flat[0].device_kind)
    keys = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plan = PlanConfig(**{**keys, "job": "plan", "mesh": config.mesh.resolve(mesh.size),
                         "image_size": data.image_size, "palette_size": data.vocabulary})
    need = estimate(plan.with_microbatches(sharding.batch_shards(mesh))).required_bytes
    if chip and need > chip.usable_bytes:
        raise UserError(f"{planned.name} needs about {need / GIB:.0f} GiB per device, and a {chip.name} has "
                        f"{chip.usable_bytes / GIB:.0f}. Set --config.pretrain.images_per_pass=8 or less, or use more "
                        "devices.")


def _check_folder(planned: Planned, folder: storage.Path) -> None:
    """Raises UserError if a run's folder holds a run with another config."""
    given = side_files.look(folder / "config.json")
    if given is None:
        return
    found, wanted = ({**values_with(each, "resume", "same"), **values_with(each, "resume", "schedule")}
                     for each in (parse("pretrain", given), planned.config))
    if changed := [f"{name}={found[name]!r} (now {wanted[name]!r})" for name in wanted if found[name] != wanted[name]]:
        raise UserError(f"{folder} holds a run with {', '.join(changed[:3])}. Undo the change, or "
                        "give another --workdir.")


def _row(config: ScalingConfig, planned: Planned, data: _Data, folder: storage.Path, probed: list[str],
         scorer: CompletionScorer | None) -> Row:
    """Trains one run, unless it is done, and measures it. `probed` are the fingerprints of the splits to probe."""
    result = checkpoint.from_process_0(lambda: side_files.look(folder / "result.json") or {})
    metrics, status = result.get("metrics", {}), result.get("status")
    if status not in ("done", "diverged"):
        try:
            metrics, status = run_in_workdir(loop.train, planned.config, str(folder)), "done"
        except Diverged:  # its learning rate was too high for this size; the other runs are still worth training
            metrics, status = {}, "diverged"
        jax.clear_caches()  # each run compiles its own programs
    row = {"run": planned.name, "budget": planned.budget, "flops": planned.flops, "tokens": planned.tokens,
           **_columns(planned.parameters), "tokens_per_parameter": planned.tokens / planned.parameters["all"],
           "layers": planned.config.model.layers, "embed": planned.config.model.embed, "steps": planned.config.steps,
           "batch_size": planned.config.batch_size, "precision": planned.config.precision,
           "epochs": planned.config.steps * planned.config.batch_size / data.examples, "status": status,
           "nats_per_pixel": metrics.get("eval/nats_per_pixel"), "data": data.fingerprint}
    if status == "done":
        row |= _probed(config, folder, probed) if config.probe else {}
        row |= _scored(config, data, folder, scorer) if scorer else {}
    return row


def _columns(counts: dict[str, int]) -> dict[str, int]:
    return {f"parameters_{name}": count for name, count in counts.items()}


def _probed(config: ScalingConfig, folder: storage.Path, probed: list[str]) -> Row:
    """The accuracy of the best layer's linear probe, by held-out accuracy. Kept in the run's folder as probed.json."""
    def measure() -> Row:
        mesh = sharding.make_mesh(config.pretrain.mesh)
        model, params, metadata = checkpoint.load_model(str(folder), mesh, "float32")
        batch_size = sharding.whole_batch(config.pretrain.batch_size, mesh)
        columns = Prober(config.probing, metadata).columns(model, params, mesh, batch_size)
        return {name: columns[name] for name in ("probe_layer", "probe_accuracy", "probe_interval")}

    return _kept(folder / "probed.json", [dataclasses.asdict(config.probing), probed], measure)


def _scored(config: ScalingConfig, data: _Data, folder: storage.Path, scorer: CompletionScorer) -> Row:
    """The completion score on held-out images. Kept in the run's folder as scored.json."""
    def measure() -> Row:
        mesh = sharding.make_mesh(config.pretrain.mesh)
        model, params, metadata = checkpoint.load_model(str(folder), mesh, "float32")
        return scorer.columns(str(folder), model, params, metadata, data.held_out)

    asked = [config.completions, config.completion_images, completion_score.identity(config),
             data.held_out.fingerprint]
    return _kept(folder / "scored.json", asked, measure)


def _kept(file: storage.Path, settings: Any, measure: Callable[[], Row]) -> Row:
    """The figures that a file keeps, if they are of the same settings; otherwise `measure`s them, and keeps them."""
    # Older versions measured in the precision of the runs, and had no such mark.
    known, asked = checkpoint.from_process_0(lambda: side_files.load(file) or {}), json_digest(["float32", settings])
    if known.pop("asked", "") == asked:
        return known
    set_precision("float32")  # a run before may have left its own
    found = measure()
    if jax.process_index() == 0:
        storage.publish(file, storage.to_json({**found, "asked": asked}))
    return found
