"""Figures of a run: averages over ranks and micro-batches, metrics.jsonl, wandb and the console."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import JobConfig, config_as_yaml

COLUMNS = 120  # that a printed line of figures has at most


class Averages:
    """Sums and counts of named figures; `reduce` gives sum of sums over sum of counts across all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, Tensor | float] = {}
        self.not_finite: list[str] = []  # after `reduce`: whose sums over all ranks are NaN or infinite

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add a sum over `count` items; tensors keep no graph; nobody waits for the device."""
        for kept, value in ((self.sums, total), (self.counts, count)):
            if isinstance(value, Tensor):
                value = value.detach().to(self.device, torch.float64, non_blocking=True)
            kept[name] = kept.get(name, 0.0) + value

    def reduce(self) -> dict[str, float]:
        """Averages over everything that all ranks added, in one collective and one wait for the device.

        A figure nobody counted (count 0) is NaN.

        Raises:
            RuntimeError: the ranks added different names, so that their sums would be mixed up.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        checksum = float(zlib.crc32("\n".join(names).encode()))
        values = [*(self.sums[n] for n in names), *(self.counts[n] for n in names), checksum, 1.0]
        # Numbers go to the device together; a copy for each would wait for all that it has been given to do.
        numbers = on_device([0.0 if isinstance(v, Tensor) else v for v in values], self.device).unbind()
        pairs = zip(values, numbers, strict=True)
        packed = torch.stack([value if isinstance(value, Tensor) else number for value, number in pairs])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(packed)
        *values, of_names, ranks = packed.tolist()
        if of_names != checksum * ranks:
            raise RuntimeError(f"ranks report different figures; this one has {', '.join(names)}")
        totals = dict(zip(names, values[: len(names)], strict=True))
        counts = dict(zip(names, values[len(names) :], strict=True))
        self.not_finite = [name for name in names if not math.isfinite(totals[name])]
        return {name: totals[name] / counts[name] if counts[name] else math.nan for name in names}


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as an fp64 tensor on a device, without waiting for it as `torch.tensor(device=)` would."""
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


class MetricsLog:
    """Writes the figures of a run: metrics.jsonl, wandb, and a line or a progress bar on the console.

    Only the main process writes; on others every method does nothing.
    """

    def __init__(self, config: JobConfig, run_dir: Path, is_main: bool) -> None:
        self.config = config
        self.run_dir = run_dir
        self.is_main = is_main
        self._progress: Any = None
        self._bar: Any = None
        self._wandb: Any = None

    def start(self, step: int) -> None:
        """Open the outputs; lines of metrics.jsonl after `step`, left by a killed run, are dropped."""
        if not self.is_main:
            return
        self._path = self.run_dir / "metrics.jsonl"
        _drop_lines_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        if self.config.wandb.mode != "disabled":
            self._wandb = _start_wandb(self.config, self.run_dir)
        if sys.stdout.isatty():
            from rich import progress

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = self._progress.add_task(self.config.job, total=self.config.steps, completed=step)
            self._progress.start()

    def say(self, line: str) -> None:
        """Print one line, above the progress bar if there is one."""
        if not self.is_main:
            return
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            try:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            except BrokenPipeError:  # who read it is gone: no reason to end without a checkpoint
                sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=step)

    def write(self, step: int, split: str, figures: dict[str, Any]) -> None:
        """Record figures of one step; uint8 tensors [H, W, 3] are pictures and go to `images/` and wandb."""
        if not self.is_main:
            return
        numbers = {key: _number(value) for key, value in figures.items() if not _is_picture(value)}
        record = {"step": step, "split": split, "time": round(time.time(), 3), **numbers}
        # NaN is not JSON: a figure that could not be computed is null.
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        pictures = {key: value for key, value in figures.items() if _is_picture(value)}
        files = {key: self._save_picture(step, key, value) for key, value in pictures.items()}
        if self._wandb is not None:
            import wandb

            logged: dict[str, Any] = {f"{split}/{key}": value for key, value in numbers.items()}
            logged |= {f"{split}/{key}": wandb.Image(str(path)) for key, path in files.items()}
            self._to_wandb(lambda run: run.log(logged, step=step))
        # A terminal may be narrower; in a wider one a line would be no easier to read.
        columns = shutil.get_terminal_size().columns if self._progress is not None else COLUMNS
        width = min(columns, COLUMNS)
        self.say(console_line(step, self.config.steps, split, numbers, width))

    def close(self) -> None:
        """Finish the outputs."""
        if not self.is_main:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._wandb is not None:
            self._to_wandb(lambda run: run.finish())
        self._file.close()

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        """Send to wandb, whose process may be gone, ended by the signal that stops this one too."""
        try:
            send(self._wandb)
        except ConnectionError as error:
            self._wandb = None
            self.say(f"warning: wandb takes no more figures ({error}); metrics.jsonl has all of them")

    def _save_picture(self, step: int, key: str, picture: Tensor) -> Path:
        from PIL import Image

        folder = self.run_dir / "images"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:08d}_{key.replace('/', '_')}.png"
        Image.fromarray(picture.cpu().numpy()).save(path)
        return path


def console_line(step: int, steps: int, split: str, numbers: dict[str, float], width: int = COLUMNS) -> str:
    """A step in one line: what matters most first, and as much as fits; metrics.jsonl has all of it.

    Args:
        step: the step of `steps`.
        steps: of the run.
        split: `train` or `val`.
        numbers: figures by name.
        width: columns that the line may have.
    """
    # NaN is what nobody counted, such as the loss of pictures where none is drawn.
    left = {key: value for key, value in numbers.items() if not is_detail(key) and not math.isnan(value)}
    line = f"{split:5s} {step:>{len(str(steps))}}/{steps}"
    words = []
    if "loss/total" in left:
        words.append(f"loss {_short(left.pop('loss/total'))}")
        left = {key.removeprefix("loss/"): value for key, value in left.items()}
    words += [f"{key} {_short(left.pop(key))}" for key in sorted(left) if key.startswith("loss/")]
    if "seconds_per_step" in left:
        words.append(f"{left.pop('seconds_per_step'):.3g} s/step")
    for key in [key for key in left if key.endswith("_per_second")]:
        rate = left.pop(key)
        words.append(f"{rate:{',.0f' if rate >= 1000 else '.3g'}} {key.removesuffix('_per_second')}/s")
    if "mfu" in left:
        words.append(f"mfu {left.pop('mfu'):.1%}")
    if (waiting := left.pop("data_wait", 0.0)) >= 0.05:
        words.append(f"{waiting:.0%} waiting for data")
    last = ("lr", "gradient_norm", "seconds")
    words += [f"{key} {_short(left[key])}" for key in sorted(left, key=lambda k: k.partition("/")[0] in last)]
    for word in words:
        if len(line) + 2 + len(word) > width:
            break
        line += f"  {word}"
    return line


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory this process has held: of the GPU if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def read_metrics(path: Path) -> Iterable[dict[str, Any]]:
    """Records of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


def _start_wandb(config: JobConfig, run_dir: Path) -> Any:
    import wandb
    from omegaconf import OmegaConf

    # One run of the folder is one run in wandb, however often it was resumed.
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return wandb.init(
        mode=config.wandb.mode,
        project=config.wandb.project,
        name=config.wandb.name or run_dir.name,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run_dir),
        config=OmegaConf.to_container(OmegaConf.create(config_as_yaml(config))),
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )


def is_detail(key: str) -> bool:
    """Whether a figure is one of many of its kind (by depth, codebook, part, ...): not printed."""
    details = ("codebook_", "nll_", "accuracy_", "seconds/", "memory/", "tflops_", "warnings/loss_spike/")
    return key.startswith(details)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 3


def _number(value: Any) -> float | int:
    return value.item() if isinstance(value, Tensor) else value


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
