"""States of loaders and random generators as JSON: reading one executes nothing, unlike a pickle."""

from __future__ import annotations

import base64
from typing import Any, cast

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.state import FlexState

_KIND = "!"  # the key that marks what JSON has no form of its own for


def to_plain(value: Any) -> Any:
    """Turn a state into what JSON can hold; `from_plain` gives back the same, types included.

    Raises:
        TypeError: a value of another type than states are made of.
    """
    if value is None or isinstance(value, bool | int | float | str):
        if type(value) in (type(None), bool, int, float, str):
            return value
    elif isinstance(value, bytes):
        return {_KIND: "bytes", "value": base64.b64encode(value).decode("ascii")}
    elif type(value) is list:
        return [to_plain(item) for item in value]
    elif type(value) is tuple:
        return {_KIND: "tuple", "value": [to_plain(item) for item in value]}
    elif type(value) in (dict, FlexState):
        kind = "dict" if type(value) is dict else "FlexState"
        if kind == "dict" and _KIND not in value and all(type(key) is str for key in value):
            return {key: to_plain(item) for key, item in value.items()}
        return {_KIND: kind, "value": [[to_plain(key), to_plain(item)] for key, item in value.items()]}
    elif type(value) is SliceState:
        return {_KIND: "SliceState", "value": [value.index, value.current]}
    elif isinstance(value, torch.Tensor):
        return {_KIND: "tensor", "value": to_plain(value.detach().cpu().numpy())}
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
        return {_KIND: "array", "type": value.dtype.str, "shape": list(value.shape), "value": content}
    raise TypeError(
        f"a state holds a {type(value).__module__}.{type(value).__qualname__}, which has no JSON form"
    )


def from_plain(plain: Any) -> Any:
    """Turn what `to_plain` returned back into the state.

    Raises:
        ValueError: it was not made by `to_plain`.
    """
    if isinstance(plain, list):
        return [from_plain(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if _KIND not in plain:
        return {key: from_plain(item) for key, item in plain.items()}
    kind, value = plain[_KIND], cast("Any", plain["value"])
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "tuple":
        return tuple(from_plain(item) for item in value)
    if kind in ("dict", "FlexState"):
        items = {from_plain(key): from_plain(item) for key, item in value}
        return items if kind == "dict" else FlexState(items)
    if kind == "tensor":
        return torch.from_numpy(from_plain(value))
    if kind == "array":
        content = np.frombuffer(bytearray(base64.b64decode(value)), dtype=np.dtype(plain["type"]))
        return content.reshape(plain["shape"])
    if kind == "SliceState":
        return SliceState(index=value[0], current=value[1])
    raise ValueError(f"a state holds something of the unknown kind {kind!r}")
