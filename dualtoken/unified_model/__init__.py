"""The language model that reads and writes text and codes: decoder, visual embedder, two heads, packs."""

from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM

__all__ = ["DualTokenConfig", "DualTokenForCausalLM"]
