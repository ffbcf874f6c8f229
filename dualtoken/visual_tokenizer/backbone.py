"""SigLIP and SigLIP2 towers with numbered layers, and the frozen teacher.

Layer n means the hidden states *after* n transformer layers, so layer 0 is the patch embedding (arXiv
2503.14324, 3.2).
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipTextModel, SiglipVisionModel

from dualtoken.strict_loading import load_strictly

_ONE_AT_A_TIME = threading.RLock()


class Backbone(nn.Module):
    """The vision tower and, where zero-shot text matching is wanted, the text tower with its scale and bias.

    Args:
        vision_config: of the vision tower; it must have the attention-pooling head.
        text_config: of the text tower, or None to go without.
    """

    def __init__(
        self, vision_config: SiglipVisionConfig, text_config: SiglipTextConfig | None = None
    ) -> None:
        super().__init__()
        self.vision_model = SiglipVisionModel._from_config(vision_config)
        if text_config is not None:
            self.text_model = SiglipTextModel._from_config(text_config)
            self.logit_scale = nn.Parameter(torch.zeros(1))
            self.logit_bias = nn.Parameter(torch.zeros(1))

    @property
    def has_text_tower(self) -> bool:
        """Whether text can be encoded."""
        return hasattr(self, "text_model")


def hidden_states_after(
    vision_model: SiglipVisionModel, images: Tensor, layers: Collection[int]
) -> dict[int, Tensor]:
    """Return the hidden states ``[B, P, C]`` after each of ``layers``; layers beyond the last do not run.

    Args:
        vision_model: the tower.
        images: ``[B, 3, H, W]`` in [-1, 1].
        layers: numbers from 0 (patch embedding) to the number of layers.

    Raises:
        ValueError: if the images do not have the tower's size, or are integers.
    """
    require_images(images, vision_model.config.image_size)  # type: ignore[arg-type]
    with full_precision_convolutions():
        hidden = vision_model.embeddings(images)
    found = {0: hidden} if 0 in layers else {}
    for number, layer in enumerate(vision_model.encoder.layers[: max(layers)], start=1):
        hidden = layer(hidden, None)
        if number in layers:
            found[number] = hidden
    return found


def require_images(images: Tensor, size: int) -> None:
    """Raise ValueError unless images are ``[B, 3, size, size]`` and floats.

    Integers, as of 0 to 255, would be read as if in [-1, 1].
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise ValueError(
            f"images have shape {tuple(images.shape)}, expected [B, 3, {size}, {size}]; "
            f"resize to {size} pixels and scale to [-1, 1]"
        )
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, expected floats in [-1, 1]: images / 127.5 - 1")


def patches_alone(vision_model: SiglipVisionModel, images: Tensor) -> Tensor:
    """Return the embedded patches ``[B, P, C]`` of ``images [B, 3, H, W]``, without their positions."""
    embed = vision_model.embeddings.patch_embedding
    with full_precision_convolutions():
        return embed(images.to(embed.weight.dtype)).flatten(2).transpose(1, 2)


@contextmanager
def full_precision_convolutions() -> Iterator[None]:
    """Switch TF32 off, which torch has on for convolutions of fp32 on GPUs: codes depend on them.

    It is switched for all threads, so they take turns: one would switch it on again while another encodes.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    with _ONE_AT_A_TIME:
        previous, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
        try:
            yield
        finally:
            convolutions.fp32_precision = previous


def pool(vision_model: SiglipVisionModel, hidden: Tensor, layer: int) -> Tensor:
    """Run the layers behind ``layer``, the norm and the pooling head: ``[B, P, C]`` to ``[B, C]``."""
    for block in vision_model.encoder.layers[layer:]:
        hidden = block(hidden, None)
    return vision_model.head(vision_model.post_layernorm(hidden))


def model_folder(name: str | Path) -> Path:
    """The folder of a SigLIP model: the one at this path, or the hub's model of this name, downloaded once.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the hub or no way to reach it.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    expected = (
        "expected a folder with config.json and model.safetensors, as written by "
        "SiglipModel.save_pretrained, or a name on the model hub such as google/siglip-so400m-patch14-384"
    )
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise FileNotFoundError(f"no SigLIP backbone at {path}: {expected}")
    try:
        files = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(str(name), allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"no SigLIP backbone at {path}, nor on the model hub ({reason}): {expected}"
        ) from error


def load_backbone(path: str | Path) -> SiglipModel:
    """Load a SigLIP or fixed-resolution SigLIP2 model strictly, in fp32.

    Args:
        path: a folder, or a name on the model hub (see :func:`model_folder`).

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is another kind of model, or weights are missing, superfluous or of another shape.
    """
    path = model_folder(path)
    config = SiglipConfig.get_config_dict(path)[0]
    if config.get("model_type") != "siglip":
        raise ValueError(
            f"{path} holds a {config.get('model_type')!r} model, expected 'siglip' "
            "(SigLIP, or SigLIP2 at a fixed resolution; the NaFlex variants of SigLIP2 are not supported)"
        )
    model, _ = load_strictly(SiglipModel.from_pretrained, path, dtype=torch.float32)
    return model


@dataclass
class TeacherOutput:
    """Targets of the semantic distillation."""

    semantic_features: Tensor  # [B, P, C] after the semantic layer
    pooled: Tensor  # [B, C]


class FrozenTeacher(nn.Module):
    """The initial vision tower, kept in eval mode and out of autograd for good.

    Args:
        vision_model: the tower; it is copied, so later training does not move the teacher.
        semantic_layer: the layer whose features are distilled.
    """

    def __init__(self, vision_model: SiglipVisionModel, semantic_layer: int) -> None:
        super().__init__()
        self.vision_model = copy.deepcopy(vision_model)
        self.semantic_layer = semantic_layer
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def from_pretrained(cls, path: str | Path, semantic_layer: int) -> FrozenTeacher:
        """Load the teacher from a SigLIP folder (see :func:`load_backbone`)."""
        return cls(load_backbone(path).vision_model, semantic_layer)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode whatever ``mode`` says."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """Return the targets for ``images [B, 3, H, W]`` in [-1, 1]."""
        layer = self.semantic_layer
        hidden = hidden_states_after(self.vision_model, images, {layer})[layer]
        return TeacherOutput(hidden, pool(self.vision_model, hidden, layer))
