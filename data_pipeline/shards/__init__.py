"""Samples on disk or by address: tars, their index, image-text shards, dual-code shards."""
