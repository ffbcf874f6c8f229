"""The identity of a visual tokenizer: what its codes depend on, as one number.

Codes on disk carry it, and models that learn from them refuse codes of another tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dualtoken.digest import sha256_of
from dualtoken.visual_tokenizer.config import VISION_SIZES, DualTokenVisualTokenizerConfig

_SETTINGS = (
    "reconstruction_layer",
    "semantic_layer",
    "shortcut_layer",
    "shortcut_weight",
    "merged_codebook",
    "quantizer",
    "codebook_size",
    "codebook_dim",
    "num_quantizers",
    "latent_norm",
)
_VISION_SETTINGS = (*VISION_SIZES, "hidden_act", "layer_norm_eps")


def fingerprint_of_codes(config: DualTokenVisualTokenizerConfig, state: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) over the settings and weights between an image and its codes.

    Args:
        config: of the visual tokenizer.
        state: its state dict.
    """
    values = config.to_dict()
    settings = {name: values[name] for name in _SETTINGS}
    settings["vision"] = {name: values["vision_config"][name] for name in _VISION_SETTINGS}
    return sha256_of(
        settings, {name: tensor for name, tensor in state.items() if changes_codes(name, config)}
    )


def changes_codes(name: str, config: DualTokenVisualTokenizerConfig) -> bool:
    """Whether the weight of this name lies between an image and its codes."""
    prefix = "backbone.vision_model."
    if name.startswith(prefix + "encoder.layers."):
        deepest = max(config.reconstruction_layer, config.semantic_layer, config.shortcut_layer or 0)
        return int(name.split(".")[4]) < deepest
    return name.startswith((prefix + "embeddings.", "prequant_")) or name.endswith(".codebook")
