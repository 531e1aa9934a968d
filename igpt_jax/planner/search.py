"""Lists every possible mesh, accumulation, remat policy and attention back-end, ranked by estimated step time."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from igpt_jax.config import MeshConfig, PlanConfig
from igpt_jax.model.dims import Dims
from igpt_jax.parallel import topology
from igpt_jax.planner.compilation import Verdict
from igpt_jax.planner.estimate import Estimate, estimate
from igpt_jax.planner.roofline import PUBLIC, Forecast, Speed, forecast

ATTENTIONS = ("auto", "reference")  # auto is the platform's kernel
REMATS = ("none", "dots", "attention", "full")
ACCUMULATES = (1, 2, 4, 8, 16)
MOST_TENSOR = 16  # a larger tensor axis leaves products too narrow for matrix units


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting of mesh, accumulation, remat and attention, with its estimated cost."""
    config: PlanConfig
    estimate: Estimate
    forecast: Forecast


def settings(config: PlanConfig) -> str:
    """The command-line flags for what the search chose."""
    flags = [f"--config.mesh.{axis}={size}" for axis, size in config.mesh.sizes.items() if size != 1 or axis == "fsdp"]
    attention = [] if config.model.attention == "auto" else [f"--config.model.attention={config.model.attention}"]
    split = "images_per_pass" if config.images_per_pass else "accumulate"
    return " ".join([*flags, f"--config.{split}={getattr(config, split)}", f"--config.model.remat={config.model.remat}",
                     *attention])


def meshes(config: PlanConfig, target: topology.Target) -> Iterator[MeshConfig]:
    """Yields every mesh that the number of devices, the batch, heads and tokens allow."""
    dims = Dims.of(config.model, config.vocabulary, config.image_size, channels=config.channels)
    devices = target.devices
    near = target.shape[0] if target.platform == "gpu" else MOST_TENSOR  # tensor exchanges per layer: keep it in a node
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor, context, data in itertools.product(divisors, divisors, divisors):
        fsdp, rest = divmod(devices, tensor * context * data)
        if rest or tensor > min(near, MOST_TENSOR) or dims.N % tensor or config.batch_size % (data * fsdp):
            continue
        # The zigzag exchange gives each device two chunks of the sequence, and splash computes in blocks of 128 tokens.
        granule = 128 if target.platform == "tpu" else 2
        if context > 1 and dims.T % (granule * context) or dims.D % (fsdp * context):
            continue
        # Links between slices or nodes are slow, so that only the batch is split over them.
        if target.groups > 1 and (data * fsdp) % target.groups:
            continue
        yield dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor, context=context)


def candidates(config: PlanConfig, target: topology.Target, speed: Speed = PUBLIC, vary: bool = True
               ) -> list[Candidate]:
    """Every setting that could run: those estimated to fit first, fastest on top, then the others by memory.

    Args:
      config: keeps everything but its mesh and, with `vary`, accumulate, remat and attention.
      target: the devices; they must have a known chip.
      speed: of the devices (see `roofline`).
      vary: also try other accumulations (with images_per_pass, its halves), remat policies and, with attention=auto,
        attention back-ends.
    """
    attentions = ATTENTIONS if config.model.attention == "auto" else (config.model.attention,)
    choices, train = [({}, config.model.remat, config.model.attention)], config.step == "train"
    if vary and not train:  # no gradients: neither microbatches nor remat
        choices = [({}, config.model.remat, attention) for attention in attentions]
    elif vary:
        most = config.images_per_pass
        splits = ([{"images_per_pass": most >> halvings} for halvings in range(most.bit_length())] or
                  [{"accumulate": count} for count in ACCUMULATES])
        choices = list(itertools.product(splits, REMATS, attentions))
    found = []
    for mesh in meshes(config, target):
        shards = mesh.data * mesh.fsdp
        for split, remat, attention in choices:
            if attention in ("reference", "cudnn") and mesh.context > 1:
                continue
            model = dataclasses.replace(config.model, remat=remat, attention=attention)
            changed = dataclasses.replace(config, mesh=mesh, model=model, **split).with_microbatches(shards)
            if train and config.batch_size % (shards * changed.accumulate):
                continue
            guess = estimate(changed)
            busy = guess.busy_flops(changed, target.chip, guess.flops)
            time = forecast(target, mesh.sizes, busy, guess.memory_bytes, guess.collective_bytes, speed)
            found.append(Candidate(changed, guess, time))
    room = target.chip.usable_bytes

    def order(candidate: Candidate) -> tuple:
        fits = candidate.estimate.required_bytes < room
        time = candidate.forecast
        # The formula cannot tell times within 2 % apart. Among those, prefer few microbatches and little communication.
        about = round(50 * math.log(time.step_seconds)) if fits else 0
        # On a GPU only attention without cuDNN's kernel splits a sequence.
        slow = target.platform == "gpu" and candidate.config.mesh.context > 1
        return (not fits, slow, about, candidate.config.accumulate, time.overlapped_seconds,
                candidate.estimate.required_bytes)
    return sorted(found, key=order)


def distinct(ranked: list[Candidate]) -> list[Candidate]:
    """Keeps the first of the candidates that differ only in how the batch is split over data and fsdp."""
    # How the batch is split over data and fsdp changes little else, so these candidates would fill the list with near
    # copies of the best one.
    first: dict[tuple, Candidate] = {}
    for each in ranked:
        mesh, model = each.config.mesh, each.config.model
        first.setdefault((mesh.tensor, mesh.context, each.config.accumulate, model.remat, model.attention), each)
    return list(first.values())


def remedies(config: PlanConfig, verdict: Verdict, target: topology.Target, speed: Speed = PUBLIC,
             usable_bytes: int = 0) -> list[Candidate]:
    """Settings that should fit where `config` did not, the smallest change first.

    Estimates are scaled by the error of the estimate for `config`. `usable_bytes` of a device: by default the chip's.
    """
    # The estimate is off by a similar factor for neighboring settings. Its error is known for this one, whose step was
    # compiled. 5 % of the memory stay in reserve.
    error = verdict.required_bytes / estimate(config).required_bytes if verdict.required_bytes else 1.0
    room = 0.95 * (usable_bytes or target.chip.usable_bytes) / max(error, 1.0)

    def changes(candidate: Candidate) -> int:
        new = candidate.config
        return ((new.mesh != config.mesh) * 2 + (new.accumulate != config.accumulate)
                + (new.model.remat != config.model.remat) + (new.model.attention != config.model.attention))
    fitting = [each for each in candidates(config, target, speed)
               if each.estimate.required_bytes < room and changes(each)]
    return sorted(fitting, key=lambda each: (changes(each), each.forecast.step_seconds))
