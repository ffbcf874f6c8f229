"""Image-text shards to dual-code shards, by any number of workers: `python -m data_pipeline.pretokenize`."""
