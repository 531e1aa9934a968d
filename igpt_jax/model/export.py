"""Exports programs that need only jax: StableHLO of sampler, losses and features, and the weights.

    folder/sampler.jax     (weights, given int32 [B, P], seeds uint32 [B]) -> tokens int32 [B, T]
    folder/losses.jax      (weights, tokens int32 [B, T]) -> nats per pixel float32 [B]
    folder/features.jax    (weights, tokens int32 [B, T]) -> features of every layer, float32 [B, L + 1, D], on which
                           the probe job fits its linear classifiers
    folder/classes.jax     (weights, tokens int32 [B, T]) -> logits float32 [B, K] of a linear probe, if one is given
    folder/weights.npz     float32 arrays by name
    folder/palette.npy     float32 [V, 3] in [-1, 1]: 8-bit colors are 127.5 (c + 1)
    folder/run.py          samples images with the files above; an example for your own program

Programs take any batch size B, and run on every platform that they were exported for.

B batch, P given tokens, T tokens, V palette, L layers, D embed, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from igpt_jax.model import objectives
from igpt_jax.model.features import make_feature_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import Sampling, generate
from igpt_jax.parallel.trees import by_name

RUN = '''\
"""Draws pictures: python run.py COUNT OUT.npz. Needs jax alone; given pixels come before those drawn."""

import pathlib
import sys

import jax
import numpy as np
from jax import export

here = pathlib.Path(__file__).parent


def stop(why):
    print(f"run.py: {why}", file=sys.stderr)
    sys.exit(2)


def read(name, how):
    try:
        return how(here / name)
    except Exception as error:
        stop(f"{here / name} cannot be read ({' '.join(str(error).split())[:200]}). Export it again.")


def arrays(file):
    with np.load(file) as given:
        return dict(given)


if len(sys.argv) != 3 or not sys.argv[1].isdecimal() or not int(sys.argv[1]):
    stop("give the number of pictures, 1 or more, and a file: python run.py 8 drawn.npz")
count, out = int(sys.argv[1]), pathlib.Path(sys.argv[2])
if out.is_dir() or not out.absolute().parent.is_dir():
    stop(f"{out} cannot be written: name a file in a folder that exists.")
sampler = read("sampler.jax", lambda file: export.deserialize(bytearray(file.read_bytes())))
weights = read("weights.npz", arrays)
palette = read("palette.npy", np.load)
given_pixels = sampler.in_avals[-2].shape[1]
try:
    given = np.zeros((count, given_pixels), np.int32)  # yours: indices of the nearest palette colors, row by row
    tokens = np.asarray(jax.jit(sampler.call)(weights, given, np.arange(count, dtype=np.uint32)))
except Exception as error:  # another platform, files of two exports, no memory for so many
    stop(f"the sampler, made for {', '.join(sampler.platforms)}, fails: {' '.join(str(error).split())[:300]}")
if (tokens < 0).any():
    stop("the logits are not finite. Export another checkpoint.")
side = round(tokens.shape[1] ** 0.5)
images = np.rint(127.5 * (palette[tokens] + 1)).astype(np.uint8).reshape(count, side, side, 3)
try:
    np.savez(out, tokens=tokens, images=images)
except OSError as error:
    stop(f"{out} cannot be written: {error.strerror or error}.")
'''


def _nested(weights: dict[str, jax.Array]) -> dict[str, Any]:
    blocks = {name.removeprefix("blocks/"): array for name, array in weights.items() if name.startswith("blocks/")}
    return {"blocks": blocks} | {name: array for name, array in weights.items() if "/" not in name}


def programs(model: Model, given: int, sampling: Sampling, platforms: Sequence[str],
             probe: Mapping[str, Any] | None = None, layer: int = 0) -> dict[str, bytes]:
    """The serialized programs, by name.

    Args:
      model: its attention back-end must run on all platforms, as `reference` does.
      given: number of given pixels per image, P.
      sampling: how the sampler draws colors.
      platforms: names from 'cpu', 'cuda', 'rocm', 'tpu'.
      probe: weights of a linear probe by their names in `weights`, probe/...; None: no program `classes`.
      layer: layer of the stream that the probe reads.
    """
    batch, = jax.export.symbolic_shape("b")
    T = model.dims.T
    weights = by_name(model.abstract_parameters()) | dict(probe or {})

    def sampler(weights, given_BP, seeds_B):
        return generate(model, _nested(weights), given_BP, jax.vmap(jax.random.key)(seeds_B), sampling)

    def losses(weights, tokens_BT):
        logits_BTV = model.logits(_nested(weights), tokens_BT)
        return objectives.nats_per_token(logits_BTV, tokens_BT).mean(axis=1)

    def features(weights, tokens_BT):
        return make_feature_step(model, "normalized")(_nested(weights), tokens_BT)[:, 0]

    def classes(weights, tokens_BT):
        standard_BD = (features(weights, tokens_BT)[:, layer] - weights["probe/mean_D"]) / weights["probe/deviation_D"]
        return standard_BD @ weights["probe/weights_DK"] + weights["probe/biases_K"]

    def serialized(function: Callable, *shapes: tuple) -> bytes:
        arguments = (jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in shapes)
        return bytes(jax.export.export(jax.jit(function), platforms=platforms)(weights, *arguments).serialize())

    return {"sampler": serialized(sampler, ((given,), jnp.int32), ((), jnp.uint32)),
            "losses": serialized(losses, ((T,), jnp.int32)),
            "features": serialized(features, ((T,), jnp.int32)),
            **({"classes": serialized(classes, ((T,), jnp.int32))} if probe else {})}
