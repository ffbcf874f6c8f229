"""Tests of eval/understanding."""
