"""The models: visual tokenizer and unified language model; importable with torch and transformers alone."""

import importlib

# Public names and the modules they live in; imported on first use, so that `import dualtoken` stays light.
# transformers' Auto classes know a model once its name has been used.
_HOMES = {
    "AttentionProjection": "projection",
    "DualTokenConfig": "unified_model",
    "DualTokenForCausalLM": "unified_model",
    "DualTokenProcessor": "processing",
    "DualTokenVisualTokenizer": "visual_tokenizer",
    "DualTokenVisualTokenizerConfig": "visual_tokenizer",
    "FrozenTeacher": "visual_tokenizer.backbone",
    "MultiCodebookVQ": "visual_tokenizer.quantizer",
    "PixelDecoder": "visual_tokenizer.pixel_decoder",
    "QuantizerStats": "visual_tokenizer.quantizer",
    "ResidualVQ": "visual_tokenizer.quantizer",
    "VisualTokenizerOutput": "visual_tokenizer",
    "preset_config": "visual_tokenizer",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"dualtoken.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dualtoken' has no attribute {name!r}")
