"""Where a job runs: ranks, device, seeds, and the precision that `auto` means there."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist

from pretrain.config import ConfigError, JobConfig
from pretrain.metrics import on_device
from pretrain.random_state import seed_everything
from pretrain.timing import StepClock

T = TypeVar("T")
DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


class RankFlags:
    """What the loop has to know of all ranks after each step; it travels with the figures of the step.

    Attributes:
        ask: name -> whether it holds on this rank; the same names on every rank.
        on_any: name -> whether it held on at least one rank when the figures of the last step were gathered.
    """

    def __init__(self) -> None:
        self.ask: dict[str, Callable[[], bool]] = {}
        self.on_any: dict[str, bool] = {}


@dataclass
class Runtime:
    """Where and how this process runs; handed to every task."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of parameters and activations; master weights are fp32 in any case
    seed: int
    micro_steps: int  # micro-batches per rank and optimizer step
    run_dir: Path
    data_ranks: int = 0  # ranks, or groups of them, with samples of their own; 0: every rank
    step: int = 0  # optimizer steps done; the trainer keeps it true
    flags: RankFlags = field(default_factory=RankFlags)
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = StepClock(self.device)
        self.data_ranks = self.data_ranks or self.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of `data_ranks` this rank is, or is part of; those of a group follow one another."""
        return self.rank * self.data_ranks // self.world_size

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on at least one rank; every rank has to call."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def together(self, batches: Iterable[T], most: int = 0) -> Iterator[T | None]:
        """The batches of this rank's pass, `most` of them (0: all), and None where only others have one left.

        Under ZeRO-3 every rank has to run a model as often as the others: every rank has to iterate.
        """
        left = itertools.islice(batches, most or None)
        while self.any_rank((batch := next(left, None)) is not None):
            yield batch

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest of all ranks, number by number; every rank has to call, with as many."""
        if self.world_size == 1:
            return list(numbers)
        tensor = on_device(numbers, self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def smallest(self, number: int) -> int:
        """The smallest `number` of all ranks; every rank has to call."""
        if self.world_size == 1:
            return number
        tensor = on_device([number], self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def from_main(self, value: T) -> T:
        """The main process's `value`; every rank has to call."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def share_out(self, values: Sequence[T] | None) -> T:
        """This rank's part of what the main process gives, a value for each rank; every rank has to call."""
        if self.world_size == 1:
            return values[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, list(values) if values is not None else None, src=0)
        return mine[0]

    def to_main(self, value: T) -> list[T]:
        """The values of all ranks on the main process, nothing on the others; every rank has to call."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def limit_waits(self, seconds: float) -> None:
        """Let every collective from here on fail that takes longer; under NCCL it ends the process."""
        # DeepSpeed's groups too, which have torch's default whatever the first one was given.
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.set_timeout(timedelta(seconds=seconds), group)

    def from_all(self, value: T) -> list[T]:
        """The values of all ranks, on every rank; every rank has to call."""
        return self.from_main(self.to_main(value))

    def first_of_all(self, text: str) -> str:
        """The first text of all ranks that is not empty, or nothing; every rank has to call."""
        return self.from_main(next(filter(None, self.to_main(text)), ""))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def start_runtime(config: JobConfig) -> Runtime:
    """Join the processes of this run, choose device and precision, set the seeds.

    The environment names the ranks, as `deepspeed`, `torchrun` or `name_ranks` set it; alone it is one rank.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    # DeepSpeed calls collectives by names that torch has since changed: hundreds of lines a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed reads it too
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        # DeepSpeed would compile a shared-memory all-reduce for CPU ranks at start: half a minute and a C++
        # compiler for a gain that only many-core hosts see.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Nothing is compiled on a CPU here; without this, DeepSpeed's optimizers load all of inductor.
        if hasattr(torch.compiler, "set_default_backend"):
            torch.compiler.set_default_backend("eager")
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=config.health.startup_timeout_seconds),
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    seed_everything(config.seed)
    return Runtime(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        device=device,
        dtype=choose_precision(config, device),
        seed=config.seed,
        micro_steps=config.micro_steps(world_size),
        run_dir=Path(config.run_dir),
        data_ranks=config.data_ranks(world_size),
    )


def leave(runtime: Runtime) -> None:
    """End a successful process: wait for the others, flush, exit 0.

    The interpreter is not unwound: gloo's background threads sometimes abort a process that is shutting down,
    after all its work is done, and the launcher would then report a failed run.
    """
    runtime.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def free_port() -> int:
    """A TCP port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_precision(config: JobConfig, device: torch.device) -> torch.dtype:
    """Dtype of parameters and activations: from the recipe or the JSON, else bf16 where it is quicker.

    Raises:
        ConfigError: recipe and JSON both set it.
    """
    precision = config.precision
    in_json = read_deepspeed_file(config.deepspeed).get("bf16", {}).get("enabled", "auto")
    if in_json != "auto":
        if precision != "auto":
            raise ConfigError(
                f"{config.deepspeed} sets bf16.enabled={in_json} and the recipe precision={precision}: "
                'write "auto" in one of the two'
            )
        precision = "bf16" if in_json else "fp32"
    if precision == "auto":
        precision = "bf16" if gains_by_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def gains_by_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bf16 and gains by it, which is what `precision: auto` asks.

    A CPU that does so in AMX's tiles loses at the sizes that CPUs train (docs/performance.md).

    The environment variable DUALTOKEN_NATIVE_BF16 (0 or 1) answers in its place: one machine then runs what
    `auto` would choose on another.

    Raises:
        ConfigError: the variable is neither.
    """
    answer = os.environ.get("DUALTOKEN_NATIVE_BF16", "")
    if answer not in ("", "0", "1"):
        raise ConfigError(f"DUALTOKEN_NATIVE_BF16={answer}: expected 0, 1, or not set to ask the hardware")
    if answer:
        return answer == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16")) and not features.get("amx_bf16")


def read_deepspeed_file(name: str) -> dict[str, Any]:
    """Read DeepSpeed's settings from a path, or from a file in ds_configs/ by its name.

    Raises:
        ConfigError: there is no such file, or it is not JSON.
    """
    candidates = (Path(name), DS_CONFIGS / name, DS_CONFIGS / f"{name}.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"deepspeed={name}: there is no such file; ds_configs has {known}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed={name} is not valid JSON: {error}") from error
