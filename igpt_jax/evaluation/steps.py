"""The evaluation step: a pure function of plain arrays, ready for jax.jit.

B batch, T tokens, M views of an example.
"""

from collections.abc import Callable
from typing import Any

import jax

from igpt_jax.model import objectives
from igpt_jax.model.image_gpt import Model


def make_eval_step(model: Model, views: int = 1, seed: int = 0) -> Callable:
    """Makes a step (params, tokens_BT, ids_B) -> `nats_per_pixel` [B] and, with a class head, `classes` [B, M].

    A model whose objective hides pixels sees M = `views` views of each image, drawn from the image's id (paper, Section
    4.6). The loss is that of the first view; where it is a bound, the mean of all. The predicted class is returned for
    each. Other models have M = 1.
    """
    def eval_step(params: dict[str, Any], tokens_BT: jax.Array, ids_B: jax.Array) -> dict[str, jax.Array]:
        def look(view: objectives.View) -> dict[str, jax.Array]:
            pixels_BTV, classes_BK = model.outputs(params, view.tokens_BT, hidden_BT=view.hidden_BT)
            nats_B = model.dims.C * objectives.nats_per_image(pixels_BTV, tokens_BT, view.scored_BT)
            return {"nats_per_pixel": nats_B} | ({} if classes_BK is None else {"classes": classes_BK.argmax(axis=1)})

        found = objectives.over_views(look, model.objective, tokens_BT, ids_B, model.dims.V, views, seed)
        nats_MB = found.pop("nats_per_pixel")
        nats_B = nats_MB.mean(axis=0) if model.objective.bound else nats_MB[0]
        return {"nats_per_pixel": nats_B} | {name: each.T for name, each in found.items()}

    return eval_step


def make_class_step(model: Model, views: int, seed: int = 0) -> Callable[..., jax.Array]:
    """(params, tokens_BT, ids_B) -> probabilities of the classes [B, K], of a model with a class head.

    A model whose objective hides pixels averages over `views` views of each image.
    """
    def class_step(params: dict[str, Any], tokens_BT: jax.Array, ids_B: jax.Array) -> jax.Array:
        def look(view: objectives.View) -> jax.Array:
            return jax.nn.softmax(model.outputs(params, view.tokens_BT, hidden_BT=view.hidden_BT)[1], axis=-1)

        return objectives.over_views(look, model.objective, tokens_BT, ids_B, model.dims.V, views, seed).mean(axis=0)

    return class_step
