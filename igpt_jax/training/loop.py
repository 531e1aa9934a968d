"""The training loop: prepare data, compile, restore or initialize, run steps, summarize.

It computes nothing itself: `training/steps.py` has the step, and `training/due.py` decides what is due at a step.
"""

import contextlib
import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from igpt_jax import checkpoint, storage
from igpt_jax.config import PretrainConfig, UserError
from igpt_jax.config.keys import compiler_options_text
from igpt_jax.data import Batch, Batches
from igpt_jax.evaluation import exact_loss
from igpt_jax.metrics import charts
from igpt_jax.metrics.figures import save as save_figure
from igpt_jax.metrics.logging import Metrics, load_metrics, metrics_lines, say
from igpt_jax.metrics.phases import PhaseTimer, goodput
from igpt_jax.metrics.profile import Profile
from igpt_jax.metrics.throughput import Throughput
from igpt_jax.metrics.writers import check_installed, open_writers
from igpt_jax.model.dims import count_parameters, tokens_per_parameter
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding, topology
from igpt_jax.runtime import startup
from igpt_jax.runtime.exits import Diverged, Failed, Preempted
from igpt_jax.runtime.signals import StopSignal
from igpt_jax.runtime.watchdog import Watchdog
from igpt_jax.training import divergence, transfer
from igpt_jax.training.due import NOTHING, Due, due, enough, every
from igpt_jax.training.inputs import Inputs, open_inputs
from igpt_jax.training.noise_scale import NoiseScale
from igpt_jax.training.optimizer import check_second_moment, warmup_steps_for
from igpt_jax.training.steps import State, abstract_state, init_state, jit_train_step


def train(config: PretrainConfig, workdir: str) -> dict[str, float]:
    """Trains to `config.steps`, from the newest checkpoint in `workdir` if there is one.

    Pretrains; or, with a FinetuneConfig from `transfer.adopted`, fine-tunes: on labels too, from another run's
    parameters if `checkpoint` names one, and until early stopping ends it.

    Returns:
      The metrics for result.json: parameters, steps, the best evaluated step, train and eval nats per pixel (and
      accuracy), images per second.

    Raises:
      UserError: the data, mesh or checkpoint do not fit the config; `wandb` is not installed; `replay_check` found
        another loss.
      Preempted: a stop was requested; the state is saved.
      Diverged: `max_skipped_updates` updates in a row were skipped, or copies of the state differ between devices.
        Nothing is saved since then.
      Unsaved: the last state could not be saved.
      Failed: an image is damaged on disk.
    """
    timer = PhaseTimer("start")
    check_installed(config)
    check_second_moment(config.optimizer)
    mesh = sharding.make_mesh(config.mesh)
    if config.images_per_pass:
        config.refuse_given("accumulate", why="with images_per_pass, from which it follows. Leave one out.")
    config = config.with_microbatches(sharding.batch_shards(mesh))
    sharding.check_batch(config.batch_size, mesh, config.accumulate)
    inputs = open_inputs(config)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        run = Run(config, workdir, mesh, inputs, timer, stack)
        run.checkpoints.check_resumable(run.metadata)  # before the minutes that compiling may take
        branches = config.branch_from and not checkpoint.of_process_0(run.checkpoints.latest_step)
        if branches:  # a trunk that does not fit is refused before compiling too
            run.restore_or_initialize()
        run.compile()
        if not branches:  # `replay_check` needs the compiled step
            run.restore_or_initialize()
        run.open_logs()
        run.evaluate_if_owed()
        run.open_batches()
        try:
            run.run_steps()
        except UserError as error:  # a damaged image; what the run has saved so far stays as it is
            raise Failed(str(error)) from None
    return run.summarize()


