"""Benchmarks of questions about pictures: reading, asking, scoring."""
