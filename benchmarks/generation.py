"""Depth decoding with the cache against running the depth transformer anew at every depth.

One position's codes of one head at the paper's sizes (width 2048, 3 layers, depth 8, 16384 codes), 16 rows,
on one thread: CPU time of the best of a few runs, and the largest difference between the logits of the two.
Run: ``python -m benchmarks.generation``.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.quantizer import best_cpu_seconds, processor
from benchmarks.visual_heads import build_head, plain_features
from dualtoken.unified_model.depth_transformer import VisualHead


@torch.no_grad()
def recomputed(head: VisualHead, hidden: Tensor, prefix: Tensor) -> list[Tensor]:
    """Return the logits [N, K] of each depth, all depths before it run again for each."""
    return [
        plain_features(head, hidden, prefix[:, :depth])[:, -1] @ head.classifier[depth].t()
        for depth in range(head.depth)
    ]


@torch.no_grad()
def cached(head: VisualHead, hidden: Tensor, prefix: Tensor) -> list[Tensor]:
    """Return the same, from the cache."""
    cache = head.new_cache(len(hidden))
    return [head.step(prefix[:, d - 1] if d else hidden, cache) for d in range(head.depth)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--iterations", type=int, default=3)
    args = parser.parse_args()
    args.chunk = args.rows
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = build_head(args)
    hidden = torch.randn(args.rows, args.hidden).to(head.classifier.dtype)
    prefix = torch.randn(args.rows, args.depth - 1, 32)
    seconds = {
        function.__name__: best_cpu_seconds(lambda f=function: f(head, hidden, prefix), args.iterations)
        for function in (cached, recomputed)
    }
    pairs = zip(cached(head, hidden, prefix), recomputed(head, hidden, prefix))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    print(
        f"{args.rows} rows, width {args.hidden}, {args.layers} layers, depth {args.depth}, K {args.codes}, "
        f"{args.dtype}; one thread; torch {torch.__version__}, {processor()}, {time.strftime('%F')}"
    )
    for name, value in seconds.items():
        print(f"{name:11} {value * 1e3:8.1f} ms a position")
    print(
        f"cached is {seconds['recomputed'] / seconds['cached']:.2f}x faster; "
        f"logits differ by at most {difference:.1e}"
    )


if __name__ == "__main__":
    main()
