"""A visual tokenizer from the layout of the released checkpoints, and back to it; VQ models of others."""

from collections.abc import Iterator
from pathlib import Path

from dualtoken.visual_tokenizer.released import (
    build_released,
    names_from_released,
    read_released_weights,
    save_released,
    state_to_released,
)
from dualtoken.visual_tokenizer.released_config import config_from_released
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer
from eval.inputs import load_dual_tokenizer
from launchers.conversions.report import Report, new_folder, require_new, written


def tokenizer_from_released(
    config: Path, checkpoint: Path, backbone_config: Path | None, output: Path, full_attention: bool = False
) -> Iterator[str]:
    """Convert a released checkpoint to a folder for `from_pretrained`; yields lines that say what it is.

    Raises:
        FileNotFoundError, ValueError: what the readers find wrong; nothing is written.
    """
    require_new(output)
    translated = config_from_released(config, backbone_config, full_attention)
    state = read_released_weights(checkpoint)
    model = build_released(translated, state, str(checkpoint))
    names = names_from_released(state)
    report = Report("tokenizer from released", {"config": str(config), "checkpoint": str(checkpoint)})
    report.renamed = {old: new for old, new in names.items() if new is not None}
    report.dropped = [old for old, new in names.items() if new is None]
    report.new = sorted(model.state_dict().keys() - set(report.renamed.values()))
    report.notes += [
        "the depths of a codebook are one tensor, its last row, which is padding, is left out",
        f"attention behind the quantizers: {'full (--full-attention)' if full_attention else 'causal'}",
        *(f"{part:<20} {count:>13,} parameters" for part, count in model.parameters_per_part().items()),
    ]
    with new_folder(output, report) as folder:
        model.save_pretrained(folder)
    yield from report.lines()
    yield written(output, f" (fingerprint {model.fingerprint()[:12]})")


def tokenizer_of_vq(model: Path, image_size: int | None, output: Path) -> Iterator[str]:
    """Write the VQ model of others in a folder of transformers as a visual tokenizer; yields lines on it.

    Args:
        model: folder of the VQ model, or of the whole model that it is a part of.
        image_size: pixels a side, None for what the files say.
        output: new folder.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the folder; nothing is written.
    """
    require_new(output)
    tokenizer = VQTokenizer.from_pretrained(model, image_size=image_size)
    config = tokenizer.config
    report = Report("vq", {"model": str(model)})
    report.renamed = {name.removeprefix("vq."): name for name in tokenizer.state_dict()}
    report.notes.append(
        f"{config.vq.model_type}: {config.image_size} pixels a side, {config.positions} positions, "
        f"{config.codebook_size} codes of {config.codebook_dim} dimensions"
    )
    with new_folder(output, report) as folder:
        tokenizer.save_pretrained(folder)
    yield from report.lines()
    yield written(output, f" (fingerprint {tokenizer.fingerprint()[:12]})")


def tokenizer_to_released(model: Path, output: Path) -> Iterator[str]:
    """Convert an exported tokenizer to the released layout; yields lines that say what was written.

    Raises:
        FileNotFoundError: there is no tokenizer in the folder.
        ValueError: it has something that the released layout cannot express; nothing is written.
    """
    require_new(output)
    tokenizer = load_dual_tokenizer(model).cpu()
    state = tokenizer.state_dict()
    names = names_from_released(state_to_released(state, tokenizer.config.num_quantizers))
    report = Report("tokenizer to released", {"model": str(model)})
    for released, ours in names.items():
        before = report.renamed.get(str(ours))
        report.renamed[str(ours)] = f"{before}, {released}" if before else released
    report.dropped = sorted(state.keys() - report.renamed.keys())
    report.notes.append("a codebook is written once for each depth, with a last row of padding")
    with new_folder(output, report) as folder:
        save_released(tokenizer, folder)
    yield from report.lines()
    yield written(output, ": config.json, siglip/config.json, epoch_0.pt")
