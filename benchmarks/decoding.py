"""Images per second and core of the decoding backends against a plain PIL loop, in one run.

Two inputs: JPEGs of 512 x 512 pixels (crops of a real photograph) to 384, and PNGs of 64 pixels that keep
their size (the sample data's case). Contenders take turns round by round; a figure is the best round by CPU
time of the whole process, so that neither other programs nor a backend's own threads flatter it. Run:
``python -m benchmarks.decoding [--output results.json]``.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor

from data_pipeline.images.decoding import build_image_decoder

Decode = Callable[[list[bytes]], Tensor]
BASELINE = "PIL, plain loop"
PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130")


def encode(image: Image.Image, format: str, **options: int) -> bytes:
    """Return the image as a file in memory."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photographs(count: int, side: int = 512) -> list[bytes]:
    """Return square JPEGs, quality 90, side in pixels: crops of one real photograph, flipped at random."""
    rng = random.Random(0)
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    photograph = photograph.resize((600, 704), Image.Resampling.BICUBIC)
    files = []
    for _ in range(count):
        left, top = rng.randrange(88), rng.randrange(192)
        crop = photograph.crop((left, top, left + 512, top + 512))
        crop = crop.transpose(rng.choice(list(Image.Transpose)[:2]))
        crop = crop if side == 512 else crop.resize((side, side))
        files.append(encode(crop, "JPEG", quality=90))
    return files


def drawings(count: int) -> list[bytes]:
    """Return PNGs of 64 x 64 pixels: OpenMoji drawings."""
    import resvg_py

    from data_pipeline.sources.openmoji import drawings_folder, find_pictures

    pictures, _ = find_pictures(["en"])
    files = []
    for picture in pictures[:: len(pictures) // count][:count]:
        path = str(drawings_folder() / f"{picture.key}.svg")
        png = resvg_py.svg_to_bytes(svg_path=path, width=64, height=64, background="#ffffff")
        files.append(encode(Image.open(io.BytesIO(png)).convert("RGB"), "PNG"))
    return files


def plain_loop(size: int) -> Decode:
    """Return what one writes first: PIL, then float tensors, image by image."""

    def decode(files: list[bytes]) -> Tensor:
        images = []
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
            images.append((pixels - 0.5) / 0.5)
        return torch.stack(images)

    return decode


def backend(name: str, size: int) -> Decode:
    """Return a backend of this project, by name."""
    decoder = build_image_decoder(size, name)  # type: ignore[arg-type]

    def decode(files: list[bytes]) -> Tensor:
        decoded = decoder(files)
        if decoded.rejected:
            raise RuntimeError(f"{name} rejected {decoded.rejected[0]}")
        return decoded.images

    return decode


def dali_dynamic_mode(size: int) -> Decode:
    """Return DALI's dynamic mode (eager, without a pipeline), for comparison."""
    import nvidia.dali.experimental.dynamic as ndd
    from nvidia.dali import types

    def decode(files: list[bytes]) -> Tensor:
        batch = ndd.batch([np.frombuffer(data, dtype=np.uint8) for data in files])
        images = ndd.decoders.image(batch, device="cpu", output_type=types.RGB)
        images = ndd.resize(
            images, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
        )
        pixels = torch.from_numpy(np.array(ndd.as_tensor(images)))
        return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    return decode


def measure(contenders: dict[str, Decode], files: list[bytes], rounds: int) -> dict[str, dict[str, float]]:
    """Return images per second of CPU and of wall time per contender, and the ratio to the baseline."""
    best = {name: [float("inf"), float("inf")] for name in contenders}
    reference = contenders[BASELINE](files)
    for name, decode in contenders.items():
        difference = (decode(files) - reference).abs().mean().item() * 127.5
        if difference > 0.5:
            raise RuntimeError(f"{name} differs from the plain loop by {difference:.2f} / 255 on average")
    for _ in range(rounds):
        for name, decode in contenders.items():
            cpu, wall = time.process_time(), time.perf_counter()
            decode(files)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            best[name] = [min(pair) for pair in zip(best[name], spent)]
    return {
        name: {
            "images_per_cpu_second": len(files) / cpu,
            "images_per_second": len(files) / wall,
            "ratio": best[BASELINE][0] / cpu,
        }
        for name, (cpu, wall) in best.items()
    }


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32, help="images per batch")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)

    results = {}
    cases = {
        "JPEG 512 -> 384": (photographs(options.images), 384),
        "PNG 64 -> 64": (drawings(options.images), 64),
    }
    for case, (files, size) in cases.items():
        contenders = {
            BASELINE: plain_loop(size),
            "pil": backend("pil", size),
            "torchvision": backend("torchvision", size),
            "dali": backend("dali", size),
            "DALI dynamic mode": dali_dynamic_mode(size),
        }
        results[case] = measure(contenders, files, options.rounds)
        print(f"\n{case}, {options.images} images, one thread")
        for name, figures in results[case].items():
            print(
                f"  {name:20s} {figures['images_per_cpu_second']:8.0f} images / CPU second"
                f"  {figures['images_per_second']:8.0f} / s  x {figures['ratio']:.2f}"
            )
    if options.output:
        versions = {}
        for package in PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = "absent"
        record = {
            "date": date.today().isoformat(),
            "processor": platform.processor() or platform.machine(),
            "versions": versions,
            "results": results,
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
