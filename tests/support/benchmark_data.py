"""Where the benchmarks' small example files lie, with what public scorers say of them."""

from pathlib import Path

BENCHMARK_DATA = Path(__file__).parents[1] / "data" / "benchmarks"
