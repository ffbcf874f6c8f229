"""Pictures to pixel and semantic codes and back: tower, projections, quantizers, decoder."""

from dualtoken.visual_tokenizer.config import DualTokenVisualTokenizerConfig, preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer, VisualTokenizerOutput

__all__ = [
    "DualTokenVisualTokenizer",
    "DualTokenVisualTokenizerConfig",
    "VisualTokenizerOutput",
    "preset_config",
]
