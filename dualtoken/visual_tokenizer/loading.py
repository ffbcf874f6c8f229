"""Loading a visual tokenizer without knowing which kind it is: ours, or a VQ model of others."""

from __future__ import annotations

import json
from pathlib import Path

from dualtoken.visual_tokenizer.config import DualTokenVisualTokenizerConfig
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer

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
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no visual tokenizer in {folder}: expected a folder with config.json and model.safetensors, as "
            "the tokenizer job exports it"
        )
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    ours = kind == DualTokenVisualTokenizerConfig.model_type
    return (DualTokenVisualTokenizer if ours else VQTokenizer).from_pretrained(folder).eval()
