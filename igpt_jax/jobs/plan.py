"""Predicts memory, speed and cost of a run by compiling its training step, without the accelerators it would run on.

Writes plan.json, plan.txt and figures/plan.png. Without a mesh, the plan uses the one with the lowest estimated time.

- TPU topologies need libtpu: pip install '.[plan]'.
- GPU topologies need jax[cuda13] in an environment of its own, named by --config.python.
- Compiled programs are cached in $IGPT_CACHE.
"""

import dataclasses
import statistics
from typing import Any

import jax
from tqdm import tqdm

from igpt_jax import checkpoint, process, storage
from igpt_jax.config import DataConfig, MeshConfig, PlanConfig, UserError
from igpt_jax.metrics import charts, figures
from igpt_jax.metrics.logging import say
from igpt_jax.parallel import topology
from igpt_jax.parallel.topology import GIB, Target
from igpt_jax.planner import search
from igpt_jax.planner.answer import Answer, answer, table
from igpt_jax.planner.evidence import Evidence
from igpt_jax.planner.roofline import PUBLIC, Speed, flat
from igpt_jax.planner.verdicts import verdict_for
from igpt_jax.runtime.exits import Ended
from igpt_jax.storage import side_files, to_json
from igpt_jax.training.optimizer import check_second_moment

REMEDY_COMPILES = 3  # settings compiled to find one that fits
COUNTS = tuple(2**power for power in range(13))  # devices on the plot


def run(config: PlanConfig, workdir: str) -> dict[str, Any]:
    """Plans one run. Returns `parameters`, `fits`, `bytes_per_device`, `hbm_bytes`, `step_seconds`, `mfu` and
    `mfu_interval`, and `tokens_per_second_per_device`.

    Raises:
      UserError: the topology is unknown, does not fit the mesh, or its compiler is missing; or the batch cannot be
        split.
      Ended: the compiler crashed or failed, so there is no answer.
    """
    check_second_moment(config.optimizer)
    _refuse_without_effect(config)
    target = _target(config)
    speed = _speed(config, target)
    lines = []
    if config.search:
        found = _search(config, target, speed)
        lines, result = [*_ranking(found), ""], found[0]
    else:
        config = _with_mesh(config, target, speed)
        result = answer(config, target, verdict_for(config), speed)
    if result.fits is None:  # its parameters and bytes are unknown, so there is no table
        raise Ended(f"no plan for {config.topology}: {result.verdict.message.rstrip('.')}. Try another "
                    "model.attention, mesh or version of jaxlib.", {"fits": None})
    rows, plan = result.rows(), result.to_dict()
    if result.fits is False and config.step == "train":
        plan["what_would_fit"] = _remedy(result, speed)
        rows.append(("what would fit", plan["what_would_fit"], Evidence.COMPILER))
    if config.data != DataConfig():
        say("igpt_jax plan: data.* has no effect: a plan reads no data.")
    if jax.process_index() == 0:
        text = "\n".join([*lines, table(rows)])
        process.say(text)
        folder = storage.path(workdir)
        side_files.no_longer_done(folder)
        storage.publish(folder / "plan.txt", text + "\n")
        storage.publish(folder / "plan.json", to_json(plan))
        if result.forecast and config.step == "train":
            _draw(result, speed, folder / "figures" / "plan.png")
    return result.metrics


def _refuse_without_effect(config: PlanConfig) -> None:
    """Raises UserError for keys that other keys leave without effect.

    Not a rule of the config itself: each candidate of a search is a config with a mesh.
    """
    if config.search:
        config.mesh.refuse_given(*config.mesh.sizes, why="with search=True, which chooses the mesh. Leave one out.")
        config.refuse_given("accumulate", why="with search=True, which chooses it. Leave one out.")
    else:
        config.refuse_given("search_compiles", why="without search. Set search=True.")
    if config.images_per_pass:
        config.refuse_given("accumulate", why="with images_per_pass, from which it follows. Leave one out.")
    if config.codec != "palette":
        config.refuse_given("palette_size", why=f"on codec={config.codec}. Leave it out.")
    if config.calibration:
        config.refuse_given("roofline_share", why="with calibration. Leave one out.")


def _target(config: PlanConfig) -> Target:
    """The devices to plan for; topology=attached stands for those of this machine."""
    target = topology.parse(config.topology)
    if target.platform != "attached":
        return target
    return topology.like(jax.devices()[0].device_kind, len(jax.devices()))


def _with_mesh(config: PlanConfig, target: Target, speed: Speed) -> PlanConfig:
    """The config with its mesh resolved; without a mesh, with the one estimated to be the fastest."""
    if config.mesh.sizes != MeshConfig().sizes:
        mesh = config.mesh.resolve(target.devices)
        return dataclasses.replace(config, mesh=mesh).with_microbatches(mesh.data * mesh.fsdp)
    if config.step == "sample" and config.batch_size % target.devices == 0:  # the sample job's own default
        return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=target.devices, fsdp=1))
    return _candidates(config, target, speed, vary=False)[0].config


def _candidates(config: PlanConfig, target: Target, speed: Speed, vary: bool) -> list[search.Candidate]:
    """The meshes (and with `vary` other settings) to choose from, the fastest first. Raises UserError if none works."""
    found = search.candidates(config, target, speed, vary)
    if not found:
        raise UserError(f"batch_size={config.batch_size} with {config.model.heads} heads and "
                        f"{config.image_size ** 2 * config.channels:,} tokens cannot be split over the "
                        f"{target.devices} devices of {config.topology}. "
                        "Choose a batch_size with more powers of two, or fewer devices.")
    return found


