"""Parameter groups of AdamW and the learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from torch import nn

from pretrain.config import ConfigError, OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay, and without it (one dimension: norms, biases).

    Raises:
        ConfigError: nothing is trainable.
    """
    # Under ZeRO-3 construction a parameter is an empty placeholder; its true shape is in ds_shape.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: every part of it is frozen")
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def freeze_parameters(model: nn.Module, patterns: list[str]) -> None:
    """Freeze every parameter whose name matches one of the patterns (`*` matches anything).

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"frozen: {pattern!r} matches no parameter; names look like {names[0]!r}")
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; fused, because ZeRO hands it one flat tensor per group."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) uses."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    span = max(1, total_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class LearningRateSchedule:
    """Sets the learning rate of every step; what DeepSpeed calls an lr_scheduler.

    Only the step is saved: rates, betas and decay come from the recipe, so that a recipe changed before a
    resume takes effect. `apply` has to be called after a checkpoint has been loaded, because the optimizer's
    own state brings the old values back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> None:
        self.optimizer = optimizer
        self.config = config
        self.total_steps = total_steps
        self.steps_taken = 0
        self.weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        self.apply()

    def apply(self) -> None:
        """Write this step's learning rate and the recipe's settings into the optimizer."""
        factor = learning_rate_factor(self.steps_taken, self.config, self.total_steps)
        for group, weight_decay in zip(self.optimizer.param_groups, self.weight_decays, strict=True):
            group["lr"] = self.config.lr * factor
            group["betas"] = tuple(self.config.betas)
            group["eps"] = self.config.eps
            group["weight_decay"] = weight_decay

    def step(self) -> None:
        """Go on by one optimizer step; DeepSpeed does not call it for a step that it skipped."""
        self.steps_taken += 1
        self.apply()

    def get_lr(self) -> list[float]:
        """Learning rate of each group for the next step."""
        return [group["lr"] for group in self.optimizer.param_groups]

    get_last_lr = get_lr

    def state_dict(self) -> dict[str, int]:
        """The step."""
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over the step."""
        self.steps_taken = state["steps_taken"]
        self.apply()
