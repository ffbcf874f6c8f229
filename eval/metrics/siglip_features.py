"""Pooled features of a SigLIP as a feature extractor: a Fréchet distance that needs no download."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.images.decoding import normalise
from dualtoken.visual_tokenizer.backbone import hidden_states_after, load_backbone, model_folder, pool
from eval.model_files import fingerprint_of_files


class SiglipFeatures:
    """Features [B, C] behind the pooling head of a vision tower; see `FeatureExtractor`.

    A distance by them is never called FID: its figures compare among themselves only.
    """

    name = "Fréchet distance on SigLIP features"

    def __init__(self, vision_model: nn.Module, fingerprint: str, device: torch.device) -> None:
        self.vision_model = vision_model.eval().requires_grad_(False).to(device)
        self.dim = vision_model.config.hidden_size
        self.fingerprint, self.device = fingerprint, device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features of uint8 pictures [H, W, 3], resized to the tower's square as in training."""
        size, layers = self.vision_model.config.image_size, self.vision_model.config.num_hidden_layers
        squares = [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in pictures]
        images = torch.empty(len(squares), 3, size, size, device=self.device)
        normalise(torch.from_numpy(np.stack(squares)), images)
        hidden = hidden_states_after(self.vision_model, images, {layers})[layers]
        return pool(self.vision_model, hidden, layers).float().cpu()


def load_siglip_features(path: str | Path, device: str | torch.device = "cpu") -> SiglipFeatures:
    """Load a SigLIP folder, such as the one a quickstart exports, for its features.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another kind of model, or its weights do not fit.
    """
    folder = model_folder(path)
    return SiglipFeatures(
        load_backbone(folder).vision_model, fingerprint_of_files(folder), torch.device(device)
    )
