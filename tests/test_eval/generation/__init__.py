"""Tests of `eval.generation`."""
