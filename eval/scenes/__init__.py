"""How well a unified model reads, answers and draws scenes, above all combinations it never saw."""
