"""The one training loop: step, log, validate, checkpoint, stop when asked to, finish."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from data_pipeline.errors import DatasetError
from data_pipeline.shards.code_shards import write_atomically
from pretrain.checkpoints.engines import engine_files, load_checkpoint
from pretrain.checkpoints.finding import find_checkpoint, starter
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import ConfigError, JobConfig, changed_keys, config_as_yaml
from pretrain.engine import gradient_norm
from pretrain.garbage import garbage_collected_every
from pretrain.health import Health
from pretrain.lost_ranks import lost_worker
from pretrain.metrics import MetricsLog, peak_memory_bytes
from pretrain.nonfinite import broken_ranks, in_words, record_skipped
from pretrain.random_state import random_state, restore_random_state, seed_everything
from pretrain.runtime import Runtime
from pretrain.stepping import NotFiniteError
from pretrain.stop_signal import StopSignal
from pretrain.throughput import Window
from pretrain.tracing import Tracer

MAX_SKIPPED_IN_A_ROW = 20


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


class Task(Protocol):
    """What a job adds to the loop. Its constructor takes the job's config and the Runtime.

    `train_step` makes one whole optimizer step out of all micro-batches of this rank and returns figures that
    are already averaged over ranks (floats or scalar tensors). Names that start with `count/` are this step's
    amounts over all ranks, such as `count/images`, which the log turns into rates; with `work/`, amounts that
    only `flops` asks for. It takes its step by `take_step` and lets a NotFiniteError pass, with everything
    that it owns as it was before.
    """

    engines: Mapping[str, DeepSpeedEngine]
    exported: tuple[str, str]  # engine of the model that is exported, and a prefix that its names lose
    train_loader: Any  # endless iterable with save_state() and restore_states(states)

    def train_step(self, micro_batches: list[Any]) -> dict[str, Any]:
        """One optimizer step."""

    def flops(self, amounts: Mapping[str, float]) -> float:
        """FLOPs of training steps with these amounts (`count/...`, `work/...`); 0 if nobody knows."""

    def validate(self) -> dict[str, Any]:
        """Figures on held-out data, the same on every rank; pictures are uint8 tensors [H, W, 3]."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs besides its engines to go on exactly."""

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Take over what `state_dict` returned: on this rank, or on all ranks if there were more or fewer."""

    def export_assets(self, directory: Path) -> None:
        """Write what an export has besides its weights; the main process calls."""

    def export(self, directory: Path) -> None:
        """Write what the next job or a user loads; every rank calls, the main one writes."""

    def describe(self) -> list[str]:
        """Lines for the start of the log: parts and their parameters, data."""


class Trainer:
    """Runs a task from wherever its run folder stands to the last step."""

    def __init__(
        self, config: JobConfig, runtime: Runtime, task: Task, stop: StopSignal | None = None
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.task = task
        self.checkpoints = CheckpointWriter(
            runtime.run_dir / "checkpoints", runtime, config.job, config.keep_checkpoints
        )
        self.log = MetricsLog(config, runtime.run_dir, runtime.is_main)
        self.batches: Iterator[Any] | None = None
        self.stop = stop or StopSignal()
        self.wall_seconds = 0.0  # of all earlier starts of this run
        self.skipped_in_a_row = 0
        self.health = Health(config, runtime, self.log.say)
        models = {name: engine.module for name, engine in task.engines.items()}
        self.tracer = Tracer(config.profile, runtime, models, self.log.say)
        runtime.flags.ask = {
            "stop": lambda: self.stop.name is not None,
            "writing": lambda: self.checkpoints.busy,
        }

    def run(self) -> bool:
        """Train, then export.

        Returns:
            True if the run is finished, False if a signal ended it early (a checkpoint is written).

        Raises:
            ConfigError: the run folder's checkpoint does not fit this run.
            TrainingError: a loss or a gradient was not finite, or the data ended.
        """
        self._started = time.perf_counter()
        self.stop.listen(signal.SIGTERM, signal.SIGUSR1)
        try:
            finished = self._run()
        except Exception as error:
            self.health.enter("failed")
            if worker := lost_worker(error):
                last = f"; the last sample was {self.health.last_sample}" if self.health.last_sample else ""
                where = f"rank {self.runtime.rank}, after step {self.runtime.step}"
                raise TrainingError(f"{where}: {worker}{last}") from error
            raise
        self.health.enter("finished" if finished else "stopped")
        return finished

    def _run(self) -> bool:
        self._prepare_run_folder()
        self._start_or_resume()
        first = self.runtime.step
        with garbage_collected_every(self.config.garbage_every) as collect_garbage:
            finished = self._loop(collect_garbage)
        self.tracer.close()
        if first < self.runtime.step or not finished:
            self._save(background=False)
        if finished:
            with self.health.phase("exporting"):
                self._finish()
        else:
            self.log.say(f"stopped by {self.stop.name} after step {self.runtime.step}; checkpoint written")
            self.log.close()
        return finished

    def _prepare_run_folder(self) -> None:
        if not self.runtime.is_main:
            return
        folder = self.runtime.run_dir
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        (folder / "done.json").unlink(missing_ok=True)  # a finished run that is given more steps
        settings = config_as_yaml(self.config)
        saved = folder / "config.yaml"
        if saved.exists():
            for line in changed_keys(saved.read_text(encoding="utf-8"), settings):
                self.log.say(f"changed since the last start: {line}")
        saved.write_text(settings, encoding="utf-8")

    def _start_or_resume(self) -> None:
        # Parameters were drawn with the same seed everywhere; from here each rank draws its own numbers.
        seed_everything(self.config.seed, self.runtime.rank)
        checkpoint = find_checkpoint(self.config, self.checkpoints.folder, self.runtime, self.log.say)
        if checkpoint is not None:
            saved = load_checkpoint(checkpoint, self.runtime, self.task.engines, self.config.job)
            try:
                self.task.train_loader.restore_states([state["loader"] for state in saved.states])
            except ValueError as error:
                raise ConfigError(f"{checkpoint} does not fit the data settings: {error}") from error
            self.task.load_state_dicts([state["task"] for state in saved.states])
            self.wall_seconds = saved.states[0]["wall_seconds"]
            if (own := saved.own(self.runtime.rank)) is not None:
                restore_random_state(own["random"])
        self.log.start(self.runtime.step)
        self.tracer.start()
        runtime = self.runtime
        self.log.say(
            f"{self.config.job}: {runtime.world_size} rank(s) on {runtime.device.type}, {runtime.dtype}, "
            f"batch {self.config.global_batch_size} = {self.config.micro_batch_size} x "
            f"{runtime.micro_steps} micro-step(s) x {runtime.data_ranks}"
        )
        for line in self.task.describe():
            self.log.say(line)
        warmup, steps = self.config.optimizer.warmup_steps, self.config.steps
        if warmup >= steps:
            self.log.say(
                f"warning: optimizer.warmup_steps={warmup} of steps={steps}: "
                "the rate rises to the end of the run"
            )
        self.log.say(f"resumed from {checkpoint}" if checkpoint else f"started in {runtime.run_dir}")

    def _loop(self, collect_garbage: Callable[[int], None]) -> bool:
        config, runtime = self.config, self.runtime
        window = Window(config, runtime, self.task.flops)
        while runtime.step < config.steps:
            self.tracer.before_step()
            begin = time.perf_counter()
            with runtime.clock.part("data"):
                micro_batches = self._next_micro_batches()
            rates = self._learning_rates()
            with self.health.stepping():
                try:
                    figures = self.task.train_step(micro_batches)
                    self.skipped_in_a_row = 0
                except NotFiniteError as error:
                    figures = self._skip_step(error, micro_batches)
                except DatasetError as error:
                    raise TrainingError(f"step {runtime.step + 1}: {error}") from error
                runtime.step += 1
            self.health.step_done(figures)
            if self.checkpoints.pending and not runtime.flags.on_any["writing"]:
                self.checkpoints.finish()
            last = runtime.step == config.steps
            logs = last or self._is_due(config.log_every)
            validates = last or self._is_due(config.validate_every)
            saves = self._is_due(config.checkpoint_every) and not last
            if logs or validates or saves:
                runtime.clock.wait()  # what is left to do of this step is not to count for what comes
            window.add(time.perf_counter() - begin, figures)
            self.tracer.after_step()
            collect_garbage(runtime.step)
            self.log.advance(runtime.step)
            if logs:
                figures = {**window.pop(figures), **rates, **self._engine_figures()}
                self.log.write(runtime.step, "train", {**figures, **self.health.look_at_log(figures)})
            if validates:
                with self.health.phase("validating"):
                    self._validate()
            if runtime.flags.on_any["stop"] and not last:
                self.stop.name = self.stop.name or "a signal to another rank"
                return False
            if saves:
                self._save(config.async_checkpoints)
        return True

    def _is_due(self, every: int) -> bool:
        """Whether something that comes every so many steps, 0 for never, comes after this one."""
        return every > 0 and self.runtime.step % every == 0

    def _next_micro_batches(self) -> list[Any]:
        if self.batches is None:
            # A loader that starts draws seeds for its workers from torch's generator, which a resumed run
            # would do once more than the undisturbed one.
            before = random_state()
            self.batches = iter(self.task.train_loader)
            micro_batches = self._next_micro_batches()
            restore_random_state(before)
            return micro_batches
        micro_batches = []
        try:
            for number in range(self.runtime.micro_steps):
                with self.health.waiting_for_data(number):
                    micro_batches.append(next(self.batches))
                keys = getattr(micro_batches[-1], "keys", None)
                self.health.last_sample = keys[-1] if isinstance(keys, list) and keys else ""
            return micro_batches
        except StopIteration:
            raise TrainingError(
                f"the training data ended after step {self.runtime.step} of {self.config.steps}: "
                "the loader of a training job has to be endless"
            ) from None
        except DatasetError as error:
            raise TrainingError(f"after step {self.runtime.step}: {error}") from error

    def _skip_step(self, error: NotFiniteError, micro_batches: list[Any]) -> dict[str, Any]:
        """Record a step that was not taken and return its figures, or end the run."""
        step, mode = self.runtime.step + 1, self.config.on_nonfinite
        self.skipped_in_a_row += 1
        broken = broken_ranks(error, micro_batches, self.runtime)
        if mode == "skip" and self.skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW:
            if self.runtime.is_main:
                record_skipped(self.runtime.run_dir, step, broken)
            return error.figures
        self.checkpoints.finish()  # every rank is here
        raise TrainingError(
            f"step {step}: {in_words(broken, error)}; {self.skipped_in_a_row} such step(s) in a row with "
            f"on_nonfinite={mode}. Lower optimizer.lr, or look at these samples"
        )

    def _per_engine(self, name: str, figure: Callable[[DeepSpeedEngine], Any]) -> dict[str, Any]:
        engines = self.task.engines
        keys = {key: f"{name}/{key}" if len(engines) > 1 else name for key in engines}
        return {keys[key]: figure(engine) for key, engine in engines.items()}

    def _learning_rates(self) -> dict[str, float]:
        return self._per_engine("lr", lambda engine: engine.get_lr()[0])

    def _engine_figures(self) -> dict[str, float]:
        figures = self._per_engine("gradient_norm", gradient_norm)
        figures = {key: norm for key, norm in figures.items() if norm is not None}
        if skipped := max(engine.skipped_steps for engine in self.task.engines.values()):
            figures["skipped_steps"] = skipped
        return figures

    def _validate(self) -> None:
        # Validation may sample; training must not notice whether it ran.
        before = random_state()
        begin = time.perf_counter()
        with torch.no_grad(), self.runtime.clock.outside("validation"):
            figures = self.task.validate()
        restore_random_state(before)
        for engine in self.task.engines.values():
            engine.train()
        if figures:
            seconds = round(time.perf_counter() - begin, 3)
            self.log.write(self.runtime.step, "val", {**figures, "seconds": seconds})
            self.health.look_at_validation(figures)

    def _save(self, background: bool) -> None:
        with self.health.phase("saving"):
            state = {
                "loader": self.task.train_loader.save_state(),
                "task": self.task.state_dict(),
                "random": random_state(),
                "wall_seconds": self._elapsed(),
            }
            files, engines = engine_files(self.task.engines, state, self.runtime)
            about = {
                "engines": engines,
                "exported": self.task.exported,
                "started_by": starter(self.config),
            }
            self.checkpoints.save(files, about, self.task.export_assets, background)

    def _elapsed(self) -> float:
        return self.wall_seconds + time.perf_counter() - self._started

    def _finish(self) -> None:
        """Export under a temporary name, then say that the run is done."""
        folder = self.runtime.run_dir
        temporary = folder / ".writing_export"
        if self.runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.runtime.barrier()
        self.task.export(temporary)
        self.runtime.barrier()
        peak = torch.tensor([float(peak_memory_bytes(self.runtime.device))], device=self.runtime.device)
        total = peak.clone()
        if self.runtime.world_size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            dist.all_reduce(total)
        self.log.close()
        if self.runtime.is_main:
            shutil.rmtree(folder / "export", ignore_errors=True)
            os.replace(temporary, folder / "export")
            done = {
                "job": self.config.job,
                "steps": self.runtime.step,
                "wall_seconds": round(self._elapsed(), 1),
                "peak_memory_bytes": int(peak.item()),
                "peak_memory_bytes_all_ranks": int(total.item()),
                "world_size": self.runtime.world_size,
                "precision": str(self.runtime.dtype).removeprefix("torch."),
            }
            write_atomically(folder / "done.json", json.dumps(done, indent=1))
        self.log.say(f"finished after {self._elapsed():.1f} s; exported to {folder / 'export'}")


def finished_before(config: JobConfig) -> str | None:
    """A line saying that this run is done already, or None if there is something left to do.

    Raises:
        ConfigError: the folder holds a finished run of another job.
    """
    path = Path(config.run_dir) / "done.json"
    if not path.exists():
        return None
    done = json.loads(path.read_text(encoding="utf-8"))
    if done["job"] != config.job:
        raise ConfigError(f"run_dir={config.run_dir} holds a finished {done['job']} run; take another folder")
    if done["steps"] < config.steps:
        return None
    return (
        f"{config.job} is already finished: {done['steps']} steps in {done['wall_seconds']} s, "
        f"exported to {path.parent / 'export'}"
    )
