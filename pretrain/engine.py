"""From recipe and DeepSpeed JSON to running engines."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from pretrain.config import ConfigError, JobConfig, OptimizerConfig
from pretrain.optim import LearningRateSchedule, build_optimizer, parameter_groups
from pretrain.runtime import Runtime, read_deepspeed_file
from pretrain.stepping import GradientMarks


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
    settings = read_deepspeed_file(name)
    recipe_values = {
        # Ranks that share a sample count as one each, which is no matter where losses are summed up.
        "train_batch_size": config.micro_batch_size * runtime.micro_steps * runtime.world_size,
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
    node, ranks = settings["zero_optimization"].get("zero_hpz_partition_size", 1), runtime.world_size
    if ranks % max(1, min(node, ranks)):
        raise ConfigError(
            f"{name} sets zero_optimization.zero_hpz_partition_size={node} on {ranks} ranks: expected a "
            "multiple of it; write the number of GPUs of a node into a copy"
        )
    return settings


def zero_level(config: JobConfig, path: str | None = None) -> int:
    """ZeRO level that the DeepSpeed file asks for."""
    return int(read_deepspeed_file(path or config.deepspeed).get("zero_optimization", {}).get("stage", 0))


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
        with _one_group_of_a_node():
            yield
    finally:
        unset_hf_deepspeed_config()
        del active


@contextlib.contextmanager
def _one_group_of_a_node() -> Iterator[None]:
    """Let several models be built sharded where `zero_hpz_partition_size` asks for a second partition.

    For each of them transformers opens a `zero.Init`, and each of these in DeepSpeed 0.19.8 wants to make the
    group of ranks of a node: the second one fails, since the group is there.
    """
    from deepspeed.utils import groups

    make = groups._create_zero_param_parallel_group

    def make_once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            make(size)

    groups._create_zero_param_parallel_group = make_once
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = make


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
    engine.marks = GradientMarks(model, runtime.micro_steps, runtime.device)
    engine.flags, engine.clock = runtime.flags, runtime.clock
    engine.register_forward_pre_hook(lambda *_: runtime.clock.begin("forward"))
    engine.register_forward_hook(lambda *_: runtime.clock.end(), always_call=True)
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


def count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, of sharded ones too."""
    parameters = [p for p in module.parameters() if p.requires_grad or not trainable_only]
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """Global norm of what the last optimizer step was made from, before clipping; None before the first.

    With Muon the updates stand in for the gradients of the matrices.
    """
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _find_auto(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _find_auto(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
