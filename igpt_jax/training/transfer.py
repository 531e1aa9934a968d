"""Fine-tuning from a checkpoint: the settings and parameters that a run takes over from it.

Y rows, X columns, D embed, T = Y X positions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from igpt_jax import checkpoint
from igpt_jax.config import FinetuneConfig, UserError
from igpt_jax.model.image_gpt import Model

SIZES = ("name", "layers", "embed", "heads", "mlp", "init", "parametrization", "base_embed", "base_layers")


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
    for name, given in (("model.name", config.model.name), ("palette", config.palette)):
        if given:
            raise UserError(f"{name}={given}: the checkpoint brings its own. Leave it out, or leave checkpoint empty "
                            "to train a new model.")
    metadata = checkpoint.load_metadata(config.checkpoint)
    checkpoint.require_objective(metadata, config.objective, config.checkpoint)
    sizes = {name: getattr(metadata.config.model, name) for name in SIZES}
    data = dataclasses.replace(config.data, store=checkpoint.store_of(metadata, config.data.store))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes), data=data)


def parameters(finetuning: FinetuneConfig, model: Model, mesh: Mesh, initial: dict[str, Any]) -> dict[str, Any]:
    """The parameters that fine-tuning starts from.

    They are the checkpoint's, with its position table resized to the model's image size, and a new class head.

    Args:
      finetuning: names the checkpoint.
      model: the model to train. Its sizes are the checkpoint's, except image size and classes.
      mesh: devices of the run.
      initial: the model's initial parameters: the class head, and the sharding of the position table.
    """
    _, params, metadata = checkpoint.load_model(finetuning.checkpoint, mesh, finetuning.precision,
                                                parameters=finetuning.parameters)
    side = round(model.dims.T ** 0.5)
    resize = jax.jit(lambda table_TD: resized(table_TD, side), out_shardings=initial["position_embed_TD"].sharding)
    if side != metadata.image_size:
        params = {**params, "position_embed_TD": resize(params["position_embed_TD"])}
    return {**params, **({"class_head_KD": initial["class_head_KD"]} if model.dims.K else {})}


def resized(table_TD: jax.Array, side: int) -> jax.Array:
    """A position table [side^2, D]: the old one, read as an image of D channels, resized linearly.

    Pixels are squares, sampled at their centers. In a smaller table each pixel averages the pixels that it covers.
    """
    T, D = table_TD.shape
    old = round(T ** 0.5)
    table_YXD = jax.image.resize(table_TD.reshape(old, old, D), (side, side, D), "linear", antialias=True)
    return table_YXD.reshape(side * side, D).astype(jnp.result_type(table_TD))
