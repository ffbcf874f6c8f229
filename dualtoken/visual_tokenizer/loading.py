"""Loading a visual tokenizer without knowing which kind it is: ours, or a VQ model of others."""

from __future__ import annotations

import json
from pathlib import Path

from dualtoken.visual_tokenizer.config import DualTokenVisualTokenizerConfig
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.vq_config import VQTokenizerConfig
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer

VisualTokenizerConfig = DualTokenVisualTokenizerConfig | VQTokenizerConfig
VisualTokenizer = DualTokenVisualTokenizer | VQTokenizer
"""What makes codes of pictures. They differ in their codebooks, `config.num_codebooks`: two, or one."""


def load_visual_tokenizer(folder: str | Path) -> VisualTokenizer:
    """Load a visual tokenizer, strictly, in fp32 and eval mode.

    Args:
        folder: an export of ours, or what `VQTokenizer.from_pretrained` reads.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is another kind of model, or its weights do not fit its config.
    """
    return (DualTokenVisualTokenizer if _is_ours(folder) else VQTokenizer).from_pretrained(folder).eval()


def load_visual_tokenizer_config(folder: str | Path) -> VisualTokenizerConfig:
    """Load the config alone; as `load_visual_tokenizer`."""
    if _is_ours(folder):
        return DualTokenVisualTokenizerConfig.from_pretrained(folder)
    return VQTokenizerConfig.of_folder(folder)


def _is_ours(folder: str | Path) -> bool:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no visual tokenizer in {folder}: expected a folder with config.json and model.safetensors, as "
            "the tokenizer job exports it"
        )
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    return kind == DualTokenVisualTokenizerConfig.model_type
