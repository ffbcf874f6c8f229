"""Strict loading of weights, and the weights of the released DualToken checkpoints, both ways.

A released tokenizer is a ``config.json`` (`released_config`), the config of its SigLIP backbone in the folder
that it names, and ``epoch_N.pt`` with the weights under ``state_dict``. One table below holds all renames.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken.plain_tensors import read_tensors
from dualtoken.visual_tokenizer.config import DualTokenVisualTokenizerConfig
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.released_config import config_from_released, config_to_released

# Released module name -> ours. Older files spell `pixel` / `semantic` in full; what is behind the name is
# the same.
_MODULES = {
    "siglip_model": "backbone",
    "prequant_sem": "prequant_semantic",
    "prequant_pix": "prequant_pixel",
    "prequant_shortcut": "prequant_shortcut",
    "postquant_sem": "postquant_semantic",
    "postquant_pix": "postquant_pixel",
    "quantizer_sem": "quantizer_semantic",
    "quantizer_pix": "quantizer_pixel",
    "post_quant_conv": "post_quant_conv",
    "decoder": "decoder",
}
_OLDER_SPELLINGS = {"semantic": "sem", "pixel": "pix"}
_CODEBOOK = re.compile(r"(quantizer_\w+)\.codebooks\.(\d+)\.(weight|cluster_size_ema|embed_ema)")
_CODEBOOK_BUFFERS = {"weight": "codebook", "cluster_size_ema": "cluster_size", "embed_ema": "embed_sum"}


class WeightsError(ValueError):
    """Weights that do not fit the model, with every key that is missing, unexpected or misshapen."""

    def __init__(self, source: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        lines = [f"the weights in {source} do not fit the model; nothing was loaded"]
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
            if keys:
                lines.append(f"{len(keys)} {kind}: {', '.join(keys)}")
        super().__init__("\n  ".join(lines))


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str = "the state dict") -> None:
    """Copy ``state`` into ``module`` if it fits exactly, else change nothing.

    Raises:
        WeightsError: naming every missing, unexpected and misshapen key.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [
        f"{name} {tuple(state[name].shape)} (expected {tuple(own[name].shape)})"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or misshapen:
        raise WeightsError(source, missing, unexpected, misshapen)
    module.load_state_dict(state, strict=True)


def names_from_released(keys: Iterable[str]) -> dict[str, str | None]:
    """Return the name here of every key of a released checkpoint; None for what has no place here.

    The depths of a codebook become one tensor, so they share a name.
    """
    return {key: _place(key)[0] for key in keys}


def state_from_released(state: dict[str, Tensor], shared_codebook: bool) -> dict[str, Tensor]:
    """Rename the weights of a released checkpoint; names that have no place here stay, to be reported.

    Raises:
        ValueError: if depths of a codebook are missing, or a codebook said to be shared differs between
            depths.
    """
    result: dict[str, Tensor] = {}
    depths: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        name, depth = _place(key)
        if depth is not None:
            tensor = tensor[:-1] if key.endswith(".weight") else tensor  # the last row is padding
            depths.setdefault(str(name), {})[depth] = tensor
        elif name is not None:
            result[name] = tensor
    for name, found in depths.items():
        result[name] = _stack_depths(name, found, shared_codebook)
        result[name.rpartition(".")[0] + ".num_updates"] = torch.zeros((), dtype=torch.int64)
    return result


def _place(key: str) -> tuple[str | None, int | None]:
    """Name of a released key here, None if it has none; and of a codebook's tensor the depth."""
    head, _, rest = key.removeprefix("module.").partition(".")
    stem, _, branch = head.rpartition("_")
    if branch in _OLDER_SPELLINGS:
        head = f"{stem}_{_OLDER_SPELLINGS[branch]}"
    name = f"{_MODULES.get(head, head)}.{rest}"
    if match := _CODEBOOK.fullmatch(name):
        quantizer, depth, kind = match.groups()
        return f"{quantizer}.{_CODEBOOK_BUFFERS[kind]}", int(depth)
    # A constant that older transformers saved.
    return (None if name.endswith(".embeddings.position_ids") else name), None


def _stack_depths(name: str, found: dict[int, Tensor], shared: bool) -> Tensor:
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"{name}: the checkpoint has depths {sorted(found)}, expected 0 to {len(found) - 1}")
    if not shared:
        return torch.stack([found[depth] for depth in range(len(found))])
    if not all(torch.equal(found[0], other) for other in found.values()):
        raise ValueError(f"{name}: the config says shared_codebook, but the depths of the checkpoint differ")
    return found[0].unsqueeze(0)


def state_to_released(state: dict[str, Tensor], num_quantizers: int) -> dict[str, Tensor]:
    """Undo :func:`state_from_released`; all depths of a shared codebook are one tensor."""
    ours = {new: old for old, new in _MODULES.items()}
    kinds = {new: old for old, new in _CODEBOOK_BUFFERS.items()}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if not head.startswith("quantizer_"):
            result[f"{ours[head]}.{rest}"] = tensor
        elif rest in kinds:
            books = [F.pad(b, (0, 0, 0, 1)) if rest == "codebook" else b for b in tensor]
            for depth in range(num_quantizers):
                result[f"{ours[head]}.codebooks.{depth}.{kinds[rest]}"] = books[depth % len(books)]
    return result


def read_released_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """Read the `state_dict` of a released checkpoint, under its own names.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it cannot be read safely, or holds no state dict of tensors.
    """
    content = read_tensors(checkpoint)
    state = content.get("state_dict")
    if not isinstance(state, dict):
        found = ", ".join(map(str, content)) or "nothing"
        raise ValueError(f"{checkpoint} has no 'state_dict'; found {found}")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{checkpoint}: {', '.join(others)} in its 'state_dict' are no tensors")
    return state


def load_released(
    config: str | Path,
    checkpoint: str | Path,
    backbone_config: str | Path | None = None,
    full_attention: bool = False,
) -> DualTokenVisualTokenizer:
    """Build a tokenizer from a released ``config.json`` and ``epoch_N.pt``; arguments as of the two readers.

    Raises:
        FileNotFoundError: if a file is missing.
        WeightsError: if any key is missing, unexpected or misshapen.
        ValueError: if a file cannot be read safely or asks for another kind of model.
    """
    translated = config_from_released(config, backbone_config, full_attention)
    return build_released(translated, read_released_weights(checkpoint), str(checkpoint))


def build_released(
    config: DualTokenVisualTokenizerConfig, released: dict[str, Tensor], source: str
) -> DualTokenVisualTokenizer:
    """Build a tokenizer from a translated config and the weights of a released checkpoint called ``source``.

    Raises:
        WeightsError: if any key is missing, unexpected or misshapen.
        ValueError: as of :func:`state_from_released`.
    """
    model = DualTokenVisualTokenizer(config)
    load_strict(model, state_from_released(released, config.shared_codebook), source)
    return model.eval()


def save_released(model: DualTokenVisualTokenizer, folder: str | Path) -> None:
    """Write ``config.json``, ``siglip/config.json`` and ``epoch_0.pt``, in the released layout.

    Raises:
        ValueError: if the model has something that the released layout cannot express.
    """
    folder = Path(folder)
    released = config_to_released(model.config)
    (folder / "siglip").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released, indent=1), encoding="utf-8")
    model.config.backbone_config().save_pretrained(folder / "siglip")
    state = state_to_released(model.state_dict(), model.config.num_quantizers)
    torch.save({"epoch": 0, "name": "dualtoken", "state_dict": state}, folder / "epoch_0.pt")
