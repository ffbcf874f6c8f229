"""What `dualtoken analyze-layers` does with files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from eval.progress import with_progress
from launchers.errors import UserError
from launchers.use import read_pictures

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 32


def find_pictures(paths: Sequence[Path], count: int) -> list[Path]:
    """Picture files, and those in folders, in the order of their names, `count` at most.

    Raises:
        UserError: there is none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found.extend(sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_ENDINGS))
        else:
            found.append(path)
    if not found:
        raise UserError(f"no pictures in {', '.join(map(str, paths))}; expected {', '.join(PICTURE_ENDINGS)}")
    return found[:count]


def analyze_layers(backbone: Path, images: Sequence[Path], count: int, output: Path) -> Iterator[str]:
    """Compare the layers of a SigLIP on pictures and propose which to read; writes `layers.{json,png}`.

    Raises:
        FileNotFoundError: there is no backbone in the folder.
        UserError: no pictures.
    """
    from dualtoken.visual_tokenizer.backbone import load_backbone
    from eval.inputs import default_device
    from eval.visual_tokenizer.layers import compare_layers

    files = find_pictures(images, count)
    model = load_backbone(backbone).eval().to(default_device())
    size = model.config.vision_config.image_size

    def batches() -> Iterator[torch.Tensor]:
        for start in with_progress(range(0, len(files), BATCH), "reading pictures"):
            yield read_pictures(files[start : start + BATCH], size).to(default_device())

    result = compare_layers(model, batches(), len(files), str(backbone), output)
    yield f"{len(result['layers'])} layers, {len(files)} pictures"
    yield from result["proposal"]
    yield f"written: {output / 'layers.json'}, {output / 'layers.png'}"
