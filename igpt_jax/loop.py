"""THE training loop. It computes nothing itself: it puts the parts together, in this order, and turns the crank."""

import contextlib
import logging
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from igpt_jax import checkpoint, evaluation, palette, sharding, steps, storage, telemetry, topology
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.data import Batches, open_data, train_batches
from igpt_jax.model import Model, count_parameters
from igpt_jax.optimizer import warmup_steps_for
from igpt_jax.runtime import Diverged, Preempted, StopSignal

log = logging.getLogger(__name__)


def train(config: PretrainConfig, workdir: str) -> dict[str, float]:
    """Trains to `config.steps`, from the newest checkpoint in `workdir` where there is one.

    Returns:
      The metrics for result.json: parameters, steps, train and eval nats per pixel, images per second.

    Raises:
      UserError: the data, mesh or checkpoint do not fit the config.
      Preempted: asked to stop; the state is saved.
      Diverged: `max_skipped_updates` updates in a row were not finite; nothing is saved since.
    """
    # Mesh.
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, mesh, config.accumulate)

    # Data.
    store = open_data(config.data, config.image_size)
    train_split = store.split(config.data.split)
    held_out = store.split(config.data.held_out) if config.data.held_out else None
    palette_VC = palette.load(config.palette) if config.palette else store.palette
    if palette_VC is None:
        raise UserError(f"data.store={store.path} has no palette of its own. Set --config.palette to a palette's .npy.")
    table = palette.lookup_table(palette_VC)

    # Model, optimizer and state, in shapes only.
    model = Model(config.model, len(palette_VC), store.image_size, config.precision, mesh)
    warmup_steps = warmup_steps_for(config.optimizer, config.steps, train_split.count, config.batch_size)
    abstract = steps.abstract_state(model, config, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(mesh))()

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(StopSignal())
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir, config))

        # Restore or initialise.
        def record(steps_done: int, evaluated: dict[str, float]) -> checkpoint.Record:
            return checkpoint.Record(config, palette_VC, store.image_size, train_split.fingerprint, steps_done,
                                     metrics=evaluated)

        start, evaluated = checkpoints.latest_step or 0, {}
        if start:
            state, stored = checkpoints.restore(abstract, record(start, {}))
            evaluated = dict(stored.metrics)
        else:
            state = jax.jit(lambda key: steps.init_state(model, config, key), out_shardings=places)(key)

        # Compiled steps, input, output.
        train_step = steps.jit_train_step(model, config, mesh, warmup_steps)
        measure = evaluation.make_evaluate(model, mesh, config.batch_size, table)
        throughput = _throughput(config, model, mesh)
        metrics = telemetry.Metrics(workdir, config.steps, start)
        stack.callback(metrics.close)
        parameters = count_parameters(abstract["params"])
        if jax.process_index() == 0:
            storage.publish(storage.path(workdir) / "parameters.txt", sharding.table(abstract["params"], mesh) + "\n")
            telemetry.say(f"{config.model.name}: {parameters:,} parameters, {model.dims.T:,} tokens of "
                          f"{len(palette_VC)} colours, {train_split.count:,} images, mesh {dict(mesh.shape)}, "
                          f"{model.config.attention} attention, {config.precision}")
            if start:
                telemetry.say(f"goes on from step {start:,} of {config.steps:,}")
        batches: Iterator[Any] = iter(())
        if start < config.steps:
            batches = train_batches(train_split, table, reader=config.data.reader, seed=config.seed,
                                    batch_size=config.batch_size, start_step=start,
                                    sharding=sharding.batch_sharding(mesh), prefetch=config.data.prefetch,
                                    recipe=config.data.augment, window=config.data.window)
            stack.callback(batches.close)

        def evaluate(step: int) -> dict[str, float]:
            """Held-out figures, logged; none where there is no such split, or where a stop is asked for meanwhile."""
            nats = measure(state["params"], held_out, lambda: stop.requested_here) if held_out else None
            if nats is None:
                return {}
            metrics.log(step, {"eval/nats_per_pixel": nats})
            return {"eval/nats_per_pixel": nats}

        if start and not evaluated and (start == config.steps or _due(start, config.eval_every_steps)):
            evaluated = evaluate(start)  # the run was stopped before it could

        # The loop. A step's metrics are read after the next step is under way, so that devices never wait.
        late: tuple[int, dict[str, jax.Array]] | None = None
        for step in range(start + 1, config.steps + 1):
            with jax.transfer_guard("disallow"):
                state, measured = train_step(state, next(batches).tokens, key)
            throughput.step()
            if late:
                _report(*late, config, metrics, throughput, batches)
            late = step, measured

            last, stopping = step == config.steps, stop.should_stop(step)
            eval_now = last or _due(step, config.eval_every_steps)
            save_now = _due(step, config.checkpoint_every_steps) or step in config.keep_steps
            if not (eval_now or save_now or stopping):
                continue
            _report(*late, config, metrics, throughput, batches)
            late = None
            with throughput.paused():
                evaluated = evaluate(step) if eval_now and not stopping else {}
                checkpoints.save(state, record(step, evaluated))
            stopping = stopping or stop.requested_here
            if stopping and (not last or held_out and not evaluated):
                raise Preempted(f"stopped after step {step:,} of {config.steps:,}, saved.")

    figures = {"parameters": parameters, "steps": max(start, config.steps), **evaluated, **throughput.overall()}
    if jax.process_index() == 0:
        lines = telemetry.load_metrics(workdir)
        losses = [line["train/nats_per_pixel"] for line in lines if "train/nats_per_pixel" in line]
        figures["train/nats_per_pixel"] = losses[-1] if losses else None
        speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
        figures.setdefault("images_per_second", statistics.median(speeds) if speeds else None)
        telemetry.loss_curve(storage.path(workdir) / "figures" / "loss.png", lines, len(palette_VC))
    return figures


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _throughput(config: PretrainConfig, model: Model, mesh: jax.sharding.Mesh) -> telemetry.Throughput:
    flops = telemetry.train_flops_per_image(model.dims.L, model.dims.D, model.dims.F, model.dims.V, model.dims.T)
    chip = topology.chip_for(mesh.devices.flat[0].device_kind)
    return telemetry.Throughput(config.batch_size, model.dims.T, flops, mesh.size, chip and chip.peak_bf16_flops)


def _report(step: int, measured: dict[str, jax.Array], config: PretrainConfig, metrics: telemetry.Metrics,
            throughput: telemetry.Throughput, batches: Batches) -> None:
    """Waits for a step's metrics; logs them where it is time; ends a run whose updates stay non-finite."""
    values = {name: float(np.asarray(value)) for name, value in jax.device_get(measured).items()}
    in_a_row = int(values.pop("train/skipped_in_a_row"))
    if step in (1, config.steps) or _due(step, config.log_every_steps) or in_a_row:
        metrics.log(step, {**values, **throughput.read(), **batches.metrics()})
    if in_a_row >= config.max_skipped_updates:
        raise Diverged(f"{in_a_row} updates in a row up to step {step:,} were not finite and were skipped. The newest "
                       "checkpoint is older and good: lower optimizer.learning_rate or set optimizer.clip_norm.")
