"""Time and memory of a training step of the visual tokenizer, by part, with our quantizers and plain ones.

Forward, losses (MSE, commitment, distillation against a frozen teacher), backward and codebook update; no
optimizer and no perceptual network, which are the same for both. The plain quantizer is the textbook's:
distances with both norms, one-hot matmul per depth. Every contender runs in its own process, which gives its
peak memory. Random weights: the time does not depend on them. Run: ``python -m benchmarks.tokenizer_step``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quantizer import PlainResidualVQ, in_own_process, processor
from dualtoken.visual_tokenizer.backbone import FrozenTeacher
from dualtoken.visual_tokenizer.config import PRESETS, preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.quantizer import QuantizerOutput

PARTS = ("teacher", "tower", "quantizers", "decoder", "semantic", "backward", "update")


class PlainQuantizer(nn.Module):
    """The textbook's residual quantizer behind the interface of ours."""

    frozen = False

    def __init__(self, codebook: Tensor, depth: int) -> None:
        super().__init__()
        self.plain = PlainResidualVQ(codebook, depth)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize ``latents [B, P, C]`` and gather one-hot statistics, depth by depth."""
        quantized, codes, loss = self.plain.forward(latents.reshape(-1, latents.shape[-1]))
        codes = codes.view(*latents.shape[:-1], self.plain.depth)
        return QuantizerOutput(quantized.view(latents.shape), codes, loss)

    def update(self, group: Any = None) -> None:
        """Move the codebook by the statistics of the last forward."""
        self.plain.update()


def measure(contender: str, preset: str, images: int, steps: int, threads: int, queue: Any) -> None:
    """Put the best seconds of each part over some steps, and the peak memory, into the queue."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer = DualTokenVisualTokenizer(preset_config(preset, text_config=None)).train()
    if contender == "plain":
        depth = tokenizer.config.num_quantizers
        for name in ("quantizer_pixel", "quantizer_semantic"):
            codebook = getattr(tokenizer, name).codebook[0]
            setattr(tokenizer, name, PlainQuantizer(codebook, depth))
    teacher = FrozenTeacher(tokenizer.backbone.vision_model, tokenizer.config.semantic_layer)
    size = tokenizer.config.image_size
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    for _ in range(steps + 1):  # the first warms up: it is timed too, and never the best
        batch = torch.rand(images, 3, size, size) * 2 - 1
        seconds = one_step(tokenizer, teacher, batch)
        for part, value in {**seconds, "step": sum(seconds.values())}.items():
            best[part] = min(best[part], value)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    queue.put({"seconds": dict(best), "peak_mib": peak})


def one_step(tokenizer: DualTokenVisualTokenizer, teacher: FrozenTeacher, batch: Tensor) -> dict[str, float]:
    """Take a step on images ``[B, 3, H, W]``; returns the seconds of each part."""
    seconds: dict[str, float] = {}

    def timed(part: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[part] = time.perf_counter() - start
        return result

    target = timed("teacher", lambda: teacher(batch))
    pixel_latents, semantic_latents = timed("tower", lambda: tokenizer._latents(batch))
    pixel, semantic = timed(
        "quantizers",
        lambda: (tokenizer.quantizer_pixel(pixel_latents), tokenizer.quantizer_semantic(semantic_latents)),
    )
    picture, _ = timed("decoder", lambda: tokenizer._decode_latents(pixel.quantized))
    features, pooled = timed("semantic", lambda: tokenizer._pool_latents(semantic.quantized))
    loss = (
        F.mse_loss(picture, batch)
        + pixel.commitment_loss
        + semantic.commitment_loss
        + F.mse_loss(features, target.semantic_features)
        + F.mse_loss(pooled, target.pooled)
    )
    timed("backward", loss.backward)
    timed("update", tokenizer.update_codebooks)
    tokenizer.zero_grad(set_to_none=True)
    return seconds


def main() -> None:
    """Run both contenders and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="siglip_l_256", choices=sorted(PRESETS))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    arguments = (options.preset, options.images, options.steps, options.threads)
    found = {name: in_own_process(measure, name, *arguments) for name in ("ours", "plain")}
    print(
        f"{options.preset}, {options.images} images a step, fp32, best of {options.steps} steps; "
        f"{options.threads} thread(s); torch {torch.__version__}, {processor()}, {time.strftime('%F')}"
    )
    print(f"{'part':<12}{'ours, s':>10}{'plain, s':>10}{'plain / ours':>14}{'share of ours':>15}")
    ours, plain = (found[name]["seconds"] for name in ("ours", "plain"))
    for part in (*PARTS, "step"):
        share, ratio = ours[part] / ours["step"], plain[part] / ours[part]
        print(f"{part:<12}{ours[part]:>10.3f}{plain[part]:>10.3f}{ratio:>14.2f}{share:>15.0%}")
    peaks = [found[name]["peak_mib"] for name in ("ours", "plain")]
    print(f"{'peak, MiB':<12}{peaks[0]:>10.0f}{peaks[1]:>10.0f}{peaks[1] / peaks[0]:>14.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "found": found}, file, indent=1)


if __name__ == "__main__":
    main()
