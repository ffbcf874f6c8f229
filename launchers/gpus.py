"""GPUs that a plan can be made for, by name."""

from __future__ import annotations

from launchers.errors import UserError
from pretrain.gpus import GPUS, Gpu


def gpu_named(name: str) -> Gpu:
    """Figures of a GPU.

    Raises:
        UserError: there are none of that name.
    """
    if name not in GPUS:
        raise UserError(f"--gpu {name}: no figures of it; expected one of {', '.join(GPUS)}")
    return GPUS[name]
