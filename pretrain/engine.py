"""From recipe and DeepSpeed JSON to running engines: processes, device, precision, seeds, backward passes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
from deepspeed import DeepSpeedEngine

from pretrain.config import ConfigError, JobConfig, OptimizerConfig
from pretrain.optim import LearningRateSchedule, build_optimizer, parameter_groups

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


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
    step: int = 0  # optimizer steps done; the trainer keeps it true

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on at least one rank; every rank has to call."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def smallest(self, number: int) -> int:
        """The smallest `number` of all ranks; every rank has to call."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def start_runtime(config: JobConfig) -> Runtime:
    """Join the processes of this run, choose device and precision, set the seeds.

    Started by `deepspeed`, `torchrun` or Slurm the environment names the ranks; alone it is one rank.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    # DeepSpeed calls collectives by names that torch has since changed: hundreds of lines a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
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
        timeout=timedelta(minutes=30),
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


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch; models are built with rank 0's seed, steps run with each rank's own."""
    value = (seed * 1_000_003 + rank) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def choose_precision(config: JobConfig, device: torch.device) -> torch.dtype:
    """Dtype of parameters and activations: from the recipe or the JSON, else bf16 if the hardware has it.

    Raises:
        ConfigError: recipe and JSON both set it.
    """
    precision = config.precision
    in_json = _read_deepspeed_file(config.deepspeed).get("bf16", {}).get("enabled", "auto")
    if in_json != "auto":
        if precision != "auto":
            raise ConfigError(
                f"{config.deepspeed} sets bf16.enabled={in_json} and the recipe precision={precision}: "
                'write "auto" in one of the two'
            )
        precision = "bf16" if in_json else "fp32"
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bf16, which is what `precision: auto` asks.

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
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def deepspeed_settings(
    config: JobConfig, runtime: Runtime, path: str | None = None, optimizer: OptimizerConfig | None = None
) -> dict[str, Any]:
    """The DeepSpeed configuration: the JSON file with every "auto" filled from recipe and hardware.

    Args:
        config: Job settings; `config.deepspeed` names the file.
        runtime: Ranks and precision.
        path: Another file than the recipe's, for a second engine.
        optimizer: Other optimizer settings than `config.optimizer`, for a second engine.

    Raises:
        ConfigError: the file is missing or not JSON, it sets what the recipe owns, or an "auto" is left over.
    """
    name = path or config.deepspeed
    settings = _read_deepspeed_file(name)
    recipe_values = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": runtime.micro_steps,
        "gradient_clipping": config.gradient_clipping,
    }
    for key, value in recipe_values.items():
        if settings.get(key, "auto") != "auto":
            raise ConfigError(
                f"{name} sets {key}={settings[key]} and the recipe sets {value}: "
                f'write "auto" in {name}, the recipe owns it'
            )
        settings[key] = value
    if "reduce_scatter" in settings.get("zero_optimization", {}):
        # ZeRO-3 with Muon needs the gradients of whole matrices. ZeRO-2 of DeepSpeed 0.19.8 says that it does
        # not, but with gradients added up in fp32 it loses those of matrices that lie on two ranks.
        uses_muon = (optimizer or config.optimizer).name == "muon"
        if settings["zero_optimization"]["reduce_scatter"] == "auto":
            settings["zero_optimization"]["reduce_scatter"] = not uses_muon
    use_bf16 = runtime.dtype == torch.bfloat16
    bf16 = settings.setdefault("bf16", {})
    if bf16.get("enabled", "auto") not in ("auto", use_bf16):
        raise ConfigError(f"{name} sets bf16.enabled={bf16['enabled']}, but this run is in {runtime.dtype}")
    bf16["enabled"] = use_bf16
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise ConfigError(f'{name} sets "{key}", which the recipe owns (optimizer.*): remove it there')
    if settings.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{name} enables fp16; expected bf16 or fp32 (precision in the recipe)")
    left = list(_find_auto(settings))
    if left:
        raise ConfigError(f'{name}: "auto" is not filled for {", ".join(left)}; write a value')
    if settings.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        # Without ZeRO, DeepSpeed in fp32 does not look for non-finite gradients before it steps.
        raise ConfigError(f"{name}: expected zero_optimization.stage 1, 2 or 3")
    return settings


