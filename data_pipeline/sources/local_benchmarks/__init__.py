"""Small benchmarks in their authors' own formats, with true answers, about held-out drawings."""
