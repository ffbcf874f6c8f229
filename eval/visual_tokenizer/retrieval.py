"""Zero-shot retrieval: pictures by names and names by pictures, quantized against continuous features."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dualtoken.visual_tokenizer.backbone import FrozenTeacher
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.inputs import (
    EvaluationPaths,
    Pictures,
    load_dual_tokenizer,
    load_pictures,
    require_export,
)
from eval.metrics.recall import recall_at_1
from eval.results import write_json

BATCH = 64
SEEN_PICTURES = 1000  # at most; the candidates decide how hard the task is, so both splits get as many


@torch.no_grad()
def image_features(encode: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """Pooled features [N, C] of pictures [N, 3, S, S], in batches."""
    return torch.cat([encode(batch.to(device)).float().cpu() for batch in images.split(BATCH)])


def text_tokens(text_tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor:
    """Ids [N, length] of texts, padded and cut to it, as SigLIP is trained (arXiv 2303.15343)."""
    return text_tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )["input_ids"]


@torch.no_grad()
def text_features(
    tokenizer: DualTokenVisualTokenizer, text_tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> Tensor:
    """Features [N, C] of texts, by the text tower in the visual tokenizer."""
    length = tokenizer.config.text_config.max_position_embeddings
    features = []
    for start in range(0, len(texts), BATCH):
        tokens = text_tokens(text_tokenizer, texts[start : start + BATCH], length)
        features.append(tokenizer.encode_text(tokens.to(tokenizer.device)).float().cpu())
    return torch.cat(features)


def both_directions(images: Tensor, texts: Tensor, captions: list[str]) -> dict:
    """Recall at 1 of pictures by text and of texts by picture; equal captions are equally right."""
    to_image = recall_at_1(texts, images, captions, captions)
    to_text = recall_at_1(images, texts, captions, captions)
    return {
        "text_to_image": to_image.recall,
        "image_to_text": to_text.recall,
        "chance": to_image.chance,
        "pictures": to_image.candidates,
    }


def compare(
    tokenizer: DualTokenVisualTokenizer,
    teacher: FrozenTeacher,
    text_tokenizer: PreTrainedTokenizerBase,
    pictures: Pictures,
) -> dict[str, dict]:
    """Retrieval by quantized and by continuous features, for each language of the captions."""
    quantized = image_features(tokenizer.encode_semantic, pictures.images, tokenizer.device)
    continuous = image_features(lambda batch: teacher(batch).pooled, pictures.images, tokenizer.device)
    result = {}
    languages = dict.fromkeys(language for captions in pictures.captions for language in captions)
    for language in languages:
        having = [index for index, captions in enumerate(pictures.captions) if language in captions]
        names = [pictures.captions[index][language] for index in having]
        texts = text_features(tokenizer, text_tokenizer, names)
        result[language] = {
            "quantized": both_directions(quantized[having], texts, names),
            "continuous": both_directions(continuous[having], texts, names),
        }
    return result


def run(paths: EvaluationPaths, count: int | None = None, seed: int = 0) -> dict:
    """Measure retrieval on held-out pictures and on as many seen ones; write `retrieval.json`.

    Raises:
        FileNotFoundError: a model is missing.
        ValueError: the visual tokenizer was exported without its text tower.
    """
    tokenizer = load_dual_tokenizer(paths.visual_tokenizer)
    if tokenizer.config.text_config is None:
        raise ValueError(
            f"{paths.visual_tokenizer} has no text tower (text_config is null), which retrieval by text needs"
        )
    require_export(paths.siglip, "SigLIP", "dualtoken train quickstart_siglip")
    teacher = FrozenTeacher.from_pretrained(paths.siglip, tokenizer.config.semantic_layer)
    teacher = teacher.to(tokenizer.device)
    text_tokenizer = AutoTokenizer.from_pretrained(paths.siglip)
    size = tokenizer.config.image_size
    held_out = load_pictures(paths.held_out_images, size, count, seed)
    seen = load_pictures(paths.seen_images, size, min(len(held_out), SEEN_PICTURES), seed)
    result = {
        "held_out": compare(tokenizer, teacher, text_tokenizer, held_out),
        "seen": compare(tokenizer, teacher, text_tokenizer, seen),
    }
    write_json(paths.output / "retrieval.json", result)
    return result
