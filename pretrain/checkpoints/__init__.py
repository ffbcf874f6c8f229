"""Checkpoints that are whole or absent, in files that any number of ranks and any ZeRO level can read."""
