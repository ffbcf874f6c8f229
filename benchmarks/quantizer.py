"""Time and memory of the residual quantizer against a plain transcription and vector-quantize-pytorch.

One training step (forward, backward, codebook update) and the nearest-code search alone, at the paper's sizes
(2 images of 729 positions, 16384 codes, 32 wide, depth 8), single-threaded CPU time of rounds in which the
contenders take turns; peak memory of each in a process of its own. Run: ``python -m benchmarks.quantizer``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONTENDERS = ("ours", "plain", "library", "gemm")


class PlainResidualVQ:
    """The textbook formulas, distances with both norms, argmin, one-hot matmul."""

    def __init__(self, codebook: Tensor, depth: int, decay: float = 0.99) -> None:
        self.codebook, self.depth, self.decay = codebook.clone(), depth, decay
        self.cluster_size = codebook.new_zeros(len(codebook))
        self.embed_sum = torch.zeros_like(codebook)

    def search(self, x: Tensor) -> Tensor:
        """Return the nearest code of each row."""
        w = self.codebook
        distances = x.square().sum(1, keepdim=True) - 2 * x @ w.t() + w.square().sum(1)
        return distances.argmin(dim=1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantized latents, codes ``[N, D]`` and commitment loss of ``z [N, C]``; keep statistics."""
        residual, quantized, losses, codes = z.detach(), torch.zeros_like(z), [], []
        counts, sums = torch.zeros_like(self.cluster_size), torch.zeros_like(self.embed_sum)
        for _ in range(self.depth):
            codes.append(self.search(residual))
            one_hot = F.one_hot(codes[-1], len(self.codebook)).to(z.dtype)
            counts, sums = counts + one_hot.sum(0), sums + one_hot.t() @ residual
            vectors = self.codebook[codes[-1]]
            quantized, residual = quantized + vectors, residual - vectors
            losses.append(F.mse_loss(z, quantized.detach()))
        self.counts, self.sums = counts, sums
        return z + (quantized - z).detach(), torch.stack(codes, dim=-1), torch.stack(losses).mean()

    def step(self, z: Tensor) -> None:
        """Run forward, backward and update on latents ``[N, C]``."""
        output, _, loss = self.forward(z)
        (output.sum() + loss).backward()
        self.update()

    def update(self) -> None:
        """Move the codebook by the statistics of the last forward."""
        self.cluster_size = self.decay * self.cluster_size + (1 - self.decay) * self.counts
        self.embed_sum = self.decay * self.embed_sum + (1 - self.decay) * self.sums
        size = self.cluster_size.unsqueeze(1)
        self.codebook = torch.where(size > 1e-5, self.embed_sum / size, self.codebook)


def build(contender: str, latents: Tensor, codebook: Tensor, depth: int) -> tuple[Callable, Callable | None]:
    """Return a contender's training step and search, both without arguments; each step sees new latents."""
    size, width = codebook.shape
    device = latents.device
    generator = torch.Generator(device).manual_seed(1)

    def fresh() -> Tensor:
        return torch.randn(latents.shape, generator=generator, device=device).requires_grad_()

    if contender == "plain":
        plain = PlainResidualVQ(codebook, depth)
        return lambda: plain.step(fresh()), lambda: plain.search(latents)
    if contender == "ours":
        from dualtoken.visual_tokenizer.nearest import NearestCodeSearch
        from dualtoken.visual_tokenizer.quantizer import ResidualVQ

        ours = ResidualVQ(size, width, depth).to(device).train()
        ours.codebook.copy_(codebook)
        ours.window.fill_(0.0)  # touch the pages, so that what the quantizer holds all the time is not a peak
        search = NearestCodeSearch(codebook)

        def step() -> None:
            output = ours(fresh())
            (output.quantized.sum() + output.commitment_loss).backward()
            ours.update()

        return step, lambda: search(latents)
    if contender == "library":
        from vector_quantize_pytorch import ResidualVQ as LibraryResidualVQ

        library = LibraryResidualVQ(
            dim=width, codebook_size=size, num_quantizers=depth, shared_codebook=True, decay=0.99
        ).train()

        def library_step() -> None:
            quantized, _, losses = library(fresh().unsqueeze(0))
            (quantized.sum() + losses.mean()).backward()

        return library_step, None
    transposed, scores = codebook.t().contiguous(), torch.empty(256, size)

    def gemm() -> None:
        for _ in range(depth):
            for chunk in latents.split(256):
                torch.mm(chunk, transposed, out=scores[: len(chunk)])

    return gemm, None


