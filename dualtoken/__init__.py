"""The models: visual tokenizer and unified language model; importable with torch and transformers alone."""
