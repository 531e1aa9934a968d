"""Measures what it costs to sum gradients over devices in bfloat16 instead of float32.

    python benchmarks/reduce_dtype.py IMAGES.npz [--side 8] [--devices 64] [--each 1] [--steps 100] [--json FILE]

IMAGES holds `images`, uint8 [n, Y, X, 3]. Each device has a few of them, reduced to 64 grays. In float32 computation,
each device's gradient is rounded to `dtype` and added in turn, as a ring of devices adds it: rounded after every
device. (XLA's CPU compiler widens such sums itself, so that fake devices do not show the error.) Reported are

- the error of the sum over 8, 64 and 256 devices: |sum - exact| / |exact| over the weights of all blocks, after 10
  steps and after training;
- the loss of runs that differ in that dtype alone, and of a run with another seed as the noise to compare with.
"""

import argparse
import functools
import json
import pathlib

import exits
import jax
import jax.numpy as jnp
import numpy as np
import optax

from igpt_jax import storage
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.model.image_gpt import Model
from igpt_jax.training.steps import make_loss

DEVICES, DTYPES = (8, 64, 256), ("bfloat16", "float32")


def tokens_of(path: str, side: int) -> np.ndarray:
    """Images as int32 [n, side^2]: means of their grays, 64 levels."""
    with exits.readable(path, "an .npz of images"), np.load(path) as arrays:
        images = arrays["images"].astype(np.float32)
    n, size = images.shape[:2]
    if size % side:
        raise UserError(f"--side={side} does not divide the images' {size} pixels.")
    gray = images.mean(-1).reshape(n, side, size // side, side, size // side).mean((2, 4))
    return (gray / 4).astype(np.int32).reshape(n, side * side)


@functools.partial(jax.jit, static_argnums=(0, 3))
def summed(gradient, params, tokens_NBT, dtype):
    """The mean over N devices of the blocks' gradients, each rounded to `dtype` and added to a sum in `dtype`."""
    def add(sums, tokens_BT):
        (loss, _), found = gradient(params, tokens_BT)
        blocks = jax.tree.map(lambda total, part: total + part.astype(dtype), sums[1], found.pop("blocks"))
        return (sums[0] + loss, blocks, jax.tree.map(jnp.add, sums[2], found)), None

    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    zeros = (jnp.float32(0), jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), params["blocks"]),
             jax.tree.map(jnp.zeros_like, rest))
    (loss, blocks, rest), _ = jax.lax.scan(add, zeros, tokens_NBT)
    mean = jax.tree.map(lambda total: total.astype(jnp.float32) / len(tokens_NBT), {**rest, "blocks": blocks})
    return loss / len(tokens_NBT), mean


def train(gradient, params, tokens, dtype, steps, shape, seed):
    """The parameters after training, and the mean loss of the last tenth of steps."""
    rule = optax.adam(optax.warmup_cosine_decay_schedule(0, 0.003, steps // 10, steps), 0.9, 0.95)
    update = jax.jit(lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*rule.update(g, s, p)))
    state, losses, order = rule.init(params), [], np.random.default_rng(seed)
    for _ in range(steps):
        loss, mean = summed(gradient, params, tokens[order.integers(0, len(tokens), shape)], dtype)
        params, state = update(mean, state, params)
        losses.append(float(loss))
    return params, float(np.mean(losses[-max(1, steps // 10):]))


def error(gradient, params, tokens_NBT):
    """Relative error of the bfloat16 sum of the blocks' gradients."""
    (_, rough), (_, exact) = (summed(gradient, params, tokens_NBT, jnp.dtype(dtype)) for dtype in DTYPES)
    rough, exact = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each["blocks"])]).astype(np.float64)
                    for each in (rough, exact))
    return float(np.linalg.norm(rough - exact) / np.linalg.norm(exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images")
    parser.add_argument("--side", type=exits.count, default=8, help="pixels of a row")
    parser.add_argument("--devices", type=exits.count, default=64, help="in training")
    parser.add_argument("--each", type=exits.count, default=1, help="images of a device")
    parser.add_argument("--steps", type=exits.count, default=100)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    tokens, shape = tokens_of(options.images, options.side), (options.devices, options.each)
    count, T = tokens.shape
    if count < (needed := max(DEVICES) * options.each):
        raise UserError(f"{options.images} has {count} images. --each={options.each} needs {needed}.")
    settings = "model=igpt_tiny,model.layers=2,precision=float32,model.remat=none"
    config = parse("pretrain", base_config("pretrain", settings))
    model = Model(config.model, 64, options.side, "float32")
    loss = make_loss(model, config)
    gradient = jax.value_and_grad(lambda params, tokens_BT: loss(
        params, (tokens_BT, None, model.objective.view(tokens_BT, None, 64)), None), has_aux=True)
    found = {"losses": {}, "errors": {}}

    def report(when: str, params: dict) -> None:
        for devices in DEVICES:
            found["errors"][f"{when}, {devices} devices"] = value = error(
                gradient, params, tokens[:devices * options.each].reshape(devices, options.each, T))
            print(f"{when}, {devices} devices: the sum in bfloat16 is {value:.2%} off", flush=True)

    # The head starts at 0, and with it the blocks' gradients.
    report("after 10 steps", train(gradient, model.init(jax.random.key(0)), tokens, jnp.dtype("float32"), 10, shape,
                                   0)[0])
    runs = ("float32", "float32", 0), ("bfloat16", "bfloat16", 0), ("float32, seed 1", "float32", 1)
    for name, dtype, seed in runs:
        params, found["losses"][name] = train(gradient, model.init(jax.random.key(0)), tokens, jnp.dtype(dtype),
                                              options.steps, shape, seed)
        print(f"{name}: {found['losses'][name]:.5f} nats per pixel", flush=True)
        if name == "float32":
            report("trained", params)
    if options.json:
        storage.publish(storage.path(options.json), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exits.run(main)