# Calibration.

def _speed(config: PlanConfig, target: Target) -> Speed:
    """That of public runs; or scaled by the median of the user's own; or a fixed share of the roofline."""
    if not config.calibration:
        return flat(config.roofline_share) if config.roofline_share else PUBLIC
    scales = []
    for path in storage.patterns(config.calibration):
        for workdir in storage.matching(path):
            scales.append(_scale_of(config, target, str(workdir)))
    if not scales:
        raise UserError(f"calibration={config.calibration!r} names no workdir. Give finished workdirs of pretrain.")
    return dataclasses.replace(PUBLIC, scale=statistics.median(scales), evidence=Evidence.CALIBRATED)


def _scale_of(config: PlanConfig, target: Target, workdir: str) -> float:
    """The measured step time of one run over its planned one."""
    metadata = checkpoint.load_metadata(workdir)
    if metadata.config.job != "pretrain":
        raise UserError(f"calibration={workdir} is a workdir of {metadata.config.job}. Give finished ones of pretrain.")
    result = side_files.look(storage.path(workdir) / "result.json")
    if not result:
        raise UserError(f"calibration={workdir}: its result.json is missing or damaged. Run its command again.")
    device, speed = result["device"], result["metrics"].get("images_per_second")
    ran_on = topology.like(device["kind"], device["count"])
    if ran_on.chip != target.chip:
        raise UserError(f"calibration={workdir} ran on {ran_on.chip.name}, not on {target.chip.name}. Give runs on the "
                        "same kind of device.")
    if not speed:
        raise UserError(f"calibration={workdir}: result.json has no images_per_second. Give a run with more steps.")
    same = {field.name: getattr(metadata.config, field.name) for field in dataclasses.fields(metadata.config)
            if field.name not in ("job", "mesh", "image_size")}
    ran = dataclasses.replace(config, **same, mesh=metadata.config.mesh.resolve(device["count"]), topology=ran_on.name,
                              step="train", image_size=metadata.image_size, palette_size=metadata.codec.vocabulary)
    planned = answer(ran, ran_on, verdict_for(ran), dataclasses.replace(PUBLIC, evidence=Evidence.CALIBRATED))
    if not planned.forecast:
        raise UserError(f"calibration={workdir}: its step does not compile here: {planned.verdict.message}")
    return ran.batch_size / speed / planned.forecast.step_seconds


# Search.

def _search(config: PlanConfig, target: Target, speed: Speed) -> list[Answer]:
    """Compiles the most promising settings. Returns those that fit, the fastest first; then those that do not; then
    those that failed to compile."""
    ranked = _candidates(config, target, speed, vary=True)
    tried = search.distinct(ranked)[:config.search_compiles]
    say(f"igpt_jax plan: {len(ranked):,} settings by estimate; compiling {len(tried)}")
    found, refusal = [], None
    for candidate in tqdm(tried, unit="compile", desc="search", disable=None):
        try:
            found.append(answer(candidate.config, target, verdict_for(candidate.config), speed))
        except UserError as error:  # an attention back-end may refuse a setting that the estimate accepts
            refusal = error
    if refusal and not found:
        raise refusal
    return sorted(found, key=lambda each: (each.fits is None, not each.fits, each.forecast.step_seconds
                                           if each.fits and each.forecast else each.verdict.required_bytes))


def _ranking(found: list[Answer]) -> list[str]:
    """The lines of the table of compiled settings."""
    lines = [("GiB per device", "s per step", "setting")]
    for each in found:
        seconds = f"{each.forecast.step_seconds:.3g}" if each.forecast else "-"
        fits = {True: "", False: " no", None: " failed"}[each.fits]
        lines.append((f"{each.verdict.required_bytes / GIB:.2f}{fits}".removeprefix("0.00 "), seconds,
                      search.settings(each.config)))
    return [f"{memory:18}  {seconds:10}  {setting}" for memory, seconds, setting in lines]


def _remedy(result: Answer, speed: Speed) -> str:
    """The smallest change of settings with which the step fits, found by compiling."""
    tried = search.remedies(result.config, result.verdict, result.target, speed, result.usable_bytes)[:REMEDY_COMPILES]
    for candidate in tqdm(tried, unit="compile", desc="looking for settings that fit", disable=None):
        try:
            other = answer(candidate.config, result.target, verdict_for(candidate.config), speed)
        except UserError:  # an attention back-end refuses the setting
            continue
        if other.fits:
            return f"{search.settings(candidate.config)} takes {other.verdict.required_bytes / GIB:.2f} GiB"
    larger = topology.resized(result.target, 2 * result.target.devices)
    return f"nothing tried ({len(tried)} settings); more devices might: {larger.name if larger else 'a larger slice'}"


def _draw(result: Answer, speed: Speed, path: Any) -> None:
    """Draws step time and memory over the number of devices."""
    curve = []
    for count in COUNTS:
        target = topology.resized(result.target, count)
        found = target and search.candidates(result.config, target, speed, vary=False)
        if found:
            curve.append((count, found[0].forecast.step_seconds, found[0].estimate.required_bytes))
    config = result.config
    title = (f"{config.model.name} at {config.image_size}x{config.image_size}, batch {config.batch_size}, "
             f"{result.target.chip.name}: step time is {result.forecast.evidence}")
    compiled = (result.target.devices, result.forecast.step_seconds, result.verdict.required_bytes)
    figures.save(path, *charts.scaling(curve, compiled, result.usable_bytes), title=title)
