"""Time and memory of both visual heads: losses in chunks against all logits at once.

One training step (forward and backward, gradients of all parameters and of the hidden states) of two heads
(729 positions, 3 layers, depth 8, 16384 codes, half the paper's width), on one thread. "plain" is a
transcription of the formulas under autograd, "checkpointed" the same in recomputed chunks, where
``--contenders`` names it. Peak memory is counted above weights and gradients; every contender runs in its own
process. Run: ``python -m benchmarks.visual_heads`` (3 TFLOP each, in fp32; ``--hidden 2048``, the paper's
width, takes four times as long).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.quantizer import peak_memory_mib, processor, reset_peak_memory
from dualtoken.unified_model.depth_transformer import VisualHead

CONTENDERS = ("ours", "plain", "checkpointed")


def build_head(args: argparse.Namespace) -> VisualHead:
    """Return a head with random weights; classifiers are sharper than at the start of training."""
    head = VisualHead(
        args.hidden, args.layers, args.hidden // 128, 4 * args.hidden, args.depth, 32, args.codes, args.chunk
    )
    head.init_weights()
    with torch.no_grad():
        head.classifier.mul_(10)
    return head.to(getattr(torch, args.dtype))


def plain_features(head: VisualHead, hidden: Tensor, prefix: Tensor) -> Tensor:
    """Run the depth transformer on the first steps, [N, C] and [N, d, E] -> [N, d + 1, C]."""
    x = torch.cat([hidden[:, None], prefix.to(hidden.dtype) @ head.code_in.t()], dim=1)
    x = x + head.depth_embedding[: x.shape[1]]
    norm = lambda v: F.rms_norm(v, v.shape[-1:], eps=1e-6)  # noqa: E731
    for qkv, out, up, down in zip(head.query_key_value, head.attention_out, head.mlp_in, head.mlp_out):
        parts = (norm(x) @ qkv.t()).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (head.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + attended.transpose(1, 2).flatten(2) @ out.t()
        x = x + F.gelu(norm(x) @ up.t()) @ down.t()
    return norm(x)


def plain_loss(head: VisualHead, hidden: Tensor, prefix: Tensor, codes: Tensor) -> Tensor:
    """Sum the negative log likelihoods by way of all logits [N, D, K]."""
    features = plain_features(head, hidden, prefix)
    logits = torch.stack([features[:, d] @ w.t() for d, w in enumerate(head.classifier)], dim=1)
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="sum")


def loss_of(
    contender: str, head: VisualHead, hidden: Tensor, prefix: Tensor, codes: Tensor, chunk: int
) -> Tensor:
    """Return the summed loss of one head."""
    if contender == "ours":
        return head(hidden, prefix, codes)[0].sum()
    if contender == "plain":
        return plain_loss(head, hidden, prefix, codes)
    chunks = zip(hidden.split(chunk), prefix.split(chunk), codes.split(chunk))
    return torch.stack([checkpoint(plain_loss, head, *c, use_reentrant=False) for c in chunks]).sum()


def measure(contender: str, args: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    """Measure one contender in this process; put a dictionary into ``queue``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = [build_head(args) for _ in range(2)]
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.positions, args.hidden, dtype=dtype, requires_grad=True)
    prefix = torch.randn(args.positions, args.depth - 1, 32)
    codes = torch.randint(args.codes, (args.positions, args.depth))
    parameters = [hidden, *(p for head in heads for p in head.parameters())]
    gradients_mib = sum(p.numel() * p.element_size() for p in parameters) / 2**20

    def step(count: int) -> float:
        loss = torch.stack(
            [
                loss_of(contender, head, hidden[:count], prefix[:count], codes[:count], args.chunk)
                for head in heads
            ]
        ).sum()
        loss.backward()
        return loss.item()

    step(8)  # thread pools and kernels' own memory
    for parameter in parameters:
        parameter.grad = None
    before = reset_peak_memory()
    start = time.process_time()
    loss = step(args.positions)
    seconds = time.process_time() - start
    peak = peak_memory_mib() - before - gradients_mib
    norms = [float(p.grad.float().norm()) for p in parameters if p.grad is not None]
    queue.put({"seconds": seconds, "peak_mib": peak, "loss": loss, "gradient_norms": norms})


def main() -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=729)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--contenders", nargs="+", default=["ours", "plain"], choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    context = multiprocessing.get_context("spawn")
    for contender in args.contenders:
        queue = context.Queue()
        process = context.Process(target=measure, args=(contender, args, queue))
        process.start()
        results[contender] = queue.get()
        process.join()

    print(
        f"2 heads, {args.positions} positions, width {args.hidden}, {args.layers} layers, "
        f"depth {args.depth}, K {args.codes}, chunks of {args.chunk}, {args.dtype}; one thread; "
        f"torch {torch.__version__}, {processor()}, {time.strftime('%F')}"
    )
    for name, result in results.items():
        print(
            f"{name:13} {result['seconds']:7.1f} s CPU  peak {result['peak_mib']:7.0f} MiB  "
            f"loss {result['loss']:.1f}"
        )
    if {"ours", "plain"} <= results.keys():
        ours, plain = results["ours"], results["plain"]
        differences = [
            abs(a - b) / max(b, 1e-12) for a, b in zip(ours["gradient_norms"], plain["gradient_norms"])
        ]
        print(
            f"ours / plain: time {ours['seconds'] / plain['seconds']:.2f}x, "
            f"memory 1/{plain['peak_mib'] / ours['peak_mib']:.1f}; "
            f"gradient norms differ by at most {max(differences):.1e}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
