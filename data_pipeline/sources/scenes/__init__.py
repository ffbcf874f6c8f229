"""Scenes: a few drawings in colours, numbers and places, of which whole combinations are held out."""
