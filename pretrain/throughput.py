"""How fast the steps since the last log line were, where their time went, and what memory they took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from pretrain.config import JobConfig
from pretrain.gpus import peak_flops
from pretrain.metrics import Averages, peak_memory_bytes
from pretrain.runtime import Runtime

AMOUNTS = ("count/", "work/")  # names of a step's figures that are amounts over all ranks
_GIB = 2.0**30


class Window:
    """Times and amounts of the steps since the last log line.

    Args:
        config: `peak_tflops`.
        runtime: ranks and device; `runtime.clock` has the parts of the steps.
        flops: FLOPs of steps with these amounts (`Task.flops`).
    """

    def __init__(
        self, config: JobConfig, runtime: Runtime, flops: Callable[[Mapping[str, float]], float]
    ) -> None:
        self.runtime, self.flops = runtime, flops
        self.peak_flops = rank_peak_flops(config, runtime)
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.amounts: dict[str, float] = defaultdict(float)

    def add(self, seconds: float, figures: Mapping[str, Any]) -> None:
        """Add a step that took `seconds`."""
        self.steps += 1
        self.seconds += seconds
        for key, value in figures.items():
            if key.startswith(AMOUNTS):
                self.amounts[key] += value
        self.runtime.clock.collect()

    def pop(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The last step's figures with times, rates and memory; starts a new window.

        Every rank has to call; waits for the device and for the other ranks.
        """
        shown = {key: value for key, value in figures.items() if not key.startswith(AMOUNTS)}
        for key, total in self.amounts.items():
            if key.startswith("count/"):
                shown[f"{key.removeprefix('count/')}_per_second"] = total / self.seconds
        shown["seconds_per_step"] = self.seconds / self.steps
        # Of the rank that waited longest, on which the others wait in turn.
        memory = memory_gib(self.runtime.device)
        waited, *most = self.runtime.largest([self.runtime.clock.waited, *memory.values()])
        shown["data_wait"] = waited / self.seconds
        shown |= self._parts()
        shown |= {f"memory/{name}_gib": round(gib, 3) for name, gib in zip(memory, most, strict=True)}
        if flops := self.flops(self.amounts):
            of_rank = flops / self.seconds / self.runtime.world_size
            shown["tflops_per_rank"] = of_rank / 1e12
            if self.peak_flops is not None:
                shown["mfu"] = of_rank / self.peak_flops
        self._clear()
        return shown

    def _parts(self) -> dict[str, float]:
        """Seconds of a step by part, means over ranks, with the rest of the step."""
        seconds = self.runtime.clock.pop()
        seconds["rest"] = self.seconds - sum(seconds.values())
        averages = Averages(self.runtime.device)
        for part, total in seconds.items():
            averages.add(f"seconds/{part}", total, self.steps)
        return averages.reduce()


def rank_peak_flops(config: JobConfig, runtime: Runtime) -> float | None:
    """FLOP/s that a rank's device could do: as configured, else the GPU's data sheet; None if unknown."""
    if config.peak_tflops:
        return config.peak_tflops * 1e12
    if runtime.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(runtime.device), runtime.dtype)


def memory_gib(device: torch.device) -> dict[str, float]:
    """Memory of this process by name: of the GPU if it has one, else resident; `peak` since the start."""
    held = {"peak": peak_memory_bytes(device)}
    if device.type == "cuda":
        held |= {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
        }
    else:
        held["resident"] = psutil.Process().memory_info().rss
    return {name: number / _GIB for name, number in held.items()}
