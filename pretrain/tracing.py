"""A trace of some steps (`profile.steps=10..13`): what the host and the GPU did, range by range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.config import ProfileConfig
from pretrain.runtime import Runtime

FOLDER = "traces"  # in the run folder
_DEPTH = 2  # of the names of modules that get a range of their own


class Tracer:
    """Records the steps that `profile.steps` names on every rank, each into a file of its own.

    Ranges are the step, its parts (`pretrain.timing.PARTS`), and within the forward pass the parts of the
    models, as ENGINE/MODULE.

    Args:
        config: which steps.
        runtime: rank, step and folder.
        models: by the name of their engine.
        say: prints a line on the main process.
    """

    def __init__(
        self,
        config: ProfileConfig,
        runtime: Runtime,
        models: Mapping[str, nn.Module],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.runtime, self.models, self.say = config, runtime, models, say
        self._profile: profile | None = None
        self._step: record_function | None = None
        self._hooks: list[Any] = []

    def start(self) -> None:
        """Say so if the steps have passed already; where a run starts."""
        bounds = self.config.bounds()
        if bounds is not None and self.runtime.step >= bounds[0]:
            self.say(
                f"profile.steps={self.config.steps}: no trace, this start begins with step "
                f"{self.runtime.step + 1}; name a later step to begin with"
            )

    def before_step(self) -> None:
        """Begin to record if the next step is the first one."""
        bounds, step = self.config.bounds(), self.runtime.step + 1
        if bounds is None:
            return
        if step == bounds[0]:
            for name, model in self.models.items():
                for path, module in parts_of(model):
                    self._mark(f"{name}/{path}", module)
            activities = [ProfilerActivity.CPU]
            if self.runtime.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        if self._profile is not None:
            self._step = record_function(f"step {step}")
            self._step.__enter__()

    def after_step(self) -> None:
        """Write the trace if this was the last step."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        bounds = self.config.bounds()
        if bounds is not None and self.runtime.step == bounds[1]:
            self.close()

    def close(self) -> None:
        """Write what has been recorded, if anything is being recorded; a stopped run may end within it."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        for hook in self._hooks:
            hook.remove()
        folder = self.runtime.run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        first, last = self.config.bounds() or (0, 0)
        file = folder / f"steps_{first}_to_{min(last, self.runtime.step)}_rank_{self.runtime.rank}.json.gz"
        recorded.export_chrome_trace(str(file))
        self.say(f"trace of steps {self.config.steps}, a file for each rank: {folder}")

    def _mark(self, name: str, module: nn.Module) -> None:
        ranges: list[record_function] = []

        def begin(*_: Any) -> None:
            ranges.append(record_function(name))
            ranges[-1].__enter__()

        def end(*_: Any) -> None:
            ranges.pop().__exit__(None, None, None)

        self._hooks.append(module.register_forward_pre_hook(begin))
        self._hooks.append(module.register_forward_hook(end, always_call=True))


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model down to the second level, with their names."""
    for name, module in model.named_modules():
        if name and name.count(".") < _DEPTH:
            yield name, module
