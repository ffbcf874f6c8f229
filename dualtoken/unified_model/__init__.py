"""The language model that reads and writes text and codes: decoder, visual embedder, two heads, packs."""

from dualtoken.public_names import imported_on_first_use

_HOMES = {
    "DualTokenConfig": "config",
    "DualTokenForCausalLM": "model",
}

__all__ = list(_HOMES)
__getattr__ = imported_on_first_use(__name__, _HOMES)
