"""Reconstruction by the visual tokenizer: PSNR and SSIM beside two baselines, codebook use, picture grids."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.inputs import (
    EvaluationPaths,
    Pictures,
    load_pictures,
    load_visual_tokenizer,
    to_picture,
)
from eval.metrics.images import psnr, ssim, to_unit_range
from eval.results import write_json
from eval.visual_tokenizer.code_use import codebook_table

BATCH = 32
GRID_PICTURES = 48
GRID_COLUMNS = 8
QUALITIES = ("psnr", "ssim", "mse", "l1")


@dataclass
class Reconstruction:
    """Pictures through a tokenizer, with the quality of each."""

    images: Tensor  # [N, 3, S, S] about [-1, 1]
    codes: Tensor | None  # [N, P, Q, D]
    psnr: Tensor  # [N], dB, like SSIM after clamping
    ssim: Tensor  # [N]
    mse: Tensor  # [N], like L1 in the range [-1, 1] and before clamping, as in training
    l1: Tensor  # [N]

    def summary(self) -> dict[str, float]:
        """Means over the pictures."""
        return {name: float(getattr(self, name).mean()) for name in QUALITIES}


def score(images: Tensor, references: Tensor, codes: Tensor | None = None) -> Reconstruction:
    """Measure pictures [N, 3, S, S] against their originals, both in [-1, 1]."""
    first, second = to_unit_range(images), to_unit_range(references)
    difference = images.double() - references.double()
    return Reconstruction(
        images,
        codes,
        psnr=psnr(first, second),
        ssim=ssim(first, second),
        mse=difference.square().mean(dim=(1, 2, 3)),
        l1=difference.abs().mean(dim=(1, 2, 3)),
    )


@torch.no_grad()
def reconstruct_batch(tokenizer: DualTokenVisualTokenizer, images: Tensor) -> Reconstruction:
    """Encode, decode and measure one batch [N, 3, S, S] in [-1, 1], everything on the tokenizer's device."""
    images = images.to(tokenizer.device)
    codes = tokenizer.encode(images)
    return score(tokenizer.decode(codes).float(), images, codes)


def reconstruct(tokenizer: DualTokenVisualTokenizer, images: Tensor) -> Reconstruction:
    """Encode, decode and measure pictures [N, 3, S, S] in [-1, 1] in batches; the result is on the CPU."""
    found = [reconstruct_batch(tokenizer, batch) for batch in images.split(BATCH)]
    names = [one.name for one in fields(Reconstruction)]
    return Reconstruction(**{name: torch.cat([getattr(one, name).cpu() for one in found]) for name in names})


def mean_colour(images: Tensor) -> Tensor:
    """Each picture as one flat colour, its mean: [N, 3, S, S]."""
    return images.mean(dim=(2, 3), keepdim=True).expand_as(images)


def untrained_twin(tokenizer: DualTokenVisualTokenizer, seed: int = 0) -> DualTokenVisualTokenizer:
    """A tokenizer of the same settings with fresh random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = type(tokenizer)(type(tokenizer.config)(**tokenizer.config.to_dict()))
    return twin.eval().requires_grad_(False).to(tokenizer.device)


def side_by_side(first: Tensor, second: Tensor) -> Image.Image:
    """Two pictures [3, H, W] beside each other."""
    return to_picture(torch.cat([first, second.to(first)], dim=2))


def picture_grid(pairs: list[Image.Image], columns: int = GRID_COLUMNS, gap: int = 6) -> Image.Image:
    """Pictures of one size on a white sheet."""
    width, height = pairs[0].size
    rows = -(-len(pairs) // columns)
    columns = min(columns, len(pairs))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, pair in enumerate(pairs):
        row, column = divmod(index, columns)
        sheet.paste(pair, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def run(paths: EvaluationPaths, count: int | None = None, seed: int = 0) -> dict:
    """Measure the tokenizer on held-out pictures and write `reconstruction.json` and the pictures.

    Args:
        paths: what to read and where to write.
        count: how many held-out pictures, all by default; as many seen ones are measured beside them.
        seed: of the draws and of the untrained twin.
    """
    tokenizer = load_visual_tokenizer(paths.visual_tokenizer)
    size = tokenizer.config.image_size
    held_out = load_pictures(paths.held_out_images, size, count, seed)
    seen = load_pictures(paths.seen_images, size, len(held_out), seed)
    found = reconstruct(tokenizer, held_out.images)
    found_seen = reconstruct(tokenizer, seen.images)
    untrained = reconstruct(untrained_twin(tokenizer, seed), held_out.images)
    flat = score(mean_colour(held_out.images), held_out.images)
    folder = paths.output / "reconstruction"
    pictures = _save_pictures(folder, held_out, found)
    result = {
        "image_size": size,
        "pictures": len(held_out),
        "tokenizer": found.summary(),
        "tokenizer_seen": found_seen.summary(),
        "mean_colour": flat.summary(),
        "untrained": untrained.summary(),
        "codebook_size": tokenizer.config.codebook_size,
        "codebooks": {
            "held_out": codebook_table(found.codes, tokenizer.config.codebook_size),
            "seen": codebook_table(found_seen.codes, tokenizer.config.codebook_size),
        },
        "per_picture": pictures,
    }
    write_json(paths.output / "reconstruction.json", result)
    return result


def _save_pictures(folder: Path, pictures: Pictures, found: Reconstruction) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    rows, pairs = [], []
    for index, key in enumerate(pictures.keys):
        pair = side_by_side(pictures.images[index], found.images[index])
        pair.save(folder / f"{index:05d}.png")
        pairs.append(pair)
        rows.append(
            {
                "key": key,
                "captions": pictures.captions[index],
                **{name: float(getattr(found, name)[index]) for name in QUALITIES},
                "picture": f"{folder.name}/{index:05d}.png",
            }
        )
    picture_grid(pairs[:GRID_PICTURES]).save(folder.with_suffix(".png"))
    return rows
