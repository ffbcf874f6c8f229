"""What a unified model writes: pictures of its codes, and the likeliest captions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_pipeline.languages import caption_prompt
from dualtoken.generation.generators import generate_text
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.visual_tokenizer.reconstruction import BATCH

CAPTION_TOKENS = 24


def decode_codes(tokenizer: DualTokenVisualTokenizer, codes: Tensor) -> Tensor:
    """Pictures [N, 3, S, S] of codes [N, P, Q, D], in batches."""
    return torch.cat(
        [tokenizer.decode(part.to(tokenizer.device)).float().cpu() for part in codes.split(BATCH)]
    )


def write_captions(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    images: Sequence[ImagePart],
    language: str,
    max_new_tokens: int = CAPTION_TOKENS,
) -> list[str]:
    """The likeliest caption, word by word, for each image."""
    question = TextPart(caption_prompt(language), loss=False)
    prefixes = [Document([image, question]) for image in images]
    written = generate_text(model, text_tokenizer, prefixes, max_new_tokens=max_new_tokens, temperature=0.0)
    return [text.strip() for text in written]
