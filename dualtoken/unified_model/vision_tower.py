"""Continuous features of an image: the hidden states of a SigLIP tower, as LLaVA and UniToken read them.

They are those after one of the tower's layers, by default the last but one, without a norm behind it; the
layers beyond are not there. The same module makes them inside the unified model and when they are written
into shards.

Shapes: I images, S pixels a side, N features per image, C their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionModel

from dualtoken.digest import sha256_of

SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
"""Fields of `SiglipVisionConfig` that say what a tower computes."""

_HOMES = {
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "layers": "encoder.layers",
}


def name_in_siglip(name: str) -> str:
    """Return the name that a weight of a `VisionTower` has in a `SiglipVisionModel`."""
    first, _, rest = name.partition(".")
    return f"{_HOMES[first]}.{rest}"


def tower_settings(vision: SiglipVisionConfig, layer: int | None = None) -> dict[str, Any]:
    """Return the settings of the tower up to a layer, as `VisionTower` takes them.

    Args:
        vision: config of the whole tower.
        layer: after which the features are taken, from 1; None for the last but one.

    Raises:
        ValueError: the tower has no such layer.
    """
    layers = vision.num_hidden_layers
    layer = layers - 1 if layer is None else layer
    if not 0 < layer <= layers:
        raise ValueError(f"features after layer {layer}; expected 1 to {layers}, the layers of the tower")
    return {**{name: getattr(vision, name) for name in SETTINGS}, "num_hidden_layers": layer}


def features_per_image(settings: dict[str, Any]) -> int:
    """Return N of the tower with these settings."""
    return (settings["image_size"] // settings["patch_size"]) ** 2


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Return images in about [-1, 1] as uint8, as they were before they were brought there."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


class VisionTower(nn.Module):
    """The layers of a SigLIP tower whose hidden states are an image's continuous features.

    They are transformers' own, but not in its model: that would be saved under other names than it is loaded
    from, and has layers behind the last one that is read.

    Args:
        settings: from `tower_settings`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        config = SiglipVisionConfig(**settings)
        config._attn_implementation = "sdpa"
        width, patch = settings["hidden_size"], settings["patch_size"]
        self.patch_embedding = nn.Conv2d(settings["num_channels"], width, patch, stride=patch)
        self.position_embedding = nn.Embedding(features_per_image(settings), width)
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(settings["num_hidden_layers"]))

    @classmethod
    def of_model(cls, vision_model: SiglipVisionModel, layer: int | None = None) -> VisionTower:
        """Build the tower, in eval mode, from a whole one; `layer` as of `tower_settings`."""
        tower = cls(tower_settings(vision_model.config, layer))
        tower.set(vision_model)
        return tower.eval()

    def set(self, vision_model: SiglipVisionModel) -> None:
        """Take over the weights of a whole tower's layers.

        Raises:
            ValueError: it is a tower of other sizes, or has fewer layers.
        """
        vision = vision_model.config
        layer = self.settings["num_hidden_layers"]
        given = tower_settings(vision, min(layer, vision.num_hidden_layers))
        if given != self.settings:
            name = next(name for name in SETTINGS if given[name] != self.settings[name])
            raise ValueError(
                f"the vision tower has {name}={given[name]}, the config asks for {self.settings[name]}; "
                "build the config with the same tower"
            )
        weights = vision_model.state_dict()
        self.load_state_dict({name: weights[name_in_siglip(name)] for name in self.state_dict()})

    def fingerprint(self) -> str:
        """Return the sha256 (hex) over all that the features depend on."""
        return sha256_of(self.settings, self.state_dict())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features [I, N, C] of images [I, 3, S, S], uint8 or floats in [-1, 1].

        Raises:
            ValueError: the images have another size.
        """
        size = self.settings["image_size"]
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(pixels.shape)}, the vision tower expects [I, 3, {size}, {size}]"
            )
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(127.5).sub_(1)  # exactly what `to_bytes` was given
        patches = (
            self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        )
        places = torch.arange(patches.shape[1], device=patches.device)
        hidden = patches + self.position_embedding(places)
        for layer in self.layers:
            hidden = layer(hidden, None)
        return hidden
