"""How well the unified model predicts codes and captions it is given, beside simpler predictors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_pipeline.languages import caption_prompt
from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, require_same_codes
from data_pipeline.streams.views import caption_document, generation_document
from dualtoken.generation.likelihood import document_nll
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart, tokenize_document
from eval.inputs import (
    EvaluationPaths,
    draw_prompts,
    load_codes,
    load_models,
    pictures_of,
    stack_codes,
)
from eval.results import write_json
from eval.seeing import load_sight

DOCUMENTS = {"held_out": 96, "seen": 32}  # at most
COUNTED_DOCUMENTS = 20_000  # training documents from which code frequencies are taken, at most


@dataclass
class Likelihood:
    """Sums of negative log-likelihoods (nats) over documents, with what they are to be divided by."""

    text_nll: float
    text_tokens: int
    visual_nll: Tensor  # [Q, D]
    visual_positions: int

    def per_token(self) -> float:
        """Nats a supervised text token."""
        return self.text_nll / self.text_tokens

    def per_code(self) -> Tensor:
        """Nats a code, [Q, D]."""
        return self.visual_nll / self.visual_positions


def score(
    model: DualTokenForCausalLM, text_tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> Likelihood:
    """Sum the likelihoods of everything the documents supervise."""
    special, layout = model.config.special, model.config.image_layout
    tokenized = [
        tokenize_document(document, text_tokenizer, special, layout=layout) for document in documents
    ]
    scored = document_nll(model, tokenized)
    return Likelihood(
        text_nll=sum(document.text_nll for document in scored),
        text_tokens=sum(document.text_count for document in scored),
        visual_nll=torch.stack([document.visual_nll.double() for document in scored]).sum(dim=0),
        visual_positions=sum(document.visual_count for document in scored),
    )


def unigram(training: Sequence[CodeSample], codes: Tensor, codebook_size: int) -> Tensor:
    """Nats a code [Q, D] when each is guessed by how often it occurs at its depth in training.

    Counts start at one, so that a code never seen is possible.

    Args:
        training: samples to count.
        codes: [N, P, Q, D] to predict.
        codebook_size: K.
    """
    seen = stack_codes(training)
    nll = torch.empty(codes.shape[2:], dtype=torch.float64)
    for q, d in torch.cartesian_prod(torch.arange(codes.shape[2]), torch.arange(codes.shape[3])).tolist():
        counts = torch.bincount(seen[..., q, d].flatten(), minlength=codebook_size).double() + 1
        nll[q, d] = -(counts / counts.sum()).log()[codes[..., q, d].flatten()].mean()
    return nll


def measure_codes(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[CodeSample],
    training: Sequence[CodeSample],
) -> list[dict]:
    """Likelihood of each codebook and depth, given the prompt, without it, and by frequency."""
    prompted = [
        generation_document(sample.codes[0], prompt["prompt"])
        for sample, prompt in zip(samples, draw_prompts(samples))
    ]
    bare = [generation_document(sample.codes[0], "") for sample in samples]
    with_prompt = score(model, text_tokenizer, prompted).per_code()
    without = score(model, text_tokenizer, bare).per_code()
    codes = stack_codes(samples)
    frequencies = unigram(training, codes, model.config.codebook_size)
    return [
        {
            "codebook": name,
            "depth": depth + 1,
            "nll": float(with_prompt[q, depth]),
            "without_prompt": float(without[q, depth]),
            "unigram": float(frequencies[q, depth]),
        }
        for q, name in enumerate(model.config.codebooks)
        for depth in range(with_prompt.shape[1])
    ]


def measure_captions(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[CodeSample],
    images: Sequence[ImagePart],
) -> dict[str, dict]:
    """Likelihood a token of the captions in each language: with the picture, without, with another one.

    `images` are what the model reads of the samples' pictures.
    """
    result = {}
    for language in dict.fromkeys(name for sample in samples for name in sample.captions or {}):
        chosen = [
            (image, sample.captions[language])
            for image, sample in zip(images, samples, strict=True)
            if language in (sample.captions or {})
        ]
        # Each picture's place is taken by the next one's: the captions and the pictures stay the same.
        others = [*chosen[1:], *chosen[:1]]
        variants = {
            "with_image": [caption_document(image, language, text) for image, text in chosen],
            "image_removed": [
                Document([TextPart(caption_prompt(language), loss=False), TextPart(f" {text}")])
                for _, text in chosen
            ],
            "other_image": [
                caption_document(other, language, text) for (other, _), (_, text) in zip(others, chosen)
            ],
        }
        found = {name: score(model, text_tokenizer, documents) for name, documents in variants.items()}
        result[language] = {
            "documents": len(chosen),
            "tokens": found["with_image"].text_tokens,
            **{name: likelihood.per_token() for name, likelihood in found.items()},
        }
    return result


def run(paths: EvaluationPaths, count: int | None = None, seed: int = 0) -> dict:
    """Measure likelihoods on held-out and on seen documents; write `likelihood.json`.

    Raises:
        FileNotFoundError: a model is missing.
        ValueError: the codes are not the model's, or a vision tower is missing.
    """
    model, text_tokenizer, tokenizer = load_models(paths.model, paths.visual_tokenizer)
    sight = load_sight(model.config, text_tokenizer, tokenizer, paths.vision_tower)
    training = load_codes(paths.seen_codes, COUNTED_DOCUMENTS, seed)
    size = model.config.codebook_size
    splits = {}
    for split, folder in paths.codes().items():
        fingerprint = DatasetManifest.load(folder).fingerprint
        require_same_codes(folder, fingerprint, model.config.tokenizer_fingerprint)
        samples = load_codes(folder, min(count or DOCUMENTS[split], DOCUMENTS[split]), seed)
        made_from = partial(pictures_of, samples, folder, paths.scenes()[split], sight.image_size)
        images = sight.look_at_samples(folder, samples, made_from)
        splits[split] = {
            "documents": len(samples),
            "visual": measure_codes(model, text_tokenizer, samples, training),
            "captions": measure_captions(model, text_tokenizer, samples, images),
        }
    result = {
        "codebook_size": size,
        "log_codebook_size": math.log(size),
        "training_images": DatasetManifest.load(paths.seen_codes).images,
        "splits": splits,
    }
    write_json(paths.output / "likelihood.json", result)
    return result
