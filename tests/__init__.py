"""Tests; `tests.support.distributed` runs code on several ranks."""
