"""`torch.compile` for what a step spends its time in: layer by layer, each of them one graph.

Layers of one kind share their graphs, so that a deep model compiles as fast as a shallow one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from pretrain.config import ConfigError

EVERYTHING = "all"
# Of one function; layers of one kind share it. Numbers of positions and documents are compiled for as they
# come, then once for all; training, validation and what is frozen each have graphs of their own.
RECOMPILE_LIMIT = 32


def compile_parts(parts: Mapping[str, Sequence[nn.Module]], chosen: Sequence[str], **settings: Any) -> None:
    """Compile modules in place; names of parameters and checkpoints stay as they are.

    To be called before DeepSpeed wraps the model. A module with a `compile` of its own is asked for it; of
    others the forward pass is compiled, hooks left out, and ZeRO-3 gathers each of them as a whole.
    Gradient checkpointing becomes part of the graphs.

    Args:
        parts: name -> modules that are called often and alike, such as the layers of a model.
        chosen: names of parts, or "all".
        settings: of `torch.compile`.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = sorted(set(chosen) - {*parts, EVERYTHING})
    if unknown:
        raise ConfigError(
            f"compile={','.join(unknown)}: expected a list of {', '.join(parts)}, or [{EVERYTHING}]"
        )
    # What would break a graph is an error: a run that is quietly slower would not be noticed.
    settings = {"fullgraph": True, "recompile_limit": RECOMPILE_LIMIT, **settings}
    for name, modules in parts.items():
        for module in modules if {name, EVERYTHING} & set(chosen) else ():
            if type(module).compile is not nn.Module.compile:
                module.compile(**settings)
            else:
                set_z3_leaf_module(module, True)
                module.forward = torch.compile(module.forward, **settings)
