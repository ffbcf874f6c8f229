"""Text and pictures from the unified model, and how likely given ones are."""

from dualtoken.generation.generate import generate, generate_images, generate_text, stream, stream_text
from dualtoken.generation.likelihood import document_nll

__all__ = ["document_nll", "generate", "generate_images", "generate_text", "stream", "stream_text"]
