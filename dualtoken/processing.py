"""Texts with image tags and their images -> inputs of the unified model, and codes -> pictures.

``<image>`` in a text marks the place of an image. Images become codes through a visual tokenizer; who has
codes already passes those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoProcessor, ProcessorMixin, SiglipImageProcessor
from transformers.feature_extraction_utils import BatchFeature

from dualtoken.pictures import as_rgb
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.sequence import (
    IMAGE_TAG,
    Document,
    ImageLayout,
    ImagePart,
    SpecialTokens,
    TextPart,
    pack_documents,
    require_image_codes,
    tokenize_document,
)
from dualtoken.unified_model.tiles import Size, Tiles, in_order
from dualtoken.unified_model.vision_tower import to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from dualtoken.unified_model.vision_tower import VisionTower
    from dualtoken.visual_tokenizer.loading import VisualTokenizer


class DualTokenProcessor(ProcessorMixin):
    """Prepares texts and images for `DualTokenForCausalLM` and the functions of `dualtoken.generation`.

    Args:
        image_processor: resizes and normalises pictures to [-1, 1].
        tokenizer: the text tokenizer, with the special tokens.
        positions_per_image: P.
        num_quantizers: D.
        reads_codes: whether the model reads codes of the images it is given.
        features_per_image: how many continuous features of an image, or of each of its crops, it reads.
        tiles: grids of tiles that it reads images in besides, as of `DualTokenConfig`.
        num_codebooks: Q.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        positions_per_image: int,
        num_quantizers: int,
        reads_codes: bool = True,
        features_per_image: int = 0,
        tiles: Sequence[Sequence[int]] = (),
        num_codebooks: int = 2,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.positions_per_image = positions_per_image
        self.num_quantizers = num_quantizers
        self.reads_codes = reads_codes
        self.features_per_image = features_per_image
        self.tiles = [list(grid) for grid in tiles]
        self.num_codebooks = num_codebooks
        self.special = SpecialTokens.from_tokenizer(tokenizer)

    @classmethod
    def for_config(cls, config: DualTokenConfig, text_tokenizer: Any) -> DualTokenProcessor:
        """Build the processor of a model."""
        image_processor = SiglipImageProcessor(
            size={"height": config.image_size, "width": config.image_size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        layout = config.image_layout
        positions, books, depth = config.code_shape
        shown = (layout.codes, layout.features, config.tiles or [])
        return cls(image_processor, text_tokenizer, positions, depth, *shown, books)

    @property
    def layout(self) -> ImageLayout:
        """What stands in the sequence for an image."""
        tiles = Tiles(self.tiles, self.image_size) if self.tiles else None
        return ImageLayout(self.reads_codes, self.features_per_image, tiles)

    @property
    def text_tokenizer(self) -> Any:
        """The text tokenizer."""
        return self.tokenizer

    @property
    def image_size(self) -> int:
        """Pixels a side of the visual tokenizer's images."""
        return self.image_processor.size["height"]

    def __call__(  # type: ignore[override]
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        codes: Sequence[Any] | None = None,
        visual_tokenizer: VisualTokenizer | None = None,
        vision_tower: VisionTower | None = None,
    ) -> BatchFeature:
        """Pack texts and their images into the keyword arguments of the model, without targets.

        Arguments as of `documents`.
        """
        if text is None:
            raise ValueError(f"text is missing; for an image alone pass text={IMAGE_TAG!r}")
        documents = self.documents(text, images, codes, visual_tokenizer, vision_tower)
        rows = [
            tokenize_document(d, self.tokenizer, self.special, end=False, layout=self.layout)
            for d in documents
        ]
        inputs = pack_documents(rows).model_inputs()
        return BatchFeature({name: inputs[name] for name in self.model_input_names if name in inputs})

    def documents(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        codes: Sequence[Any] | None = None,
        visual_tokenizer: VisualTokenizer | None = None,
        vision_tower: VisionTower | None = None,
        parts: Sequence[ImagePart] | None = None,
    ) -> list[Document]:
        """Put images in the places of the tags: one document per text, to prompt generation with.

        Args:
            text: one or several texts, with an ``<image>`` tag for each image.
            images: PIL images of any size and kind, or tensors [3, S, S] in [-1, 1]; all in the order of
                the tags, or one list per text; one alone needs no list.
            codes: instead of images, their codes [P, Q, D], likewise.
            visual_tokenizer: turns images into codes; not needed for a model that reads only features.
            vision_tower: makes continuous features of images, for a model that reads them and has no tower of
                its own.
            parts: instead of images, what `image_parts` made of them.

        Raises:
            ValueError: on images, codes or parts at once, numbers of images and tags that differ, tensors or
                codes of a wrong shape, or images without a visual tokenizer.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if images is not None and codes is not None:
            raise ValueError("got both images and codes; pass one of the two")
        if parts is not None and (images is not None or codes is not None):
            raise ValueError("got parts besides images or codes; pass one of them")
        tags = [t.count(IMAGE_TAG) for t in texts]
        shown = next((one for one in (images, codes, parts) if one is not None), None)
        given = _in_order_of_tags(shown, tags)
        if images is not None:
            given = self.image_parts(given, visual_tokenizer, vision_tower)
        elif codes is not None:
            given = [ImagePart(self._checked(c, i)) for i, c in enumerate(given)]
        coming = iter(given)
        documents = []
        for one in texts:
            document = Document([])
            for index, piece in enumerate(one.split(IMAGE_TAG)):
                if index:
                    document.parts.append(next(coming))
                if piece:
                    document.parts.append(TextPart(piece, loss=False))
            documents.append(document)
        return documents

    def pictures(self, codes: torch.Tensor, visual_tokenizer: VisualTokenizer) -> list[Image]:
        """Decode codes [N, P, Q, D] to PIL images."""
        from PIL import Image

        decoded = visual_tokenizer.decode(codes.to(visual_tokenizer.device)).float().clamp(-1, 1)
        pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the processor returns."""
        names = ["input_ids", "position_ids", "cu_seqlens", "max_seqlen", "codes", "visual_loss_mask"]
        if self.features_per_image:
            names.append("features")
        return [*names, "feature_order"] if self.tiles else names

    def image_parts(
        self,
        images: Sequence[Any],
        visual_tokenizer: VisualTokenizer | None = None,
        vision_tower: VisionTower | None = None,
        cut: Sequence[tuple[torch.Tensor, Size]] | None = None,
    ) -> list[ImagePart]:
        """Return images as parts of documents, with what the model reads of them.

        Args:
            images: as of `documents`, as the next two.
            visual_tokenizer: turns images into codes.
            vision_tower: makes continuous features of images.
            cut: tiles, as of `Tiles.cut`, and height and width of each image, where that was done when it was
                decoded; by default tiles are cut of `images`.

        Raises:
            ValueError: as `documents`.
        """
        if not images:
            return []
        if visual_tokenizer is None and self.reads_codes:
            raise ValueError(
                "images need visual_tokenizer=... to become codes; load it with "
                "load_visual_tokenizer, or pass codes instead of images"
            )
        pixels = torch.stack([self._pixels(image, index) for index, image in enumerate(images)])
        parts = [ImagePart(None) for _ in images]
        if visual_tokenizer is not None:
            codes = visual_tokenizer.encode(pixels.to(visual_tokenizer.device)).cpu()
            for part, own in zip(parts, codes, strict=True):
                part.codes = self._checked(own, 0)
        if self.features_per_image:
            self._see(parts, images if cut is None else cut, to_bytes(pixels), vision_tower)
        return parts

    @torch.no_grad()
    def _see(
        self,
        parts: list[ImagePart],
        images: Sequence[Any],
        wholes: torch.Tensor,
        vision_tower: VisionTower | None,
    ) -> None:
        """Give parts what stands for continuous features of images, which are `wholes` too, [I, 3, S, S].

        `images` are as they were given, or the tiles and the size of each.
        """
        tiles, crops = self.layout.tiles, [whole[None] for whole in wholes]
        for index, (part, image) in enumerate(zip(parts, images, strict=True)):
            if tiles is not None and isinstance(image, tuple):
                in_tiles, part.size = image
                crops[index] = torch.cat([crops[index], in_tiles])
            elif tiles is not None:
                is_tensor = isinstance(image, torch.Tensor)
                pixels = wholes[index].permute(1, 2, 0) if is_tensor else np.array(as_rgb(image))
                part.size = int(pixels.shape[0]), int(pixels.shape[1])
                crops[index] = torch.cat([crops[index], tiles.cut(pixels, _resized)])
        if vision_tower is not None:
            made = vision_tower(torch.cat(crops).to(next(vision_tower.parameters()).device)).cpu()
            crops = list(made.split([len(own) for own in crops]))
        for part, own in zip(parts, crops, strict=True):
            if tiles is None or part.size is None:
                part.features = own[0]
            elif vision_tower is None:
                part.features = own
            else:
                part.features = in_order(own, tiles.order(part.size, self.features_per_image))

    def _pixels(self, image: Any, index: int) -> torch.Tensor:
        size = self.image_size
        if isinstance(image, torch.Tensor):
            if tuple(image.shape) != (3, size, size):
                raise ValueError(
                    f"image {index} is a tensor of shape {tuple(image.shape)}, expected "
                    f"(3, {size}, {size}) in [-1, 1]; pass a PIL image to have it resized"
                )
            return image.float()
        if not hasattr(image, "convert"):
            raise ValueError(
                f"image {index} is a {type(image).__name__}, expected a PIL image or a tensor; "
                "open files with PIL.Image.open"
            )
        return self.image_processor(as_rgb(image), return_tensors="pt")["pixel_values"][0]

    def _checked(self, codes: Any, index: int) -> torch.Tensor:
        codes = torch.as_tensor(codes)
        expected = (self.positions_per_image, self.num_codebooks, self.num_quantizers)
        require_image_codes(codes, expected, index)
        return codes


def _in_order_of_tags(given: Sequence[Any] | None, tags: list[int]) -> list[Any]:
    """Flatten images or codes, given at once or per text, after checking that there is one for each tag."""
    is_one = hasattr(given, "convert") or getattr(given, "ndim", 0) == 3  # as transformers' processors do
    given = [] if given is None else [given] if is_one else list(given)
    if any(isinstance(one, list | tuple) for one in given):
        counts = [len(one) for one in given]
        if counts != tags:
            raise ValueError(
                f"the texts have {tags} {IMAGE_TAG} tags but {counts} images; give one image for each tag"
            )
        return [one for group in given for one in group]
    if len(given) != sum(tags):
        raise ValueError(
            f"the text has {sum(tags)} {IMAGE_TAG} tags but {len(given)} images; give one image for each tag"
        )
    return given


def _resized(pixels: Any, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [H, W, 3], an array or a tensor."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    return torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC)))


AutoProcessor.register(DualTokenConfig, DualTokenProcessor, exist_ok=True)
