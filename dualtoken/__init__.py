"""The models: visual tokenizer and unified language model; importable with torch and transformers alone."""

from dualtoken.public_names import imported_on_first_use

# Public names and where they live. transformers' Auto classes know a model once its name has been used.
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
    "VQTokenizer": "visual_tokenizer",
    "VQTokenizerConfig": "visual_tokenizer",
    "VisualTokenizerOutput": "visual_tokenizer",
    "load_visual_tokenizer": "visual_tokenizer",
    "preset_config": "visual_tokenizer",
}

__all__ = list(_HOMES)
__getattr__ = imported_on_first_use(__name__, _HOMES)
