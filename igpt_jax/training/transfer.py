"""A run that begins with another run's parameters: what it takes from that checkpoint, and what is its own.

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

SIZES = ("name", "layers", "embed", "heads", "mlp", "init")


def adopted(config: FinetuneConfig) -> FinetuneConfig:
    """The config with what the checkpoint decides: the model's sizes and, where none is named, the store.

    Raises:
      UserError: no such checkpoint, or one of another objective; the config decides what the checkpoint brings; or
        there is neither a checkpoint nor a model.
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
    record = checkpoint.load_metadata(config.checkpoint)
    checkpoint.require_objective(record, config.objective, config.checkpoint)
    sizes = {name: getattr(record.config.model, name) for name in SIZES}
    data = dataclasses.replace(config.data, store=config.data.store or record.config.data.store)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes), data=data)


def parameters(typed: str, model: Model, precision: str, mesh: Mesh, initial: dict[str, Any]) -> dict[str, Any]:
    """The parameters to begin with: those of the checkpoint `typed`, for another image size its position table
    resized, and a class head as it is initialized.

    Args:
      typed: the checkpoint.
      model: to train, of the checkpoint's sizes but for image size and classes.
      precision: of the run.
      mesh: where it runs.
      initial: the model's initial parameters, whose places are kept.
    """
    _, params, record = checkpoint.load_model(typed, mesh, precision)
    side = round(model.dims.T ** 0.5)
    resize = jax.jit(lambda table_TD: resized(table_TD, side), out_shardings=initial["position_embed_TD"].sharding)
    if side != record.image_size:
        params = {**params, "position_embed_TD": resize(params["position_embed_TD"])}
    return {**params, **({"class_head_KD": initial["class_head_KD"]} if model.dims.K else {})}


def resized(table_TD: jax.Array, side: int) -> jax.Array:
    """A position table for side x side pixels: the old one, seen as a picture of D channels, resized linearly.

    Pixels are squares whose centers are sampled; where the new picture is smaller, each of its pixels averages those
    that it covers.
    """
    T, D = table_TD.shape
    old = round(T ** 0.5)
    table_YXD = jax.image.resize(table_TD.reshape(old, old, D), (side, side, D), "linear", antialias=True)
    return table_YXD.reshape(side * side, D).astype(jnp.result_type(table_TD))
