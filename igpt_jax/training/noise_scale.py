"""The gradient noise scale: the batch size up to which larger batches save steps nearly in proportion.

McCandlish et al. 2018 (arXiv 1812.06162), Section 2.2: with the true gradient G and the covariance S of one example's
gradient, B = tr(S) / |G|^2 examples. Both follow from the norms of gradients over few and over many examples (Appendix
A.1), here over each microbatch of a batch and over the whole batch.

B batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding
from igpt_jax.training.steps import State, accumulated, loss_inputs, make_loss

DECAY = 0.9  # of the running means, per measurement


def estimates(squares: jax.Array, square: jax.Array, parts: int, batch_size: int) -> dict[str, jax.Array]:
    """Unbiased estimates of tr(S) and |G|^2 (Appendix A.1).

    Args:
      squares: the mean squared gradient norm over `parts` equal parts of a batch.
      square: the squared norm of the gradient of the whole batch.
      parts: 2 or more.
      batch_size: images of the whole batch.
    """
    part = batch_size / parts
    return {"noise/trace": (squares - square) / (1 / part - 1 / batch_size),
            "noise/squared_gradient": (batch_size * square - part * squares) / (batch_size - part)}


def measure(loss_and_gradients: Callable, params: Any, batch: Any, key: jax.Array | None, parts: int,
            batch_size: int) -> dict[str, jax.Array]:
    """`estimates` of a batch; arguments as those of `steps.accumulated`."""
    def squared(*arguments: Any) -> tuple[jax.Array, Any]:
        gradients = loss_and_gradients(*arguments)[1]
        return optax.tree.norm(gradients, squared=True), gradients

    squares, gradients = accumulated(squared, params, batch, key, parts)
    return estimates(squares, optax.tree.norm(gradients, squared=True), parts, batch_size)


class NoiseScale:
    """Measures the noise scale of a run: with the parameters before a step, on the batch of that step."""

    def __init__(self, model: Model, config: PretrainConfig, mesh: jax.sharding.Mesh):
        """Raises UserError if the batch cannot be halved on these devices."""
        parts = max(2, config.accumulate)
        try:
            sharding.check_batch(config.batch_size, mesh, parts)
        except UserError:
            raise UserError(f"noise_scale_every_steps: batch_size={config.batch_size} cannot be split into {parts} "
                            "microbatches on these devices, and the gradient noise is the difference between them. Use "
                            f"a batch_size that is a multiple of {parts} x mesh.data x mesh.fsdp.") from None
        self._means: dict[str, float] = {}
        loss_and_gradients = jax.value_and_grad(make_loss(model, config), has_aux=True)

        def of_step(state: State, tokens_BT: jax.Array, key: jax.Array, labels_B: jax.Array | None = None
                    ) -> dict[str, jax.Array]:
            batch, key = loss_inputs(model, config, state["step"], tokens_BT, key, labels_B)
            return measure(loss_and_gradients, state["params"], batch, key, parts, config.batch_size)

        self.of_step = jax.jit(of_step, out_shardings=sharding.replicated(mesh),
                               compiler_options=model.compiler_options)

    def smoothed(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The measured values and `noise/scale_images`, the ratio of their running means since the run started.

        The means are taken first, because the ratio of two noisy values is biased (Appendix A.1).
        """
        if all(map(math.isfinite, measured.values())):  # or one bad gradient would stay in the means
            for name, value in measured.items():
                before = self._means.get(name, value)
                self._means[name] = DECAY * before + (1 - DECAY) * value
        trace, squared = (self._means.get(f"noise/{name}", 0.0) for name in ("trace", "squared_gradient"))
        return {**measured, "noise/scale_images": trace / squared if squared > 0 else math.inf}