def zero_level(config: JobConfig, path: str | None = None) -> int:
    """ZeRO level that the DeepSpeed file asks for."""
    return int(_read_deepspeed_file(path or config.deepspeed).get("zero_optimization", {}).get("stage", 0))


@contextlib.contextmanager
def sharded_construction(config: JobConfig, runtime: Runtime) -> Iterator[None]:
    """While it is open, transformers builds and loads models already sharded if the level is ZeRO-3.

    Use it around `AutoModel.from_config` and `from_pretrained`. A bare `deepspeed.zero.Init` would silently
    lose transformers' initialisation and cast fp32 buffers.
    """
    settings = deepspeed_settings(config, runtime)
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps a weak reference only: the name holds the object for as long as the block lasts.
    active = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del active


@contextlib.contextmanager
def gathered_for_writing(module: nn.Module) -> Iterator[None]:
    """While it is open, a module's parameters are whole under ZeRO-3; what every rank writes alike stays."""
    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
        yield


def build_engine(
    model: nn.Module,
    config: JobConfig,
    runtime: Runtime,
    optimizer: OptimizerConfig | None = None,
    deepspeed_file: str | None = None,
) -> DeepSpeedEngine:
    """Wrap a model in DeepSpeed with the recipe's optimizer and schedule.

    Args:
        model: Module whose trainable parameters are optimized; frozen ones are kept as they are.
        config: Job settings.
        runtime: From `start_runtime`.
        optimizer: Other optimizer settings than `config.optimizer`, for a second engine.
        deepspeed_file: Another DeepSpeed JSON than `config.deepspeed`, for a second engine.

    Raises:
        ConfigError: see `deepspeed_settings`; or DeepSpeed refuses the configuration.
    """
    from pydantic import ValidationError

    optimizer = optimizer or config.optimizer
    settings = deepspeed_settings(config, runtime, deepspeed_file, optimizer)
    level, uses_muon = settings["zero_optimization"]["stage"], optimizer.name == "muon"
    if uses_muon and level == 1 and settings["bf16"]["enabled"]:
        _require_matrices(model, optimizer, deepspeed_file or config.deepspeed)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            # Called once DeepSpeed has cast and placed the parameters.
            optimizer=lambda _parameters: build_optimizer(model, optimizer),
            lr_scheduler=lambda base: LearningRateSchedule(base, optimizer, config.steps),
            config=copy.deepcopy(settings),
            dist_init_required=False,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{deepspeed_file or config.deepspeed}: {key}: {first['msg']}") from error
    _keep_muon_in_fp32(engine)
    engine.train()
    return engine


def _require_matrices(model: nn.Module, optimizer: OptimizerConfig, name_of_file: str) -> None:
    """Raise ConfigError if Muon is to take stacks or kernels, which DeepSpeed's ZeRO-1 in bf16 does not."""
    parameter_groups(model, optimizer)  # marks what Muon takes
    for name, parameter in model.named_parameters():
        if getattr(parameter, "use_muon", False) and parameter.ndim > 2:
            raise ConfigError(
                f"{name_of_file} with optimizer.name=muon in bf16 takes matrices only, and {name} has "
                f"{parameter.ndim} dimensions; take zero2.json or zero3.json, or precision=fp32"
            )


