"""The training jobs: contrastive, tokenizer and unified model, run by one trainer under DeepSpeed."""
