"""A regression small enough for tests, with everything a real task has: two engines, loader state, noise."""

import copy
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from data_pipeline.streams import ImageStreamConfig, image_loader
from pretrain.config import JobConfig, OptimizerConfig
from pretrain.engine import build_engine, count_parameters
from pretrain.export import full_state_dict
from pretrain.metrics import Averages
from pretrain.runtime import Runtime
from pretrain.stepping import backward, take_step


@dataclass
class ToyJobConfig(JobConfig):
    job: str = "tests.support.toy_task:ToyJobConfig:ToyTask"
    width: int = 16
    two_engines: bool = False
    noise: bool = False
    nan_at_step: int = -1  # something that is not finite on the last rank, in the last micro-batch
    nan_in: str = "loss"  # of the engines; `gradient`: of the last one alone; `figure`: a loss only logged
    sleep_per_step: float = 0.0
    raise_at_step: int = -1  # on the last rank, an error that nobody expects
    hang_at_step: int = -1  # the last rank goes on after an hour
    data_path: str = ""  # pictures whose keys are the numbers of samples, read by a process of its own
    signal_at_step: int = -1  # the last rank sends itself SIGTERM
    second_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-2))


@dataclass
class ToyBatch:
    """Samples by their keys, which end in their numbers."""

    keys: list[str]


class ToyLoader:
    """Endless samples that depend on their number alone, dealt out micro-batch by micro-batch over ranks."""

    def __init__(self, micro_batch_size: int, rank: int, world_size: int) -> None:
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.dealt = 0  # samples, to all ranks

    def __iter__(self):
        torch.rand(1)  # torch's DataLoader draws a seed for its workers when it starts
        while True:
            first = self.dealt + self.rank * self.micro_batch_size
            self.dealt += self.world_size * self.micro_batch_size
            yield ToyBatch([f"sample{first + i}" for i in range(self.micro_batch_size)])

    @staticmethod
    def sample(number: int) -> torch.Tensor:
        return torch.randn(8, generator=torch.Generator().manual_seed(number))

    def save_state(self):
        return {"dealt": self.dealt}

    def restore_states(self, states):
        """Whatever the number of ranks that saved: they stopped after the same step."""
        (self.dealt,) = {state["dealt"] for state in states}


class ToyModel(nn.Module):
    """Two trained layers, a frozen one and a buffer that training changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, width)
        self.frozen.requires_grad_(False)
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor, noise: bool = False) -> torch.Tensor:
        h = torch.tanh(self.first(self.frozen(x)))
        if noise:
            h = torch.dropout(h, 0.2, True)
        self.seen += 1
        return self.last(self.norm(h)).squeeze(-1)


class ToyTask:
    exported = ("model", "")

    def __init__(self, config: ToyJobConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        models = [ToyModel(config.width)]
        models.append(copy.deepcopy(models[0]))
        self.engines = {"model": build_engine(models[0], config, runtime)}
        if config.two_engines:
            second = build_engine(models[1], config, runtime, config.second_optimizer, "zero1.json")
            self.engines["second"] = second
        self.train_loader = ToyLoader(config.micro_batch_size, runtime.rank, runtime.world_size)
        if config.data_path:
            pictures = ImageStreamConfig(path=config.data_path, num_workers=1, shuffle_buffer_size=0)
            self.train_loader = image_loader(
                pictures, config.micro_batch_size, runtime.rank, runtime.world_size
            )
        self.steps_counted = 0

    def describe(self) -> list[str]:
        return [f"model {count_parameters(self.engines['model'].module)} parameters"]

    def loss(self, engine, batch: torch.Tensor) -> torch.Tensor:
        target = batch.square().sum(1).sin()
        return (engine(batch.to(self.runtime.dtype), self.config.noise).float() - target).square()

    def train_step(self, micro_batches: list[ToyBatch]) -> dict:
        time.sleep(self.config.sleep_per_step)
        is_last_rank = self.runtime.rank == self.runtime.world_size - 1
        if self.runtime.step == self.config.signal_at_step and is_last_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.runtime.step == self.config.raise_at_step and is_last_rank:
            raise KeyError("nobody expects this")
        if self.runtime.step == self.config.hang_at_step and is_last_rank:
            time.sleep(3600)
        averages = Averages(self.runtime.device)
        total = self.config.global_batch_size
        for batch in micro_batches:
            breaks = (
                self.runtime.step == self.config.nan_at_step and is_last_rank and batch is micro_batches[-1]
            )
            where = self.config.nan_in if breaks else ""
            numbers = [int(key.removeprefix("sample")) for key in batch.keys]
            for name, engine in self.engines.items():
                losses = self.loss(engine, torch.stack([ToyLoader.sample(n) for n in numbers]))
                if where == "loss":
                    losses = losses * torch.nan
                if where == "gradient" and engine is list(self.engines.values())[-1]:
                    losses = losses + (0 * losses).sqrt()  # 0, with a derivative of 0 x infinity
                if name == "second":  # the same gradient, put in another way
                    backward(engine, losses.sum() / total, "sum")
                else:
                    backward(engine, losses.mean())
                losses = losses * torch.nan if where == "figure" else losses
                averages.add(f"loss/{name}", losses.sum(), len(losses))
        figures = take_step(self.engines, averages)
        self.steps_counted += 1
        return {**figures, "count/samples": total}

    def flops(self, amounts) -> float:
        return 1e6 * amounts["count/samples"]

    def validate(self) -> dict:
        torch.rand(3)  # validation may draw random numbers
        averages = Averages(self.runtime.device)
        batch = torch.stack([ToyLoader.sample(-1 - i) for i in range(8)])
        losses = self.loss(self.engines["model"], batch)
        averages.add("loss/model", losses.sum(), len(losses))
        averages.add("never_counted", 0.0, 0)
        return {**averages.reduce(), "picture": torch.full((4, 6, 3), 200, dtype=torch.uint8)}

    def state_dict(self) -> dict:
        return {"steps_counted": self.steps_counted}

    def load_state_dicts(self, states: list[dict]) -> None:
        self.steps_counted = states[0]["steps_counted"]

    def export_assets(self, directory: Path) -> None:
        (directory / "config.json").write_text('{"model_type": "toy"}', encoding="utf-8")

    def export(self, directory: Path) -> None:
        state = full_state_dict(self.engines["model"])
        if self.runtime.is_main:
            torch.save({**state, "steps_counted": self.steps_counted}, directory / "model.pt")
