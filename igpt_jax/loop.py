"""THE training loop. It computes nothing itself: it puts the parts together, in this order, and turns the crank."""

import contextlib
import dataclasses
import json
import logging
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax import (
    checkpoint,
    checksum,
    evaluation,
    palette,
    sharding,
    side_files,
    steps,
    storage,
    telemetry,
    topology,
    transfer,
)
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.data import Batch, Batches, count_classes, open_data, train_batches
from igpt_jax.figures import loss_curve
from igpt_jax.metric_writers import check_installed, open_writers
from igpt_jax.model import Model, count_parameters
from igpt_jax.optimizer import warmup_steps_for
from igpt_jax.profiling import Profile
from igpt_jax.runtime import Diverged, Preempted, StopSignal
from igpt_jax.startup import agree
from igpt_jax.watchdog import Watchdog

DIVERGENCE = "divergence.json"  # what skip_divergence needs: up to where in the order the examples were bad
REPLAY_TOLERANCE = 1e-3  # relative, of a loss; other devices and meshes sum in another order

log = logging.getLogger(__name__)


def train(config: PretrainConfig, workdir: str) -> dict[str, float]:
    """Trains to `config.steps`, from the newest checkpoint in `workdir` where there is one.

    Pretrains; or, with a FinetuneConfig that `transfer.adopted` gave, fine-tunes: from another run's parameters where
    `checkpoint` names one, on labels too, until `patience` ends.

    Returns:
      The metrics for result.json: parameters, steps, the best evaluated step, train and eval nats per pixel (and
      accuracy), images per second.

    Raises:
      UserError: the data, mesh or checkpoint do not fit the config; `wandb` is not installed; `replay_check` found
        another loss.
      Preempted: asked to stop; the state is saved.
      Diverged: `max_skipped_updates` updates in a row were skipped, or copies of the state differ between devices;
        nothing is saved since.
      Unsaved: the last state could not be saved.
    """
    ledger = telemetry.Ledger("start")
    check_installed(config)
    # Mesh.
    mesh = sharding.make_mesh(config.mesh)
    if config.images_per_pass:
        parts = sharding.parts_for(config.batch_size, mesh, config.images_per_pass)
        config = dataclasses.replace(config, accumulate=parts)
    sharding.check_batch(config.batch_size, mesh, config.accumulate)

    # Data.
    store = open_data(config.data, config.image_size)
    train_split = store.split(config.data.split)
    held_out = store.split(config.data.held_out) if config.data.held_out else None
    classes = count_classes(store, train_split) if config.class_weight else 0
    if config.checkpoint:
        palette_VC = checkpoint.load_record(config.checkpoint).palette_VC
    else:
        palette_VC = palette.load(config.palette) if config.palette else store.palette
    if palette_VC is None:
        raise UserError(f"data.store={store.path} has no palette of its own. Set --config.palette to a palette's .npy.")
    agree(palette=palette.digest(palette_VC), data=train_split.fingerprint)
    table = palette.lookup_table(palette_VC)

    # Model, optimizer and state, in shapes only.
    model = Model(config.model, len(palette_VC), store.image_size, config.precision, mesh, config.hidden_share, classes)
    warmup_steps = warmup_steps_for(config.optimizer, config.steps, train_split.count, config.batch_size)
    abstract = steps.abstract_state(model, config, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(mesh))()

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(StopSignal())
        watchdog = stack.enter_context(Watchdog(config.stall_seconds))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir, config))

        # The compiled step.
        train_step = steps.jit_train_step(model, config, mesh, warmup_steps)

        def abstract_batch(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((config.batch_size, *dims), jnp.int32, sharding=sharding.batch_sharding(mesh))

        watchdog.beat("compiling")
        with ledger("compile"):
            train_step = train_step.lower(abstract, abstract_batch(model.dims.T), key,
                                          abstract_batch() if classes else None).compile()

        def do_step(state: steps.State, batch: Batch) -> tuple[steps.State, dict[str, jax.Array]]:
            return train_step(state, batch.tokens, key, batch.labels)

        def batches_from(position: int) -> Batches:
            batches = train_batches(train_split, table, reader=config.data.reader, seed=config.seed,
                                    batch_size=config.batch_size, start_step=position,
                                    sharding=sharding.batch_sharding(mesh), prefetch=config.data.prefetch,
                                    recipe=config.data.augment, window=config.data.window, labelled=classes > 0)
            stack.callback(batches.close)
            return batches

        # Restore or initialise.
        mine = checkpoint.Record(config, palette_VC, store.image_size, train_split.fingerprint, 0, classes=classes)
        if config.replay_check and checkpoints.latest_step:
            _replay(workdir, checkpoints, abstract, mine, do_step, batches_from)
        watchdog.beat("restoring")
        restored = checkpoints.restore(abstract, mine)
        if restored:
            state, stored = restored
            start, evaluated, changes = stored.steps_done, dict(stored.metrics), stored.changes
        else:
            state = jax.jit(lambda key: steps.init_state(model, config, key), out_shardings=places)(key)
            if config.checkpoint:
                state["params"] = transfer.parameters(config.checkpoint, model, config.precision, mesh, state["params"])
            stored, start, evaluated, changes = mine, 0, {}, ()
        offset = _offset_after_divergence(config, workdir, start, stored.data_offset)

        def record(steps_done: int, evaluated: dict[str, float]) -> checkpoint.Record:
            return dataclasses.replace(mine, steps_done=steps_done, metrics=evaluated, data_offset=offset,
                                       changes=changes)

        # Input, output.
        watchdog.beat("reading the first examples")
        measure = evaluation.make_measure(model, mesh, config.batch_size, table)
        throughput = _throughput(config, model, mesh)
        metrics = telemetry.Metrics(workdir, config.steps, start, ledger, open_writers(config, workdir))
        stack.callback(metrics.close)
        profile = Profile(workdir, config.profile)
        stack.callback(profile.close)
        parameters = count_parameters(abstract["params"])
        if jax.process_index() == 0:
            storage.publish(storage.path(workdir) / "parameters.txt", sharding.table(abstract["params"], mesh) + "\n")
            telemetry.say(f"{config.model.name}: {parameters:,} parameters, {model.dims.T:,} tokens of "
                          f"{len(palette_VC)} colours, {train_split.count:,} images, mesh {dict(mesh.shape)}, "
                          f"{model.config.attention} attention, {config.precision}")
            if start >= config.steps:
                telemetry.say(f"already finished: the newest checkpoint is of step {start:,}; steps={config.steps:,}")
            elif start:
                skipping = f", {offset:,} steps of examples further on" if offset else ""
                telemetry.say(f"goes on from step {start:,} of {config.steps:,}{skipping}")

        def give_up() -> bool:
            watchdog.beat("evaluating")
            return stop.should_stop()

        def evaluate(step: int) -> dict[str, float]:
            """Held-out figures, logged; none where there is no such split, or where a stop is asked for meanwhile."""
            with ledger("evaluate"):
                found = measure(state["params"], held_out, give_up) if held_out else None
                if found is None:
                    return {}
                found = {f"eval/{name}": figure for name, figure in found.items()}
                metrics.log(step, found)
                checkpoints.note(step, found)
                return found

        def stopped(step: int) -> Preempted:
            metrics.log(step, {})
            return Preempted(f"stopped after step {step:,} of {config.steps:,}, saved.")

        if start and held_out and not evaluated and (start == config.steps or _due(start, config.eval_every_steps)):
            evaluated = evaluate(start)  # the run was stopped before it could
            if not evaluated:
                raise stopped(start)
            checkpoints.add_metrics(start, evaluated)
        end = start if _enough(start, config, checkpoints) else config.steps
        batches = batches_from(start + offset) if start < end else None

        # The loop. A step's metrics are read after the next step is under way, so that devices never wait.
        late: tuple[int, dict[str, jax.Array]] | None = None
        save_owed = eval_owed = False  # they were due amid skipped updates, and wait for one that is accepted
        ledger.enter("step")
        stop.saves = True
        for step in range(start + 1, end + 1):
            watchdog.beat(f"doing step {step:,}")
            profile.before(step)
            with jax.transfer_guard("disallow"):
                with ledger("input"):
                    batch = next(batches)
                state, measured = do_step(state, batch)
            throughput.step()
            try:
                if late:
                    _report(*late, config, metrics, throughput, checkpoints, batches)
                late = step, measured

                last, stopping = step == config.steps, stop.should_stop()
                named = step in config.keep_steps
                eval_now = last or eval_owed or _due(step, config.eval_every_steps)
                save_now = _due(step, config.checkpoint_every_steps) or save_owed or named
                save_now = save_now or eval_now or stopping or checkpoints.retry_due
                if config.compare_replicas_every_steps and (save_now or _due(step,
                                                                             config.compare_replicas_every_steps)):
                    _compare_replicas(step, state, mesh)
                if not save_now:
                    continue
                skipping = _report(*late, config, metrics, throughput, checkpoints, batches)
                late = None
                if skipping and not (last or stopping or named):
                    save_owed, eval_owed = True, eval_now
                    continue
                save_owed = eval_owed = False
            except Diverged:
                _note_divergence(workdir, checkpoints, late[0] + offset)
                raise
            with throughput.paused():
                evaluated = evaluate(step) if eval_now and not stopping else {}
                stopping = stopping or stop.should_stop()
                last = last or _enough(step, config, checkpoints)
                metrics.flush()
                watchdog.beat(f"saving step {step:,}")
                with ledger("save"):
                    good = not skipping and all(map(math.isfinite, evaluated.values()))
                    checkpoints.save(state, record(step, evaluated), surely=last or stopping, supersedes=good)
            if stopping and (not last or held_out and not evaluated):
                raise stopped(step)
            if last:
                end = step
                break
        metrics.log(max(start, end), {})

    figures = {"parameters": parameters, "steps": max(start, end), "best_step": checkpoints.best_step, **evaluated,
               **throughput.overall()}
    if jax.process_index() == 0:
        lines = telemetry.load_metrics(workdir)
        losses = [line["train/nats_per_pixel"] for line in lines if "train/nats_per_pixel" in line]
        figures["train/nats_per_pixel"] = losses[-1] if losses else None
        speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
        figures.setdefault("images_per_second", statistics.median(speeds) if speeds else None)
        figures["goodput"] = telemetry.goodput(telemetry.metrics_lines(workdir)).get("goodput")
        loss_curve(storage.path(workdir) / "figures" / "loss.png", lines, len(palette_VC))
    return figures


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _enough(step: int, config: PretrainConfig, checkpoints: checkpoint.Checkpoints) -> bool:
    """Whether `patience` evaluations up to this step have brought no better one."""
    waited = step - (checkpoints.best_step or step)
    return 0 < config.patience * config.eval_every_steps <= waited


def _throughput(config: PretrainConfig, model: Model, mesh: jax.sharding.Mesh) -> telemetry.Throughput:
    d = model.dims
    flops = telemetry.train_flops_per_image(d.L, d.D, d.F, d.V, d.T, model.causal)
    chip = topology.chip_for(mesh.devices.flat[0].device_kind)
    return telemetry.Throughput(config.batch_size, model.dims.T, flops, mesh.size, chip and chip.peak_bf16_flops)


def _report(step: int, measured: dict[str, jax.Array], config: PretrainConfig, metrics: telemetry.Metrics,
            throughput: telemetry.Throughput, checkpoints: checkpoint.Checkpoints, batches: Batches) -> int:
    """Waits for a step's metrics; logs them where it is time; ends a run whose updates stay bad.

    Returns:
      How many updates in a row were skipped.
    """
    values = {name: float(np.asarray(value)) for name, value in jax.device_get(measured).items()}
    in_a_row = int(values.pop("train/skipped_in_a_row"))
    if checkpoints.failed_saves:
        values["failed_saves"] = checkpoints.failed_saves
    if step in (1, config.steps) or _due(step, config.log_every_steps) or in_a_row:
        metrics.log(step, {**values, **throughput.read(), **batches.metrics()})
    if in_a_row >= config.max_skipped_updates:
        checkpoints.wait()
        raise Diverged(f"{in_a_row} updates in a row up to step {step:,} were not finite or spiked, and were skipped. "
                       + _way_on(checkpoints, step - in_a_row))
    return in_a_row


def _way_on(checkpoints: checkpoint.Checkpoints, accepted: int) -> str:
    """What to do after a divergence whose last accepted update was that of step `accepted`.

    All saved parameters are finite; those to which a later update was accepted, or which were evaluated, gave a finite
    loss too.
    """
    saved, lower = checkpoints.steps, "with a lower optimizer.learning_rate or with optimizer.clip_norm"
    if not saved:
        return f"No checkpoint was saved before. Start in a new --workdir, {lower}."
    newest, good = saved[-1], [step for step in saved if step < accepted or checkpoints.is_evaluated(step)]
    on = f"go on past these examples (--config.skip_divergence=True), or {lower}, named in --config.accept_changes"
    if newest in good:
        return f"The newest checkpoint, step {newest:,}, is good: {on}."
    other = (f"remove checkpoints/{newest}: step {good[-1]:,} is good" if good else
             f"start in a new --workdir, {lower}")
    return (f"Since the newest checkpoint, step {newest:,}, no loss was finite: {on}. Where that diverges at once, "
            f"{other}.")


# Disbelief: of the examples, of the devices, of the machine.

def _note_divergence(workdir: str, checkpoints: checkpoint.Checkpoints, position: int) -> None:
    """Writes down, for `skip_divergence`, up to where in the order the run used the examples and has diverged."""
    if jax.process_index() == 0:
        storage.publish(storage.path(workdir) / DIVERGENCE,
                        json.dumps({"newest_checkpoint": checkpoints.latest_step or 0, "position": position}))


def _offset_after_divergence(config: PretrainConfig, workdir: str, start: int, offset: int) -> int:
    """How many steps of examples to be ahead of the step's own: past those on which the run diverged, if it did."""
    file = storage.path(workdir) / DIVERGENCE
    read = side_files.load if jax.process_index() == 0 else side_files.look
    noted = config.skip_divergence and read(file) or {}
    if noted.get("newest_checkpoint") == start:  # later checkpoints hold the offset themselves
        return noted["position"] - start
    return offset


def _compare_replicas(step: int, state: steps.State, mesh: jax.sharding.Mesh) -> None:
    """Raises Diverged where devices that should hold the same bits do not; names them."""
    odd = checksum.odd_devices(state, mesh)
    if odd:
        array, devices = next(iter(odd.items()))
        raise Diverged(f"copies of {len(odd)} arrays differ between devices at step {step:,}: of {array} those on "
                       f"{', '.join(devices)}. Nothing is saved; take that device out of service, and the same command "
                       "goes on from the newest checkpoint.")


def _replay(workdir: str, checkpoints: checkpoint.Checkpoints, abstract: steps.State, mine: checkpoint.Record,
            do_step: Any, batches_from: Any) -> None:
    """Repeats steps of the log, from the newest of the checkpoints with the nearest logged step after them.

    Raises:
      UserError: the loss is not the one in the log.
    """
    logged = {line["step"]: line["train/nats_per_pixel"] for line in telemetry.load_metrics(workdir)
              if line.get("train/nats_per_pixel") is not None}
    ways = [(after - before, -before) for before in checkpoints.steps for after in logged if after > before]
    before = -min(ways)[1] if ways else 0
    restored = checkpoints.restore(abstract, mine, at=before) if ways else None
    if not restored or restored[1].steps_done != before:
        telemetry.say("replay_check: no logged step follows a good checkpoint; nothing is repeated")
        return
    after = before + min(ways)[0]
    state, stored = restored
    batches = batches_from(before + stored.data_offset)
    for _ in range(before, after):
        state, measured = do_step(state, next(batches))
    loss = float(measured["train/nats_per_pixel"])
    difference = abs(loss - logged[after]) / abs(logged[after])
    if not difference <= REPLAY_TOLERANCE:
        raise UserError(f"replay_check: step {after:,} repeated from checkpoint {before:,} gives the loss {loss!r}, "
                        f"but the log says {logged[after]!r}. The code, the data or a device is not what it was.")
    telemetry.say(f"replay_check: step {after:,} repeated from checkpoint {before:,}: "
                  f"{'the same loss, bit for bit' if difference == 0 else f'the loss differs by {difference:.1e}'}")
