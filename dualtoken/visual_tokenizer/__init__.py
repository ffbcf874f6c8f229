"""Pictures to pixel and semantic codes and back: tower, projections, quantizers, decoder."""

from dualtoken.public_names import imported_on_first_use

_HOMES = {
    "DualTokenVisualTokenizer": "model",
    "DualTokenVisualTokenizerConfig": "config",
    "VQTokenizer": "vq_tokenizer",
    "VQTokenizerConfig": "vq_config",
    "VisualTokenizerOutput": "model",
    "load_visual_tokenizer": "loading",
    "preset_config": "config",
}

__all__ = list(_HOMES)
__getattr__ = imported_on_first_use(__name__, _HOMES)