def _keep_muon_in_fp32(engine: DeepSpeedEngine) -> None:
    """Let ZeRO-2 hand Muon gradients in the type they are to be added up in (`data_types` of the JSON).

    DeepSpeed 0.19.8 hands it those of the last backward pass, in bf16, adds micro-batches up in them, and
    keeps the momentum in the same type; at the other levels all three are in fp32.
    """
    zero = engine.optimizer
    if not hasattr(zero, "get_all_grad_tensors"):  # ZeRO-3 has another way
        return
    gradients = zero.get_all_grad_tensors
    zero.get_all_grad_tensors = lambda tensors, dtype: [g.to(dtype) for g in gradients(tensors, dtype)]


def backward_and_step(
    engine: DeepSpeedEngine, loss: Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> bool:
    """Backward of one micro-batch's loss, and the optimizer step after the last micro-batch.

    DeepSpeed averages gradients over ranks and, unless told otherwise, over micro-batches.

    Args:
        engine: The engine whose forward made the loss; called once for each of the step's micro-batches.
        loss: Scalar.
        reduction: What is minimised over all ranks and micro-batches of the step: the `mean` of their losses,
            or the `sum`, for losses that the task has already divided by a global count.

    Returns:
        True if the optimizer moved; False before the last micro-batch, or if the gradients were not finite on
        some rank (then no rank moves).
    """
    if reduction == "sum":
        engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
    else:
        engine.backward(loss)
    engine.step()
    return engine.was_step_applied()


def count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, of sharded ones too."""
    parameters = [p for p in module.parameters() if p.requires_grad or not trainable_only]
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def rounded_by_engine(model: nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """Copies on the CPU of the frozen parameters that a bf16 engine rounds for good, for `full_state_dict`.

    Trained parameters have fp32 masters in the engine; frozen ones are cast and nothing else is kept, so that
    what a phase leaves alone would come out of it changed. Empty in fp32 and on ranks that do not export.

    Args:
        model: before `build_engine`, whole and in fp32.
        runtime: rank and precision.
    """
    if runtime.dtype == torch.float32 or not runtime.is_main:
        return {}
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in frozen}


def full_state_dict(engine: DeepSpeedEngine, frozen: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The whole model on the CPU in fp32, trained parameters from their masters; every rank has to call.

    Args:
        engine: the engine.
        frozen: parameters by name to take in place of the engine's, which in bf16 has rounded them.

    Returns:
        The state dict on the main rank, an empty one on the others.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    module, is_main = engine.module, dist.get_rank() == 0
    frozen = frozen or {}
    gathered: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is not None:
            value = master
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        if is_main:
            gathered[id(parameter)] = frozen.get(name, value).detach().cpu()
    if not is_main:
        return {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        value = gathered[id(parameters[name])] if name in parameters else tensor.detach().cpu()
        state[name] = value.float() if value.is_floating_point() else value
    return state


def saved_weights(folder: str | Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a model folder's safetensors files; `names` maps names there to names of the result."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {names[name]: file.get_tensor(name) for name in file.keys() if name in names}
    return found


def save_in_fp32(model: PreTrainedModel, directory: Path, state: dict[str, Tensor]) -> None:
    """Save a model by its fp32 `state`, and say fp32 in its config.

    transformers writes the type of the live parameters into the config and, by default, loads in the type
    that the config names: a model trained in bf16 would be read back rounded to bf16.
    """
    model.save_pretrained(directory, state_dict=state)
    path = directory / "config.json"

    def in_fp32(section: dict[str, Any]) -> dict[str, Any]:
        settings = {key: in_fp32(part) if isinstance(part, dict) else part for key, part in section.items()}
        return settings | ({"dtype": "float32"} if "dtype" in settings else {})

    config = in_fp32(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """Global norm of what the last optimizer step was made from, before clipping; None before the first.

    With Muon the updates stand in for the gradients of the matrices.
    """
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _read_deepspeed_file(name: str) -> dict[str, Any]:
    candidates = (Path(name), DS_CONFIGS / name, DS_CONFIGS / f"{name}.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"deepspeed={name}: there is no such file; ds_configs has {known}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed={name} is not valid JSON: {error}") from error


def _find_auto(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _find_auto(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
