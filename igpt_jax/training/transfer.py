"""Fine-tuning from a checkpoint: the settings and parameters that a run takes over from it.

Y rows, X columns, C channels, D embed, T = Y X C positions.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from igpt_jax import checkpoint
from igpt_jax.config import FinetuneConfig, UserError
from igpt_jax.config.model import OF_CHECKPOINT
from igpt_jax.model.dims import Dims
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.parametrization import position_tables


def adopted(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the settings of its checkpoint: the model's sizes and, if the config names none, the store.

    Raises:
      UserError: the checkpoint is missing or of another objective; the config sets what the checkpoint decides; or it
        names neither a checkpoint nor a model.
    """
    if not config.checkpoint:
        if not config.model.name:
            raise UserError("nothing to train: set checkpoint to a workdir of pretrain, or model.name to train a new "
                            "model from scratch.")
        return config
    for name, given in (("model.name", config.model.name), ("palette", config.palette), ("codec", config.codec)):
        if given:
            raise UserError(f"{name}={given}: the checkpoint brings its own. Leave it out, or leave checkpoint empty "
                            "to train a new model.")
    metadata = checkpoint.load_metadata(config.checkpoint)
    checkpoint.require_objective(metadata, config.objective, config.checkpoint)
    checkpoint.require_parameters(metadata, config.parameters, config.checkpoint)
    sizes = {name: getattr(metadata.config.model, name) for name in ("name", *OF_CHECKPOINT)}
    data = dataclasses.replace(config.data, store=checkpoint.store_of(metadata, config.data.store))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes), data=data,
                               codec=metadata.config.codec)


def parameters(finetuning: FinetuneConfig, model: Model, mesh: Mesh, initial: dict[str, Any]) -> dict[str, Any]:
    """The parameters that fine-tuning starts from.

    They are the checkpoint's, with its position tables resized to the model's image size, and a new class head.

    Args:
      finetuning: names the checkpoint.
      model: the model to train. Its sizes are the checkpoint's, except image size and classes.
      mesh: devices of the run.
      initial: the model's initial parameters: the class head, and the shardings of the position tables.
    """
    _, params, metadata = checkpoint.load_model(finetuning.checkpoint, mesh, finetuning.precision,
                                                parameters=finetuning.parameters)
    d = model.dims
    tables = {name: params[name] for name in position_tables(model.config)}
    if d.Y != metadata.image_size:
        on = {name: initial[name].sharding for name in tables}
        tables = jax.jit(lambda tables: {name: resized(name, table, d) for name, table in tables.items()},
                         out_shardings=on)(tables)
    return {**params, **tables, **({"class_head_KD": initial["class_head_KD"]} if d.K else {})}


def resized(name: str, table: jax.Array, d: Dims) -> jax.Array:
    """A position table for a model of other images: the old one, read as an image of D channels, resized linearly.

    Pixels are squares, sampled at their centers. In a smaller table each pixel averages the pixels that it covers.
    """
    if name == "position_embed_TD":
        old = math.isqrt(len(table) // d.C)
        shape, to = (old, old, d.C, d.D), (d.Y, d.X, d.C, d.D)
    else:
        shape, to = table.shape, (getattr(d, name[-2]), d.D)
    resized = jax.image.resize(table.reshape(shape), to, "linear", antialias=True)
    return resized.reshape(-1, d.D).astype(jnp.result_type(table))
