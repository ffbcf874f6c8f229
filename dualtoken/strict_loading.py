"""Loading with transformers, but strictly: a model never keeps weights that its checkpoint did not have."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from transformers.utils import logging as transformers_logging


def load_strictly(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Call a `from_pretrained` and return the model with its report, which names no trouble.

    What transformers itself lets pass stays allowed: tied weights that are not in the file, and keys that the
    model's class ignores. Under ZeRO-3 it does not report superfluous weights, and misshapen ones are an
    error of its own on rank 0.

    Raises:
        ValueError: weights are missing, superfluous or of another shape than the config says, or in a file
            that would run code.
    """
    transformers_logging.disable_progress_bar()  # in the midst of a log
    # Misshapen weights are let through to be refused here, in one line with the others.
    settings = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = load(source, *args, **settings)
    except pickle.UnpicklingError as error:  # of a folder that has no safetensors
        raise ValueError(
            f"the weights in {source} are refused: a pickle with more than tensors, reading it would run "
            "code; where you trust it, load the model there and save it by save_pretrained"
        ) from error
    problems = [
        f"{len(found)} {kind.removesuffix('_keys')} ({', '.join(_first(found))})"
        for kind, found in report.items()
        if found
    ]
    if problems:
        raise ValueError(
            f"the weights in {source} do not fit their config: {'; '.join(problems)}; expected a whole "
            "checkpoint, as save_pretrained writes it: copy or export it again"
        )
    return model, report


def _first(found: Any, limit: int = 8) -> list[str]:
    names = sorted(
        one if isinstance(one, str) else f"{one[0]} {tuple(one[1])} there, {tuple(one[2])} here"
        for one in found
    )
    return names[:limit] + ["..."] * (len(names) > limit)
