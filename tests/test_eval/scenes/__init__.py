"""Tests of eval/scenes."""
