"""What a unified model reads of pictures: their codes, continuous features of a vision tower, or both.

Shapes: N pictures, S pixels a side, P positions, Q = 2 codebooks, D depths.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.images.decoding import DecodedImages, ImageDecoder, build_image_decoder
from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, expected_features
from data_pipeline.streams.views import image_parts
from dualtoken.processing import DualTokenProcessor
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.sequence import ImagePart
from dualtoken.unified_model.tiles import Size
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.visual_tokenizer.backbone import load_backbone
from dualtoken.visual_tokenizer.loading import VisualTokenizer
from eval.inputs import READ_BATCH, default_device


class Sight:
    """Turns pictures into what a unified model reads of them.

    Args:
        config: of the model.
        text_tokenizer: its text tokenizer.
        visual_tokenizer: the one whose codes it speaks.
        vision_tower: of a model whose features are made outside of it; not needed where shards hold them.
    """

    def __init__(
        self,
        config: DualTokenConfig,
        text_tokenizer: Any,
        visual_tokenizer: VisualTokenizer,
        vision_tower: VisionTower | None = None,
    ) -> None:
        self.visual_tokenizer, self.vision_tower = visual_tokenizer, vision_tower
        self.features = expected_features(config)  # what is taken of a picture for them; None for nothing
        self._processor = DualTokenProcessor.for_config(config, text_tokenizer)

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures."""
        return self._processor.image_size

    def decoder(self, num_threads: int = 1) -> ImageDecoder:
        """What decodes picture files for `look`: on the CPU, so the same pixels on every machine."""
        tiles = None if self.features is None else self.features.tiles
        return build_image_decoder(self.image_size, num_threads=num_threads, tiles=tiles)

    def look(self, pictures: DecodedImages) -> list[ImagePart]:
        """What is read of pictures that `decoder` decoded.

        Raises:
            ValueError: a vision tower is missing.
        """
        cut = list(zip(pictures.tiles, pictures.sizes, strict=True)) or None
        return self._look(pictures.images, cut)

    def _look(self, images: Tensor, cut: list[tuple[Tensor, Size]] | None = None) -> list[ImagePart]:
        """What is read of pictures [N, 3, S, S] in [-1, 1]; `cut` as of `DualTokenProcessor.image_parts`."""
        models, found = self._models(), []
        for start in range(0, len(images), READ_BATCH):
            batch = slice(start, start + READ_BATCH)
            own = None if cut is None else cut[batch]
            found += self._processor.image_parts(list(images[batch]), **models, cut=own)
        return found

    def drawn(self, codes: Tensor) -> ImagePart:
        """A picture that was drawn, as codes [P, Q, D], as the model reads it once it goes on after it."""
        part = ImagePart(codes, loss=True)
        if self.features is not None:
            image = self.visual_tokenizer.decode(codes[None].to(self.visual_tokenizer.device))
            (seen,) = self._look(image.float().clamp(-1, 1).cpu())
            part.features, part.size = seen.features, seen.size
        return part

    def _models(self) -> dict[str, Any]:
        """What the processor needs to see a picture."""
        features = self.features
        if features is not None and features.kind != "pixels" and self.vision_tower is None:
            raise ValueError(
                "the model was trained on continuous features that a vision tower outside of it made "
                f"(fingerprint {features.fingerprint[:16]}): name its SigLIP, --vision-tower FOLDER"
            )
        tokenizer = self.visual_tokenizer if self._processor.reads_codes else None
        return {"visual_tokenizer": tokenizer, "vision_tower": self.vision_tower}

    def look_at_samples(
        self, folder: Path, samples: Sequence[CodeSample], pictures: Callable[[], Tensor]
    ) -> list[ImagePart]:
        """What is read of the one picture of each sample of a dual-code data set.

        Codes are those of the shards, and so are features where the shards hold such as the model reads. They
        have to hold tiles: `pictures` have one size.

        Args:
            folder: the data set.
            samples: some of it.
            pictures: gives their pictures [N, 3, S, S] in [-1, 1]; asked where features have to be made.

        Raises:
            ValueError: a vision tower is missing, or tiles are.
        """
        parts = [image_parts(sample)[0] for sample in samples]
        kept = DatasetManifest.load(folder).features
        if self.features is None or (kept is not None and kept.serves(self.features)):
            return parts
        if self.features.tiles is not None:
            raise ValueError(
                f"the model reads pictures in tiles, and {folder} holds none of those; pretokenize it with "
                "the --features and --tiles of the training"
            )
        seen = self._look(pictures())
        return [replace(part, features=one.features) for part, one in zip(parts, seen, strict=True)]


def load_sight(
    config: DualTokenConfig,
    text_tokenizer: Any,
    visual_tokenizer: VisualTokenizer,
    vision_tower: str | Path | None = None,
) -> Sight:
    """Build the `Sight` of a loaded model; on the GPU if there is one.

    Args:
        config: of the model.
        text_tokenizer: its text tokenizer.
        visual_tokenizer: the one whose codes it speaks.
        vision_tower: folder or hub name of the SigLIP whose features a model reads that has no tower inside.

    Raises:
        FileNotFoundError: there is no such SigLIP.
        ValueError: no layer of it makes the features that the model was trained with, or the model reads none
            from outside.
    """
    tower = None
    if vision_tower is not None:
        require_outside(config, vision_tower)
        tower = matching_tower(config, vision_tower).to(default_device())
    return Sight(config, text_tokenizer, visual_tokenizer, tower)


def require_outside(config: DualTokenConfig, vision_tower: str | Path) -> None:
    """Raise ValueError unless a model reads continuous features that are made outside of it."""
    if not config.reads_features:
        raise ValueError(f"the model reads codes alone: leave the vision tower {vision_tower} out")
    if config.vision_config is not None:
        raise ValueError(
            f"the model has its vision tower inside, as it was trained: leave {vision_tower} out"
        )


def matching_tower(config: DualTokenConfig, vision_tower: str | Path) -> VisionTower:
    """Load a SigLIP up to the layer after which the model's features were taken, as its fingerprint says.

    Raises:
        FileNotFoundError: there is no such SigLIP.
        ValueError: features of none of its layers are those that the model was trained with.
    """
    whole = load_backbone(vision_tower).vision_model
    layers = whole.config.num_hidden_layers
    last_but_one_first = sorted(range(1, layers + 1), key=lambda layer: layer != layers - 1)
    for layer in last_but_one_first:
        tower = VisionTower.of_model(whole, layer).requires_grad_(False)
        if tower.fingerprint() == config.feature_fingerprint:
            return tower
    raise ValueError(
        f"{vision_tower} makes other features, after whichever of its {layers} layers, than the model was "
        f"trained with: those of a vision tower with the fingerprint {config.feature_fingerprint[:16]}, of "
        f"{config.features_per_image} positions and width {config.feature_dim}; name the SigLIP that "
        "pretokenize was given"
    )
