"""Captions for a contrastive loss: one language drawn for each picture and step, as token ids."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from pretrain.config import ConfigError
from pretrain.runtime import Runtime


class CaptionInput:
    """Chooses captions and turns them into token ids on this rank's device.

    Args:
        text_tokenizer: as `load_text_tokenizer` returns it.
        length: tokens; captions are padded and cut to it, as SigLIP is trained.
        seed: of the draw of languages.
        runtime: the step, of which the draw depends, and the device.
    """

    def __init__(self, text_tokenizer: Any, length: int, seed: int, runtime: Runtime) -> None:
        self.text_tokenizer, self.length = text_tokenizer, length
        self.seed, self.runtime = seed, runtime

    def choose(self, key: str, captions: dict[str, str], number: int = 0) -> str:
        """A picture's caption in a language drawn by key and step, so that no rank or resume changes it."""
        languages = sorted(captions)
        if not languages:
            return ""
        draw = zlib.crc32(f"{self.seed} {self.runtime.step} {key}".encode())
        return captions[languages[(draw + number) % len(languages)]]

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, T] of B captions."""
        tokens = self.text_tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return tokens["input_ids"].to(self.runtime.device, non_blocking=True)


def load_text_tokenizer(path: str, setting: str = "text_tokenizer") -> Any:
    """The text tokenizer in a folder that the recipe names in `setting`.

    Raises:
        ConfigError: there is none, or it has no padding token.
    """
    if not (Path(path) / "tokenizer_config.json").is_file():
        raise ConfigError(f"{setting}={path}: expected a folder with a Hugging Face tokenizer")
    text_tokenizer = AutoTokenizer.from_pretrained(path)
    if text_tokenizer.pad_token_id is None:
        raise ConfigError(f"{setting}={path} has no padding token, which SigLIP's text tower needs")
    return text_tokenizer