def peak_memory_mib() -> float:
    """Return the high-water mark of resident memory since the last :func:`reset_peak_memory` (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status; peak memory is measured on Linux alone")


def reset_peak_memory() -> float:
    """Set the high-water mark to the present resident memory and return it, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory_mib()


def best_cpu_seconds(run: Callable, iterations: int) -> float:
    """Return the least CPU time of ``iterations`` runs after one to warm up."""
    run()
    times = []
    for _ in range(iterations):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def inputs(args: argparse.Namespace, images: int) -> tuple[Tensor, Tensor]:
    """Return latents [N, C] and a codebook [K, C]."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(images * args.positions, args.width, generator=generator)
    scales = torch.logspace(0, -1, args.codes).unsqueeze(1)  # codes for the early and for the late depths
    return latents, torch.randn(args.codes, args.width, generator=generator) * scales


def measure_memory(
    contender: str, args: argparse.Namespace, images: int, queue: multiprocessing.Queue
) -> None:
    """Put the peak memory of one contender's step, in this process, into ``queue``, in MiB."""
    torch.set_num_threads(1)
    latents, codebook = inputs(args, images)
    warm = build(contender, latents[:8], codebook[:256].clone(), args.depth)
    warm[0]()  # thread pools and kernels' own memory
    step, _ = build(contender, latents, codebook, args.depth)
    before = reset_peak_memory()
    step()
    queue.put(peak_memory_mib() - before)


def measure_times(args: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    """Put CPU seconds and the codes found into ``queue``; the contenders take turns, round by round."""
    torch.set_num_threads(1)
    latents, codebook = inputs(args, args.images)
    works: dict[tuple[str, str], Callable] = {}
    codes = {}
    for name in args.contenders:
        works[name, "step_s"], _ = build(name, latents, codebook.clone(), args.depth)
        _, search = build(name, latents, codebook.clone(), args.depth)
        if search is not None:
            works[name, "search_s"] = search
            codes[name] = search().tolist()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for _ in range(1 + args.iterations):
        for key, work in works.items():
            start = time.process_time()
            work()
            seconds[key].append(time.process_time() - start)
    queue.put(({key: times[1:] for key, times in seconds.items()}, codes))


def in_own_process(measure: Callable, *arguments: Any) -> Any:
    """Run a measurement in a fresh process; it puts its result into the queue it gets as last argument."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def processor() -> str:
    """Return the name of the processor."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--positions", type=int, default=729)
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=5, help="rounds")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results: dict[str, dict[str, float]] = {}
    for name in args.contenders:
        memory = in_own_process(measure_memory, name, args, args.images)
        results[name] = {"peak_mib": memory}
        if name in ("ours", "plain"):
            more = in_own_process(measure_memory, name, args, args.images + 2)
            results[name]["growth_mib_per_image"] = (more - memory) / 2
    seconds, codes = in_own_process(measure_times, args)
    for (name, what), times in seconds.items():
        results[name][what] = min(times)

    print(
        f"{args.images} images x {args.positions} positions, K {args.codes}, width {args.width}, "
        f"depth {args.depth}; one thread; torch {torch.__version__}, {processor()}, {time.strftime('%F')}"
    )
    for name, result in results.items():
        print(f"{name:8}", "  ".join(f"{key} {value:.4g}" for key, value in result.items()))
    if len(codes) == 2:
        same = sum(a == b for a, b in zip(codes["ours"], codes["plain"])) / len(codes["ours"])
        print(f"same codes as plain: {same:.4%} (plain rounds in fp32, so near ties may differ)")
    for (name, what), times in seconds.items():
        if name != "ours" and ("ours", what) in seconds:
            ratios = [other / own for other, own in zip(times, seconds["ours", what], strict=True)]
            print(
                f"{name} / ours, {what}: {statistics.median(ratios):.3g}x of the rounds "
                f"({min(ratios):.3g} to {max(ratios):.3g})"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
