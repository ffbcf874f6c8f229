"""Where shards come from: the sample data, LLaVA's files, and the small text tokenizer."""
