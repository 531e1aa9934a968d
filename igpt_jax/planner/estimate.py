"""Estimates memory, FLOPs and traffic of a training step by formula, without a compiler.

It takes microseconds and is off by some tens of per cent. The search ranks thousands of settings with it and compiles
only the best. Letters are those of `model/dims.py`; b images and t tokens are one device's share of a microbatch.
"""

import dataclasses
from collections.abc import Mapping

from igpt_jax.config import PlanConfig
from igpt_jax.model.dims import Dims
from igpt_jax.model.objectives import objective_of
from igpt_jax.parallel.topology import Chip

WHOLE = 4  # bytes of float32, in which parameters and their sums are kept
WIDTHS = {"float32": 4, "float64": 8}  # bytes of activations and products; bfloat16: 2
TPU_TILE = 128  # v6e's units are 256 wide, but the measurements of heads of 128 dims (`roofline`) are not slower there
SECOND_MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "factored": 0.0}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of a step: bytes of one device, FLOPs of all devices together; those of attention are part of `flops`."""
    required_bytes: float
    flops: float
    attention_flops: float
    memory_bytes: float
    collective_bytes: Mapping[str, float]

    def busy_flops(self, config: PlanConfig, chip: Chip, flops: float) -> float:
        """FLOPs that the chip could do while it does `flops` of this training step.

        A TPU's matrix unit multiplies tiles of 128 x 128. Heads of 64 dims leave half of it idle.
        """
        if not chip.name.startswith("TPU"):
            return flops
        head = config.model.embed // config.model.heads
        idle = -(-head // TPU_TILE) * TPU_TILE / head - 1
        return flops * (1 + idle * self.attention_flops / self.flops)


def estimate(config: PlanConfig) -> Estimate:
    """Estimates the training step of a config whose mesh is resolved (no -1)."""
    d, mesh = Dims.of(config.model, config.vocabulary, config.image_size, channels=config.channels), config.mesh
    microbatches, remat, plain = config.accumulate, config.model.remat, config.model.attention == "reference"
    shards = mesh.fsdp * mesh.context  # of a parameter's dim D
    b, t = config.batch_size / (mesh.data * mesh.fsdp * microbatches), d.T / mesh.context
    D, F, width = d.D, d.F, WIDTHS.get(config.precision, 2)
    blocks, tables = d.L * (4 * D * D + 2 * D * F), (2 * d.V + d.positions) * D
    own = (blocks / mesh.tensor + tables) / shards  # parameters stored on one device

    # Memory. Accumulation holds a sum of gradients and those of the current microbatch. The peak is in the backward
    # pass of one block or at the logits, whichever needs more, with all saved activations still held.
    muon = config.optimizer.name == "muon"  # has no second moment of the blocks' matrices
    state = own * WHOLE * (3 if config.optimizer.ema else 2)
    state += (tables / shards if muon else own) * SECOND_MOMENT_BYTES[config.optimizer.second_moment]
    gradients = own * WHOLE * (1 if microbatches == 1 else 2)
    # Values of a block that its backward pass finds saved, for one token. Values that are split over tensor are divided
    # by it. `full`: the block's input. `attention`: also the heads' outputs. `dots`: also the results of all products,
    # which are q, k, v and up, split, and out and down, whole.
    saved_by_remat = {"full": D, "offload": D, "attention": D + D / mesh.tensor,
                      "dots": 3 * D + (4 * D + F) / mesh.tensor, "none": 8 * D + (8 * D + 3 * F) / mesh.tensor}
    saved_bytes = saved_by_remat[remat] * width  # of one token in one layer
    scores = 3 * WHOLE * b * d.N / mesh.tensor * t * d.T if plain else 0.0
    block = b * t * (12 * D + (8 * D + 4 * F) / mesh.tensor) * width + 4 * width * b * d.T * D / mesh.tensor + scores
    whole_weights = 3 * width * blocks / d.L / mesh.tensor + 2 * WHOLE * (d.V + d.positions) * D
    logits = 3 * WHOLE * b * t * d.V
    saved = d.L * (b * t * saved_bytes + (scores if remat == "none" else 0.0))
    required = state + gradients + saved + max(block, logits) + whole_weights

    # FLOPs: forward, twice that backward, and remat's recomputation. Flash attention also computes its scores again.
    products = 2 * blocks * config.batch_size * d.T
    whole = plain or not objective_of(config).causal  # both halves of the scores are computed
    attention = 2 * d.L * config.batch_size * d.T**2 * D * (2 if whole else 1)
    head = 2 * d.V * D * config.batch_size * d.T
    repeated = (remat == "full" or plain and remat in ("attention", "dots")) + (not plain)
    attention *= 3 + repeated
    flops = 3 * (products + head) + attention + (products if remat in ("full", "offload", "attention") else 0)
    flops += newton_schulz_flops(d) if muon else 0

    # Memory traffic: weights and activations of each pass (forward, backward twice, remat), and the optimizer.
    passes = 3 if remat in ("none", "dots") else 4
    activations = passes * d.L * b * t * (8 * D + (4 * D + 3 * F) / mesh.tensor) * width
    moved = microbatches * (passes * width * blocks / mesh.tensor + activations + 3 * d.L * scores) + 8 * WHOLE * own

    # Collectives: weights are gathered forward and backward, and gradients scattered. Tensor parallelism sums
    # activations twice per layer and pass, and context parallelism gathers keys and values.
    reduced = width if mesh.reduce_dtype == config.precision == "bfloat16" else WHOLE
    summed = reduced * (blocks / mesh.tensor + d.V * D) + WHOLE * (d.V + d.positions) * D  # embeddings are never cast
    sent = {
        "data": 2 * microbatches * summed / shards * (mesh.data - 1) / mesh.data,
        "fsdp" if mesh.context == 1 else "fsdp+context":
            (2 * width + reduced) * microbatches * blocks / mesh.tensor * (shards - 1) / shards
            + 3 * WHOLE * tables * (shards > 1),
        "tensor": (2 * passes - 2) * microbatches * d.L * 2 * b * t * D * width * (mesh.tensor - 1) / mesh.tensor,
        "context": (passes + 1) * microbatches * d.L * 2 * b * d.T * D / mesh.tensor * width
                   * (mesh.context - 1) / mesh.context}
    return Estimate(required, flops, attention, moved, {axes: size for axes, size in sent.items() if size})


def newton_schulz_flops(d: Dims) -> float:
    """FLOPs of Muon's orthogonalization in one step: five iterations of X <- a X + (b A + c A A) X with A = X X^T.

    Each costs 4 m^2 n + 2 m^3 for a matrix of m rows and n >= m columns; a block has four of D x D, two of D x F.
    """
    def of(one: int, other: int) -> float:
        m, n = sorted((one, other))
        return 5 * (4 * m * m * n + 2 * m**3)

    return d.L * (4 * of(d.D, d.D) + 2 * of(d.D, d.F))
