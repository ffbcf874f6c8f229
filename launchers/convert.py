"""What `dualtoken convert` and `dualtoken analyze-layers` do with files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from data_pipeline.whole_folder import whole_folder
from launchers.errors import UserError
from launchers.use import read_pictures, with_progress

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 32


def require_new(output: Path) -> None:
    """Raise UserError if there is something at `output` that would be overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: choose another --out or remove it")


def tokenizer_from_released(
    config: Path, checkpoint: Path, backbone_config: Path | None, output: Path
) -> list[str]:
    """Convert a released checkpoint to a folder for `from_pretrained`; returns lines that say what it is.

    Raises:
        FileNotFoundError, ValueError: what `load_released` finds wrong; nothing is written.
    """
    from dualtoken.visual_tokenizer.released import load_released

    require_new(output)
    model = load_released(config, checkpoint, backbone_config)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
    parts = [f"{name:<20} {count:>13,} parameters" for name, count in model.parameters_per_part().items()]
    return [*parts, f"written: {output} (fingerprint {model.fingerprint()[:12]})"]


def tokenizer_to_released(model: Path, output: Path) -> list[str]:
    """Convert an exported tokenizer to the released layout; returns lines that say what was written.

    Raises:
        FileNotFoundError: there is no tokenizer in the folder.
        ValueError: it has something that the released layout cannot express; nothing is written.
    """
    from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
    from dualtoken.visual_tokenizer.released import save_released
    from eval.inputs import require_export

    require_new(output)
    require_export(model, "visual tokenizer", "dualtoken train quickstart_tokenizer")
    tokenizer = DualTokenVisualTokenizer.from_pretrained(model)
    with whole_folder(output) as folder:
        save_released(tokenizer, folder)
    return [f"written: {output / 'config.json'}, {output / 'epoch_0.pt'}"]


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
    from eval.layers import compare_layers

    files = find_pictures(images, count)
    transformers_logging.disable_progress_bar()
    model = load_backbone(backbone).eval().to(default_device())
    size = model.config.vision_config.image_size

    def batches() -> Iterator[torch.Tensor]:
        for start in with_progress(range(0, len(files), BATCH), "reading pictures"):
            yield read_pictures(files[start : start + BATCH], size).to(default_device())

    result = compare_layers(model, batches(), len(files), str(backbone), output)
    yield f"{len(result['layers'])} layers, {len(files)} pictures"
    yield from result["proposal"]
    yield f"written: {output / 'layers.json'}, {output / 'layers.png'}"