class Run:
    """One run and its state. `train` calls its public methods in order."""

    def __init__(self, config: PretrainConfig, workdir: str, mesh: jax.sharding.Mesh, inputs: Inputs, timer: PhaseTimer,
                 stack: contextlib.ExitStack):
        self.config, self.workdir, self.mesh, self.inputs = config, workdir, mesh, inputs
        self.timer, self._stack = timer, stack
        self.stop = stack.enter_context(StopSignal())
        self.watchdog = stack.enter_context(Watchdog(config.stall_seconds))
        self.checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir, config, inputs.held_out_fingerprint))
        self.model = self._model_of(config)
        self.abstract = abstract_state(self.model, config, mesh)
        self.noise_scale = NoiseScale(self.model, config, mesh) if config.noise_scale_every_steps else None
        self.measure = exact_loss.make_measure(self.model, mesh, config.batch_size, inputs.codec)
        # Made on the devices, since `_one_step` forbids transfers from the host.
        self.key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(mesh))()
        self.warmup_steps = warmup_steps_for(config.optimizer, config.steps, inputs.split.count, config.batch_size)
        self.metadata = checkpoint.Metadata(config, inputs.codec.palette_VC, inputs.image_size,
                                            inputs.split.fingerprint, 0, classes=inputs.classes,
                                            warmup_steps=self.warmup_steps, data_chunks=inputs.chunks)
        self.evaluated: dict[str, float] = {}  # results of the newest evaluation
        self.evaluated_steps: set[int] = set()  # for early stopping

    def _model_of(self, config: PretrainConfig) -> Model:
        return Model.of(config, self.inputs.codec.vocabulary, self.inputs.image_size, self.mesh, self.inputs.classes)

    # Compile.

    def compile(self) -> None:
        """Compiles the training step for the shapes of this run."""
        batch = sharding.batch_sharding(self.mesh)

        def array(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.config.batch_size, *dims), jnp.int32, sharding=batch)

        self.watchdog.beat("compiling")
        if jax.process_index() == 0:
            say(f"compiling the training step for {startup.devices()}, {self.config.precision} ...")
        with self.timer("compile"):
            step = jit_train_step(self.model, self.config, self.mesh, self.warmup_steps)
            labels = array() if self.inputs.classes else None
            inputs = self.abstract, array(self.model.dims.T), self.key, labels
            self._compiled = step.lower(*inputs).compile()
            if self.noise_scale:
                self._measure_noise = self.noise_scale.of_step.lower(*inputs).compile()

    def do_step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        return self._compiled(state, batch.tokens, self.key, batch.labels)

    def batches_from(self, position: int) -> Batches:
        """The batches from a position in the data order on, closed when the run ends."""
        batches = self.inputs.batches(position, self.mesh)
        self._stack.callback(batches.close)
        return batches

    # Restore or initialize.

    def restore_or_initialize(self) -> None:
        """Sets the state: from the newest good checkpoint, from that of `branch_from`, or a new one.

        With `replay_check`, repeats steps first.
        """
        def abstract_of(config: PretrainConfig) -> State:
            return abstract_state(self._model_of(config), config, self.mesh)

        if self.config.replay_check and checkpoint.of_process_0(self.checkpoints.latest_step):
            divergence.replay(self.workdir, self.checkpoints, abstract_of, self.metadata, self.do_step,
                              self.batches_from, self.watchdog)
        self.watchdog.beat("restoring")
        restored = self.checkpoints.restore(abstract_of, self.metadata)
        self.branches = bool(self.config.branch_from) and not restored
        if self.branches:
            restored = checkpoint.branch(self.config.branch_from, abstract_of, self.metadata)
            if (done := restored[1].steps_done) >= self.config.steps:
                raise UserError(f"branch_from={self.config.branch_from} is step {done:,}, so nothing is left of "
                                f"steps={self.config.steps:,}. Set more steps.")
        self.state, stored = restored or (self._initial_state(), self.metadata)
        self.start, self.evaluated = stored.steps_done, dict(stored.metrics)
        self.offset = divergence.offset_after(self.config, self.workdir, self.start, stored.data_offset)
        self.metadata = dataclasses.replace(self.metadata, data_offset=self.offset, changes=stored.changes)

    def _initial_state(self) -> State:
        """A new state, with the parameters of `finetuning.checkpoint` if one is named."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        state = jax.jit(lambda key: init_state(self.model, self.config, key), out_shardings=shardings)(self.key)
        finetuning = self.config.finetuning
        if finetuning and finetuning.checkpoint:
            state["params"] = transfer.parameters(finetuning, self.model, self.mesh, state["params"])
        return state

    # Logs and evaluations.

    def open_logs(self) -> None:
        """Opens metrics and profile, and says what is about to be trained."""
        self.watchdog.beat("reading the first examples")
        config, model = self.config, self.model
        self.throughput = throughput_of(config, model, self.mesh)
        self.metrics = Metrics(self.workdir, config.steps, self.start, self.timer, open_writers(config, self.workdir))
        self._stack.callback(self.metrics.close)
        self.profile = Profile(self.workdir, config.profile)
        self._stack.callback(self.profile.close)
        if self.start and config.finetuning and config.finetuning.patience:  # most of their checkpoints are removed
            self.evaluated_steps.update(checkpoint.from_process_0(lambda: [
                log["step"] for log in self._lines() if log["step"] <= self.start and "eval/nats_per_pixel" in log]))
        if jax.process_index() == 0:
            params = self.abstract["params"]
            storage.publish(storage.path(self.workdir) / "parameters.txt", sharding.table(params, self.mesh) + "\n")
            parameters = count_parameters(params)
            read, advice = tokens_per_parameter(config, model.dims.T, parameters)
            pretraining = "" if config.finetuning else f"{read} tokens per parameter, "
            say(f"{config.model.name}: {parameters:,} parameters, {model.dims.T:,} tokens of {self.inputs.codec}, "
                f"{self.inputs.split.count:,} images, {pretraining}mesh {dict(self.mesh.shape)}, "
                f"{model.config.attention} attention, {config.precision}, compiler options: "
                f"{compiler_options_text(model.compiler_options) or 'none'}")
            if pretraining and advice:
                say(advice)
            if self.start >= config.steps:
                say(f"already finished: the newest checkpoint is of step {self.start:,}; steps={config.steps:,}")
            elif self._enough():
                say(f"already finished: no evaluation since step {self.checkpoints.best_step:,} was better "
                    f"(patience={config.patience})")
            elif self.start:
                skipping = f", {self.offset:,} steps of examples further on" if self.offset else ""
                origin = f" of {config.branch_from}" if self.branches else ""
                say(f"resuming from step {self.start:,}{origin} of {config.steps:,}{skipping}")

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluates the held-out split, logs the results and returns them.

        They are empty without a held-out split, or if a stop is requested meanwhile. With a moving average of the
        parameters, its results have `ema_` in their names; the best step is that of the raw parameters.
        """
        def give_up() -> bool:
            self.watchdog.beat("evaluating")
            return self.stop.should_stop()

        with self.timer("evaluate"):
            if not self.inputs.held_out:
                return {}
            found: dict[str, float] = {}
            for prefix, tree in (("eval/", "params"), ("eval/ema_", "ema")):
                if tree in self.state:
                    measured = self.measure(self.state[tree], self.inputs.held_out, give_up)
                    if measured is None:
                        return {}
                    found |= {prefix + name: figure for name, figure in measured.items()}
            self.metrics.log(step, found)
            self.metrics.flush()
            self.checkpoints.note(step, found)
            self.evaluated_steps.add(step)
            if jax.process_index() == 0:
                self._draw(self._lines())
            return found

    def evaluate_if_owed(self) -> None:
        """Evaluates the restored step if the run was stopped before it could. Raises Preempted."""
        step, config = self.start, self.config
        owed = step == config.steps or every(step, config.eval_every_steps)
        if step and owed and self.inputs.held_out and not self.evaluated and not self.branches:
            self.evaluated = self.evaluate(step)
            if not self.evaluated:
                raise self._stopped(step)
            self.checkpoints.add_metrics(step, self.evaluated)

    def _enough(self) -> bool:
        return enough(self.evaluated_steps, self.checkpoints.best_step, self.config)

    def _stopped(self, step: int) -> Preempted:
        self.metrics.log(step, {})
        return Preempted(f"stopped after step {step:,} of {self.config.steps:,}, saved.")

    # Steps.

    def open_batches(self) -> None:
        """Opens the batches of the remaining steps, if there are any. Raises UserError where they cannot be read."""
        done = self.start >= self.config.steps or self._enough()
        self.batches = None if done else self.batches_from(self.start + self.offset)

    def run_steps(self) -> None:
        """Runs the remaining steps. Raises Preempted, Diverged or Unsaved; UserError for a damaged image."""
        self.end = self.start
        if self.batches:
            self.timer.enter("step")
            self.stop.saves = True
            self._steps()
        self.metrics.log(self.end, {})

    def _steps(self) -> None:
        # A step's metrics are read while the next step runs: to wait for them at once would idle the devices. Where
        # a save is due they are read at once, since the save depends on them.
        unread: tuple[int, dict[str, jax.Array]] | None = None
        owed = NOTHING
        for step in range(self.start + 1, self.config.steps + 1):
            measured = self._one_step(step)
            self.end = step
            if unread:
                self._report(*unread)
            unread, stopping = (step, measured), self.stop.should_stop()
            now = due(step, self.config, owed, stopping, self.checkpoints.retry_due)
            if now.compare_replicas:
                divergence.compare_replicas(step, self.state, self.mesh)
            if not now.save:
                continue
            skipped, unread = self._report(step, measured), None
            # A checkpoint written amid skipped updates may be of a model about to diverge. Unless it is required, it
            # waits for an accepted update.
            owed = now if skipped and not now.required else NOTHING
            if not owed.save and self._evaluate_and_save(step, now, stopping, skipped):
                return

    def _one_step(self, step: int) -> dict[str, jax.Array]:
        """Runs a step and returns its metrics, unread: the devices may still be computing them."""
        self.watchdog.beat(f"doing step {step:,}")
        self.profile.before(step)
        with jax.transfer_guard("disallow"):
            with self.timer("input"):
                batch = next(self.batches)
            noise = {}
            if every(step, self.config.noise_scale_every_steps):
                noise = self._measure_noise(self.state, batch.tokens, self.key, batch.labels)
            self.state, measured = self.do_step(self.state, batch)
        self.throughput.step()
        return {**measured, **noise}

    def _report(self, step: int, measured: dict[str, jax.Array]) -> int:
        """Waits for a step's metrics and logs them if that is due or the update was skipped.

        Returns:
          Consecutive skipped updates.

        Raises:
          Diverged: these are `max_skipped_updates` or more.
        """
        values = {name: float(np.asarray(value)) for name, value in jax.device_get(measured).items()}
        skipped = int(values.pop("train/skipped_in_a_row"))
        if self.inputs.codec.has_bits:
            values["train/bits_per_dim"] = self.inputs.codec.bits_per_dimension(values["train/nats_per_pixel"])
        if self.checkpoints.failed_saves:
            values["failed_saves"] = self.checkpoints.failed_saves
        self.metrics.progress(step)
        noise = {name: value for name, value in values.items() if name.startswith("noise/")}
        if noise:
            values |= self.noise_scale.smoothed(noise)
        if skipped or noise or due(step, self.config).log:
            self.metrics.log(step, {**values, **self.throughput.read(), **self.batches.metrics()})
        if skipped >= self.config.max_skipped_updates:
            self.checkpoints.wait()
            advice = divergence.advice(self.checkpoints, step - skipped)
            divergence.note(self.workdir, self.checkpoints.latest_step or self.start, step + self.offset)
            raise Diverged(f"{skipped} updates in a row up to step {step:,} were not finite or spiked, and were "
                           f"skipped. {advice}")
        return skipped

    def _evaluate_and_save(self, step: int, now: Due, stopping: bool, skipped: int) -> bool:
        """Evaluates and saves what is due. Returns whether the run is complete. Raises Preempted, Unsaved."""
        with self.throughput.paused():
            self.evaluated = self.evaluate(step) if now.evaluate else {}
            stopping = stopping or self.stop.should_stop()
            last = step == self.config.steps or self._enough()
            self.metrics.flush()
            self.watchdog.beat(f"saving step {step:,}")
            with self.timer("save"):
                good = not skipped and all(map(math.isfinite, self.evaluated.values()))
                metadata = dataclasses.replace(self.metadata, steps_done=step, metrics=self.evaluated)
                self.checkpoints.save(self.state, metadata, blocking=last or stopping, supersedes=good)
        # A run that is stopped at its last step is complete, unless its evaluation was given up.
        if stopping and (not last or self.inputs.held_out and not self.evaluated):
            raise self._stopped(step)
        return last

    # Summarize.

    def summarize(self) -> dict[str, float]:
        """The metrics for result.json; draws the loss curve once more."""
        evaluates = bool(self.config.data.held_out)  # if not, a best step is that of an earlier config
        best = checkpoint.of_process_0(self.checkpoints.best_saved_step) if evaluates else None
        figures = {"parameters": count_parameters(self.abstract["params"]), "steps": self.end, "best_step": best,
                   "compiler_options": self.model.compiler_options, **self.evaluated, **self.throughput.overall()}
        if jax.process_index() == 0:
            lines = self._lines()
            losses = [line["train/nats_per_pixel"] for line in lines if "train/nats_per_pixel" in line]
            figures["train/nats_per_pixel"] = losses[-1] if losses else None
            speeds = [line["images_per_second"] for line in lines if line.get("images_per_second")]
            figures.setdefault("images_per_second", statistics.median(speeds) if speeds else None)
            with contextlib.suppress(UserError):  # `_lines` has reported it
                figures["goodput"] = goodput(metrics_lines(self.workdir)).get("goodput")
            self._draw(lines)
        return figures

    def _draw(self, lines: list[dict[str, Any]]) -> None:
        """Draws the loss curve of a log."""
        curves = charts.training(lines, self.config.steps, self.model.dims.V, self.model.dims.C)
        save_figure(storage.path(self.workdir) / "figures" / "loss.png", *curves)

    def _lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where a bucket is out of reach, which ends no run."""
        try:
            return load_metrics(self.workdir)
        except UserError as error:
            say(f"no loss curve: {error}")
            return []


def throughput_of(config: PretrainConfig, model: Model, mesh: jax.sharding.Mesh) -> Throughput:
    """Counts model FLOPs as the model's attention does: the causal half, or all."""
    d = model.dims
    flops = train_flops_per_image(d.L, d.D, d.F, d.V, d.T, model.causal)
    chip = topology.chip_for(mesh.devices.flat[0].device_kind)
    return Throughput(config.batch_size, model.dims.T, flops, mesh.size, chip and chip.peak_bf16_flops)
