"""Text and pictures from the unified model, and how likely given ones are."""

from dualtoken.public_names import imported_on_first_use

_HOMES = {
    "document_nll": "likelihood",
    "generate": "generators",
    "generate_images": "generators",
    "generate_text": "generators",
    "option_log_likelihoods": "likelihood",
    "stream": "generators",
    "stream_text": "generators",
}

__all__ = list(_HOMES)
__getattr__ = imported_on_first_use(__name__, _HOMES)
