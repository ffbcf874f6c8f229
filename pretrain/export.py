"""What a job leaves behind: whole weights in fp32, whatever DeepSpeed trained them in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.runtime import Runtime


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


def save_config(model: PreTrainedModel, directory: Path) -> None:
    """Write what `save_pretrained` writes besides weights, and say fp32 in it.

    transformers writes the type of the live parameters into the config and, by default, loads in the type
    that the config names: a model trained in bf16 would be read back rounded to bf16.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    path = directory / "config.json"

    def in_fp32(section: dict[str, Any]) -> dict[str, Any]:
        settings = {key: in_fp32(part) if isinstance(part, dict) else part for key, part in section.items()}
        return settings | ({"dtype": "float32"} if "dtype" in settings else {})

    config = in_fp32(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(
        json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
