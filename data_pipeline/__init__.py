"""From bytes to batches: sample data, image decoding, code shards, packing, streams."""
