"""How good a visual tokenizer is: reconstruction, use of codebooks, zero-shot classification, retrieval."""
