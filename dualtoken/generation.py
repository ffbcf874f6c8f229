"""Generating text and images, with caches for the decoder and for the depth heads.

An image is written in one piece: after ``<|image_gen_start|>`` come exactly P positions of 2 x D codes,
chosen by the visual heads alone, so no text can get inside and it cannot end early. With guidance every
logit becomes ``unconditional + scale * (conditional - unconditional)`` at every depth; the unconditional
rows read an empty prompt, as prompt dropout has shown it to the model in training, and run in the same
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .decoding import Seed, append, text_steps, write_images
from .sampling import Sampling
from .sequence import Document, ImagePart, SpecialTokens, TextPart, TokenizedDocument, tokenize_document
from .unified_model import DualTokenForCausalLM

Prompt = str | Document


@torch.no_grad()
def generate_images(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    prompts: Sequence[Prompt],
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: Seed = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Generate an image for each prompt.

    Args:
        model: the unified model, with codebooks.
        text_tokenizer: the text tokenizer it was trained with.
        prompts: texts, or documents of text and images to go on from (editing).
        guidance_scale: 1 runs no unconditional rows at all.
        temperature: 0 for the most likely codes.
        top_k: candidates per code, 0 for all.
        top_p: cumulative probability of the candidates.
        seed: prompt i uses `seed` + i, or its own of a list; None for other images every time.
        progress: called with (positions done, P).

    Returns:
        codes [N, P, Q, D], for the visual tokenizer to decode.
    """
    special = model.config.special
    opened = [append(_open(prompt, text_tokenizer, special), [special.image_gen_start]) for prompt in prompts]
    return write_images(model, opened, guidance_scale, Sampling(temperature, top_k, top_p), seed, progress)


@torch.no_grad()
def generate_text(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: Seed = None,
) -> list[str]:
    """Continue each prompt by text, up to the end-of-text token or `max_new_tokens`.

    Arguments as of `generate_images`. Returns the new text alone; image tokens are never chosen.
    """
    special = model.config.special
    rows = [_open(prompt, text_tokenizer, special) for prompt in prompts]
    tokens: list[list[int]] = [[] for _ in rows]
    steps = text_steps(model, text_tokenizer, rows, max_new_tokens, Sampling(temperature, top_k, top_p), seed)
    for step in steps:
        for row, token in step.items():
            tokens[row].append(token)
    return [_decode(text_tokenizer, row) for row in tokens]


@torch.no_grad()
def stream_text(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield what `generate_text` would return for one prompt piece by piece, in whole characters."""
    tokens: list[int] = []
    shown = ""
    rows = [_open(prompt, text_tokenizer, model.config.special)]
    sampling = Sampling(temperature, top_k, top_p)
    for step in text_steps(model, text_tokenizer, rows, max_new_tokens, sampling, seed):
        tokens.extend(step.values())
        text = _decode(text_tokenizer, tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    text = _decode(text_tokenizer, tokens)
    if len(text) > len(shown):
        yield text[len(shown) :]


@torch.no_grad()
def generate(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    document: Prompt,
    max_new_tokens: int = 256,
    max_images: int = 1,
    guidance_scale: float = 1.0,
    text_sampling: Sampling | None = None,
    image_sampling: Sampling | None = None,
    seed: int | None = None,
) -> list[TextPart | ImagePart]:
    """Continue one document by text and images as the model sees fit; returns the new parts.

    It ends at the end-of-text token, or when `max_new_tokens` of text are written; after `max_images`
    images the model can only write text.
    """
    special = model.config.special
    row = _open(document, text_tokenizer, special)
    parts: list[TextPart | ImagePart] = []
    images, budget = 0, max_new_tokens
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    while budget > 0:
        tokens: list[int] = []
        for step in text_steps(
            model, text_tokenizer, [row], budget, text_sampling or Sampling(0.0), seed + len(parts),
            stop_at_image=images < max_images,
        ):  # fmt: skip
            tokens.append(step[0])
        budget -= len(tokens)
        wants_image = bool(tokens) and tokens[-1] == special.image_gen_start
        row = append(row, tokens)
        if text := _decode(text_tokenizer, tokens[:-1] if wants_image else tokens):
            parts.append(TextPart(text))
        if not wants_image:
            break
        sampling = image_sampling or Sampling()
        codes = write_images(model, [row], guidance_scale, sampling, seed + len(parts))[0].cpu()
        row = append(row, [special.image_pad] * len(codes) + [special.image_gen_end], codes)
        parts.append(ImagePart(codes, loss=True))
        images += 1
    return parts


def _open(prompt: Prompt, text_tokenizer: Any, special: SpecialTokens) -> TokenizedDocument:
    document = Document([TextPart(prompt, loss=False)]) if isinstance(prompt, str) else prompt
    return tokenize_document(document, text_tokenizer, special, end=False)


def _decode(text_tokenizer: Any, tokens: list[int]) -> str:
    return text_tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
