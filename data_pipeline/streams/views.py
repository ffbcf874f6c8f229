"""Views: the document that is made of a sample, to caption it, to generate it, or as it stands."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data_pipeline.languages import caption_prompt
from data_pipeline.shards.code_shards import CodeSample
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart

CODE_VIEWS = ("caption", "generate", "document")
VIEWS = (*CODE_VIEWS, "text")


class LeftOut(Exception):
    """A sample that makes no document in this view; the message is the reason it is counted under."""


def caption_document(image: ImagePart, language: str, caption: str, key: str = "") -> Document:
    """Make the document that teaches to caption an image: the image, `English:`, the caption."""
    prompt = TextPart(caption_prompt(language), loss=False)
    return Document([replace(image, loss=False), prompt, TextPart(f" {caption}")], key)


def generation_document(codes: np.ndarray, prompt: str, key: str = "") -> Document:
    """Make the document that teaches to generate an image [P, Q, D]: the prompt, then the image.

    The empty prompt is the unconditional document of classifier-free guidance.
    """
    return Document([TextPart(prompt, loss=False), ImagePart(codes, loss=True)], key)


def _tensor(features: np.ndarray | None) -> torch.Tensor | None:
    """What a shard keeps for continuous features, as the model takes it."""
    if features is None:
        return None
    tensor = torch.from_numpy(features)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def image_parts(sample: CodeSample) -> list[ImagePart]:
    """Return what a shard keeps of a sample's images, as documents hold it."""
    return [
        ImagePart(codes, features=_tensor(sample.features_of(image)), size=sample.size_of(image))
        for image, codes in enumerate(sample.codes)
    ]


def parts_document(sample: CodeSample) -> Document:
    """Make the document of a sample's parts as they stand."""
    return document_of(sample.parts, image_parts(sample), sample.key)


def document_of(parts: Sequence[Mapping[str, Any]], images: Sequence[ImagePart], key: str = "") -> Document:
    """Make the document of parts, as `CodeSample` describes them, and of the images that they name."""
    made: list[TextPart | ImagePart] = []
    for part in parts:
        if "image" in part:
            made.append(replace(images[part["image"]], loss=part.get("loss", False)))
        else:
            made.append(TextPart(part["text"], part.get("loss", True), part.get("markup", False)))
    return Document(made, key)


def build_document(
    sample: CodeSample,
    view: str,
    draw: random.Random,
    languages: Sequence[str] = (),
    default_language: str = "en",
    prompt_dropout: float = 0.0,
) -> Document:
    """Make the document of a sample in one of `CODE_VIEWS`.

    Args:
        sample: The codes and their text.
        view: `caption`, `generate` or `document`.
        draw: Chooses the language and whether the prompt is dropped.
        languages: Captions are taken in one of these; empty for any.
        default_language: Language of the text of a pair without captions by language.
        prompt_dropout: Share of prompts replaced by the empty one (view `generate`).

    Raises:
        LeftOut: No caption in these languages.
        ValueError: The sample is not one image with a caption, as `caption` and `generate` need.
    """
    if view == "document":
        return parts_document(sample)
    if len(sample.codes) != 1:
        raise ValueError(f"{len(sample.codes)} images, the view {view} takes one; use the view document")
    captions = sample.captions
    if captions is None:
        texts = [part["text"] for part in sample.parts if "text" in part]
        captions = {default_language: texts[0]} if len(texts) == 1 else {}
    usable = sorted(language for language in captions if not languages or language in languages)
    if not usable:
        raise LeftOut("no caption" if not captions else "no caption in the languages asked for")
    language = draw.choice(usable)
    if view == "caption":
        return caption_document(image_parts(sample)[0], language, captions[language], sample.key)
    dropped = draw.random() < prompt_dropout
    return generation_document(sample.codes[0], "" if dropped else captions[language], sample.key)
