"""Which mesh, how many parts, which remat and attention: all that are possible, ranked by estimate."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from igpt_jax.config import MeshConfig, PlanConfig
from igpt_jax.model.dims import Dims
from igpt_jax.parallel import topology
from igpt_jax.planner.compilation import Verdict
from igpt_jax.planner.estimate import Estimate, estimate
from igpt_jax.planner.evidence import Evidence
from igpt_jax.planner.roofline import Forecast, forecast

ATTENTIONS = ("auto", "reference")  # auto: the platform's kernel
REMATS = ("none", "dots", "attention", "full")
ACCUMULATES = (1, 2, 4, 8, 16)
MOST_TENSOR = 16  # more tensor parts than this leave products too narrow for matrix units


@dataclasses.dataclass(frozen=True)
class Candidate:
    config: PlanConfig
    estimate: Estimate
    forecast: Forecast


def settings(config: PlanConfig) -> str:
    """The flags that ask for what the search chose."""
    mesh = dataclasses.asdict(config.mesh)
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items() if size != 1 or axis == "fsdp"]
    attention = [] if config.model.attention == "auto" else [f"--config.model.attention={config.model.attention}"]
    return " ".join([*flags, f"--config.accumulate={config.accumulate}", f"--config.model.remat={config.model.remat}",
                     *attention])


def meshes(config: PlanConfig, target: topology.Target) -> Iterator[MeshConfig]:
    """All meshes that the devices, batch, heads and tokens allow."""
    dims = Dims.of(config.model, config.palette_size, config.image_size)
    devices = target.devices
    near = target.shape[0] if target.platform == "gpu" else MOST_TENSOR  # tensor stays in a node
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor, context, data in itertools.product(divisors, divisors, divisors):
        fsdp, rest = divmod(devices, tensor * context * data)
        if rest or tensor > min(near, MOST_TENSOR) or dims.N % tensor or config.batch_size % (data * fsdp):
            continue
        # Splash takes blocks of 128 tokens; whatever the back-end, fewer of them are not worth a device.
        if context > 1 and dims.T % (256 * context) or dims.D % (fsdp * context):
            continue
        if target.groups > 1 and (data * fsdp) % target.groups:
            continue
        yield MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)


def candidates(config: PlanConfig, target: topology.Target, share: float, vary: bool = True) -> list[Candidate]:
    """Every setting that could run, the fastest that fits by estimate first, then the rest by memory.

    Args:
      config: all but the mesh, and with `vary` all but accumulate, remat and attention, stays as it is.
      target: with a chip.
      share: of the roofline (see `roofline`).
      vary: try other numbers of parts, remat policies and, where none is asked for, attention back-ends.
    """
    attentions = ATTENTIONS if config.model.attention == "auto" else (config.model.attention,)
    choices = [(config.accumulate, config.model.remat, config.model.attention)]
    if vary:
        choices = list(itertools.product(ACCUMULATES, REMATS, attentions))
    found = []
    for mesh in meshes(config, target):
        for parts, remat, attention in choices:
            if config.batch_size % (mesh.data * mesh.fsdp * parts) or attention == "reference" and mesh.context > 1:
                continue
            model = dataclasses.replace(config.model, remat=remat, attention=attention)
            changed = dataclasses.replace(config, mesh=mesh, accumulate=parts, model=model)
            guess = estimate(changed)
            time = forecast(target, dataclasses.asdict(mesh), guess.flops, guess.memory_bytes, guess.collective_bytes,
                            share, Evidence.UNCALIBRATED)
            found.append(Candidate(changed, guess, time))
    room = target.chip.usable_bytes

    def order(candidate: Candidate) -> tuple:
        fits = candidate.estimate.required_bytes < room
        time = candidate.forecast
        alike = round(50 * math.log(time.step_seconds)) if fits else 0  # the formula cannot tell 2 % apart
        return not fits, alike, candidate.config.accumulate, time.overlapped_seconds, candidate.estimate.required_bytes
    return sorted(found, key=order)


def distinct(ranked: list[Candidate]) -> list[Candidate]:
    """The first of those that differ only in how data and fsdp share the batch."""
    first: dict[tuple, Candidate] = {}
    for each in ranked:
        mesh, model = each.config.mesh, each.config.model
        first.setdefault((mesh.tensor, mesh.context, each.config.accumulate, model.remat, model.attention), each)
    return list(first.values())


def remedies(config: PlanConfig, verdict: Verdict, target: topology.Target, share: float) -> list[Candidate]:
    """Settings that should fit where `config` did not, the least changed first.

    The estimates are scaled by how far off the one for `config` was.
    """
    off = verdict.required_bytes / estimate(config).required_bytes if verdict.required_bytes else 1.0
    room = 0.95 * target.chip.usable_bytes / max(off, 1.0)

    def changes(candidate: Candidate) -> int:
        new = candidate.config
        return ((new.mesh != config.mesh) * 2 + (new.accumulate != config.accumulate)
                + (new.model.remat != config.model.remat) + (new.model.attention != config.model.attention))
    fitting = [each for each in candidates(config, target, share) if each.estimate.required_bytes < room]
    return sorted(fitting, key=lambda each: (changes(each), each.forecast.step_seconds))
