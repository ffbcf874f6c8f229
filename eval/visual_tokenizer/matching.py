"""Pictures and texts as vectors to compare: by the tokenizer's quantized features, and by SigLIP's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dualtoken.visual_tokenizer.backbone import load_backbone, model_folder
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.visual_tokenizer.retrieval import text_tokens

TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Matcher:
    """One way to make vectors [B, C] of pictures [B, 3, S, S] and of token ids [B, T]."""

    encode_images: Callable[[Tensor], Tensor]
    encode_texts: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matchers:
    """Ways to compare by name, quantized first, and the text tokenizer they share."""

    ways: dict[str, Matcher]
    text_tokenizer: PreTrainedTokenizerBase
    text_length: int
    device: torch.device

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Ids [B, T] of texts, on the device."""
        return text_tokens(self.text_tokenizer, texts, self.text_length).to(self.device)


def load_matchers(tokenizer: DualTokenVisualTokenizer, source: Path, siglip: Path | str | None) -> Matchers:
    """Quantized features of the tokenizer and, beside them, continuous ones of the SigLIP it was built on.

    Args:
        tokenizer: with its text tower.
        source: the tokenizer's folder.
        siglip: folder or name of the SigLIP, for the text tokenizer too; without it `source` has to hold one,
            and continuous features are left out.

    Raises:
        FileNotFoundError: there is no SigLIP.
        ValueError: the tokenizer has no text tower, or there is no text tokenizer.
    """
    if tokenizer.config.text_config is None:
        raise ValueError(
            f"{source} has no text tower (text_config is null), which comparing with texts needs"
        )
    if siglip is None and not (source / TOKENIZER_FILE).is_file():
        raise ValueError(f"{source} holds no text tokenizer; name the SigLIP it was built on (--siglip)")
    ways = {"quantized": Matcher(tokenizer.encode_semantic, tokenizer.encode_text)}
    words = source if siglip is None else model_folder(siglip)
    if siglip is not None:
        initial = load_backbone(words).eval().requires_grad_(False).to(tokenizer.device)
        expected, size = tokenizer.config.image_size, initial.config.vision_config.image_size
        if size != expected:
            raise ValueError(
                f"{siglip} takes pictures of {size} pixels; expected {expected}, as {source} does"
            )
        own, trained = initial.text_model.state_dict(), tokenizer.backbone.text_model.state_dict()
        same = own.keys() == trained.keys() and all(torch.equal(own[name], trained[name]) for name in own)
        ways["continuous"] = Matcher(
            lambda images: initial.vision_model(pixel_values=images).pooler_output,
            # Most recipes freeze the text tower; then its vectors of texts are computed once for both.
            ways["quantized"].encode_texts
            if same
            else lambda tokens: initial.text_model(input_ids=tokens).pooler_output,
        )
    length = tokenizer.config.text_config.max_position_embeddings
    return Matchers(ways, AutoTokenizer.from_pretrained(words), length, tokenizer.device)
