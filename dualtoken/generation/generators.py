"""Generating text and images, with caches for the decoder and for the depth heads.

An image is written in one piece: after ``<|image_gen_start|>`` come exactly P positions of 2 x D codes,
chosen by the visual heads alone, so no text can get inside and it cannot end early. With guidance every
logit becomes ``unconditional + scale * (conditional - unconditional)`` at every depth; the unconditional
rows read an empty prompt, as prompt dropout has shown it to the model in training, and run in the same
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from dualtoken.generation.decoding import Seed, append, text_steps, write_images
from dualtoken.generation.sampling import Sampling
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import (
    IMAGE_TAG,
    Document,
    ImagePart,
    TextPart,
    TokenizedDocument,
    image_features,
    require_image_codes,
    tokenize_document,
)

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
    start = [model.config.special.image_gen_start]
    room = 1 + model.config.positions_per_image
    opened = [append(document, start) for document in open_documents(prompts, text_tokenizer, model, room)]
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
    stop: str = "",
    batch_size: int | None = None,
) -> list[str]:
    """Continue each prompt by text, up to the end-of-text token, `stop` or `max_new_tokens`.

    Other arguments as of `generate_images`. `stop` is the mark that ends an answer, such as a chat
    template's; it is not part of the result. With `batch_size` so many prompts at most are under way at a
    time, the next one taking the place of one that has ended. Returns the new text alone; image tokens are
    never chosen.
    """
    end = _stop_tokens(stop, text_tokenizer)
    documents = open_documents(prompts, text_tokenizer, model)
    tokens: list[list[int]] = [[] for _ in documents]
    sampling = Sampling(temperature, top_k, top_p)
    for step in text_steps(
        model, text_tokenizer, documents, max_new_tokens, sampling, seed, stop=end, batch_size=batch_size
    ):
        for document, token in step.items():
            tokens[document].append(token)
    marked = [bool(end) and written[-len(end) :] == end for written in tokens]
    return [
        _decode(text_tokenizer, written[: -len(end)] if cut else written)
        for written, cut in zip(tokens, marked, strict=True)
    ]


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
    rows = [open_document(prompt, text_tokenizer, model)]
    steps = text_steps(model, text_tokenizer, rows, max_new_tokens, Sampling(temperature, top_k, top_p), seed)
    yield from _pieces(text_tokenizer, (step[0] for step in steps))


@torch.no_grad()
def stream(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    document: Prompt,
    max_new_tokens: int = 256,
    max_images: int = 1,
    guidance_scale: float = 1.0,
    text_sampling: Sampling | None = None,
    image_sampling: Sampling | None = None,
    seed: int | None = None,
    stop: str = "",
    progress: Callable[[int, int], None] | None = None,
    see: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[str | ImagePart]:
    """Continue one document by text and images as the model sees fit; yields both as they come.

    Text comes piece by piece in whole characters, an image whole. It ends at the end-of-text token, at
    `stop`, or when `max_new_tokens` of text are written; after `max_images` images the model can only write
    text.

    Args:
        model: the unified model, with codebooks.
        text_tokenizer: the text tokenizer it was trained with.
        document: a text, or a document of text and images.
        max_new_tokens: of text, in all.
        max_images: images at most.
        guidance_scale: of the images; 1 for no guidance.
        text_sampling: how to choose tokens; the most likely ones by default.
        image_sampling: how to choose codes.
        seed: None for another result every time.
        stop: the mark that ends an answer, such as a chat template's; it is not part of the result.
        progress: called with (positions done, P) of the image under way.
        see: codes [P, Q, D] of an image that was drawn -> what stands for its continuous features
            (`ImagePart.features`); a model that reads them needs it to go on after an image. For one of
            tiles it cuts the image as one of S x S pixels.

    Raises:
        ValueError: `see` is missing, or as `open_document`.
    """
    special, layout = model.config.special, model.config.image_layout
    row = open_document(document, text_tokenizer, model)
    if model.config.reads_features and max_images and see is None:
        raise ValueError(
            "this model reads continuous features of an image before it goes on after it; pass see=..., "
            "which decodes codes and returns the features of the image, or max_images=0"
        )
    end = _stop_tokens(stop, text_tokenizer)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    budget, images, parts = max_new_tokens, 0, 0
    text_sampling, image_sampling = text_sampling or Sampling(0.0), image_sampling or Sampling()
    while budget > 0:
        tokens: list[int] = []
        may_draw = images < max_images
        steps = text_steps(model, text_tokenizer, [row], budget, text_sampling, seed + parts, may_draw)
        said = False
        with closing(steps):  # type: ignore[type-var]  # a generator: `stop` can break it off
            for piece in _pieces(text_tokenizer, _kept(steps, tokens, special.image_gen_start), end):
                said = True
                yield piece
        parts += said
        budget -= len(tokens)
        if not tokens or tokens[-1] != special.image_gen_start:
            return
        row = append(row, tokens)
        codes = write_images(model, [row], guidance_scale, image_sampling, seed + parts, progress)[0].cpu()
        drawn = ImagePart(codes, loss=True)
        row = append(row, [special.image_pad] * len(codes), codes)
        if see is not None and model.config.reads_features:
            drawn.features, drawn.size = see(codes), (model.config.image_size,) * 2
            features, order = image_features(drawn, layout)
            positions = layout.features if order is None else len(order)
            seen = [special.image_sep, *[special.image_feature] * positions]
            row = append(row, seen, features=features, feature_order=order)
        row = append(row, [special.image_gen_end])
        parts, images = parts + 1, images + 1
        yield drawn


def generate(
    model: DualTokenForCausalLM, text_tokenizer: Any, document: Prompt, **settings: Any
) -> list[TextPart | ImagePart]:
    """Continue one document by text and images as the model sees fit; returns the new parts.

    What `stream` yields, put together; arguments as of `stream`.
    """
    parts: list[TextPart | ImagePart] = []
    for piece in stream(model, text_tokenizer, document, **settings):
        if isinstance(piece, ImagePart):
            parts.append(piece)
        elif parts and isinstance(parts[-1], TextPart):
            parts[-1].text += piece
        else:
            parts.append(TextPart(piece))
    return parts


def open_documents(
    prompts: Sequence[Prompt], text_tokenizer: Any, model: DualTokenForCausalLM, room: int = 1
) -> list[TokenizedDocument]:
    """Lay out prompts to be continued by at least `room` tokens.

    Raises:
        ValueError: they are a single one, whose letters would be taken for prompts; or as `open_document`.
    """
    if isinstance(prompts, str | Document):
        raise ValueError(
            f"prompts is a single {type(prompts).__name__}; expected a list of prompts: put it into one"
        )
    return [open_document(prompt, text_tokenizer, model, room) for prompt in prompts]


def open_document(
    prompt: Prompt, text_tokenizer: Any, model: DualTokenForCausalLM, room: int = 1
) -> TokenizedDocument:
    """Lay out a prompt to be continued by at least `room` tokens.

    Raises:
        ValueError: a text has image tags, an image of a document has the shape of other codes or lacks the
            features that the model reads, or the prompt is too long for the decoder.
    """
    config = model.config
    if isinstance(prompt, str):
        if tags := prompt.count(IMAGE_TAG):
            raise ValueError(
                f"the text has {tags} {IMAGE_TAG} tags but 0 images; give one image for each tag, with "
                "DualTokenProcessor.documents(text, images)"
            )
        prompt = Document([TextPart(prompt, loss=False)])
    layout = config.image_layout
    for index, part in enumerate(part for part in prompt.parts if isinstance(part, ImagePart)):
        if part.codes is None and not (part.loss or layout.codes):
            continue
        require_image_codes(part.codes, config.code_shape, index)
    document = tokenize_document(prompt, text_tokenizer, config.special, end=False, layout=layout)
    most = model.decoder_config.max_position_embeddings
    if len(document) + room > most:
        raise ValueError(
            f"a prompt has {len(document)} tokens; expected at most {most - room}: the model takes {most}, "
            f"of which {room} for what follows"
        )
    return document


def _kept(steps: Iterable[dict[int, int]], tokens: list[int], image_start: int) -> Iterator[int]:
    """Yield the only row's tokens of text; `tokens` gets them all, an image-start token too."""
    for step in steps:
        tokens.append(step[0])
        if step[0] != image_start:
            yield step[0]


def _pieces(text_tokenizer: Any, tokens: Iterable[int], stop: Sequence[int] = ()) -> Iterator[str]:
    """Decode tokens as they come, in whole characters, up to the tokens `stop`."""
    kept: list[int] = []
    shown = ""
    stop = list(stop)
    for token in tokens:
        kept.append(token)
        # Tokens that may be the beginning of `stop` wait for the next one.
        held = next((n for n in range(min(len(stop), len(kept)), 0, -1) if kept[-n:] == stop[:n]), 0)
        sure = kept[: len(kept) - held]
        text = _decode(text_tokenizer, sure)
        ended = bool(stop) and held == len(stop)
        if len(text) > len(shown) and (ended or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            yield text[len(shown) :]
            shown = text
        if ended:
            return
    text = _decode(text_tokenizer, kept)
    if len(text) > len(shown):
        yield text[len(shown) :]


def _stop_tokens(stop: str, text_tokenizer: Any) -> list[int]:
    return text_tokenizer(stop, add_special_tokens=False)["input_ids"] if stop else []


def _decode(text_tokenizer: Any, tokens: list[int]) -> str:
    return text_tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
