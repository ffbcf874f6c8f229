"""Tests; `tests.distributed` runs code on several ranks."""
