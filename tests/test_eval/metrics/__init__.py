"""Tests of `eval.metrics`."""
