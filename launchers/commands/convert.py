"""`dualtoken convert`: checkpoints from and to other layouts."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.options import say
from launchers.errors import UserError

convert = typer.Typer(
    no_args_is_help=True,
    help="Convert checkpoints from and to other layouts; nothing is overwritten, and conversion.json in the "
    "result says what became of every weight.",
)

NewFolderOption = Annotated[Path, typer.Option("--out", "--output", help="New folder for the result.")]


class Layout(StrEnum):
    """Layouts of a visual tokenizer that are not our own."""

    RELEASED = "released"


class Precision(StrEnum):
    """Types of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@convert.command("tokenizer")
def convert_tokenizer(
    output: NewFolderOption,
    source: Annotated[
        Layout | None, typer.Option("--from", help="Layout of --config and --checkpoint.", show_default=False)
    ] = None,
    target: Annotated[
        Layout | None, typer.Option("--to", help="Layout to write --model in.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --from: its config.json.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --from: its epoch_N.pt.", show_default=False)
    ] = None,
    backbone_config: Annotated[
        Path | None,
        typer.Option(help="With --from: the SigLIP's config, if it lies elsewhere.", show_default=False),
    ] = None,
    full_attention: Annotated[
        bool,
        typer.Option(
            "--full-attention",
            help="With --from: it is of the time before attention behind the quantizers was causal.",
        ),
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="With --to: an exported visual tokenizer.", show_default=False)
    ] = None,
) -> None:
    """Convert a visual tokenizer from the layout of the released DualToken checkpoints, or back to it.

    Example: [bold]dualtoken convert tokenizer --from released --config config.json --checkpoint epoch_20.pt
    --out tokenizer[/]
    """
    from launchers.conversions.tokenizer import tokenizer_from_released, tokenizer_to_released

    if source and config and checkpoint and not target and not model:
        lines = tokenizer_from_released(config, checkpoint, backbone_config, output, full_attention)
    elif target and model and not (source or config or checkpoint or backbone_config or full_attention):
        lines = tokenizer_to_released(model, output)
    else:
        raise UserError(
            "expected either --from released --config FILE --checkpoint FILE or --to released "
            "--model FOLDER, and --out FOLDER"
        )
    for line in lines:
        say(line)


@convert.command("vq")
def convert_vq(
    model: Annotated[
        Path,
        typer.Option(help="Folder of Emu3, Janus or Chameleon of transformers, or of its VQ model alone."),
    ],
    output: NewFolderOption,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side; by default what its files say.", show_default=False)
    ] = None,
) -> None:
    """Take the VQ model out of a model of others, as a visual tokenizer with pictures of one size.

    Example: [bold]dualtoken convert vq --model Emu3-VQ --image-size 256 --out tokenizer[/]
    """
    from launchers.conversions.tokenizer import tokenizer_of_vq

    for line in tokenizer_of_vq(model, image_size, output):
        say(line)


@convert.command("unified")
def convert_unified(
    llm: Annotated[Path, typer.Option(help="Base language model, a folder such as of Qwen2.5.")],
    visual_tokenizer: Annotated[Path, typer.Option(help="Exported visual tokenizer, a folder.")],
    output: NewFolderOption,
    heads: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="As model.heads of a recipe, such as embedder=mlp_concat."
        ),
    ] = None,
    text_tokenizer: Annotated[
        Path | None, typer.Option(help="Its text tokenizer, if it lies elsewhere.", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the new weights; a recipe with this seed draws the same.")
    ] = 0,
) -> None:
    """Build a unified model around a base language model, for model.init_from of a recipe.

    Example: [bold]dualtoken convert unified --llm Qwen2.5-3B --visual-tokenizer tokenizer --out unified[/]
    """
    from launchers.conversions.unified import build_unified

    for line in build_unified(llm, text_tokenizer, visual_tokenizer, output, heads or [], seed):
        say(line)


@convert.command("llm")
def convert_llm(
    model: Annotated[Path, typer.Option(help="Exported unified model, a folder.")],
    output: NewFolderOption,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Language model it was built from: drop the rows that its vocabulary lacks, and take its "
            "text tokenizer. By default all rows stay.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Round the weights; by default they stay.", show_default=False)
    ] = None,
) -> None:
    """Take the language model out of a unified model, as AutoModelForCausalLM loads it.

    Example: [bold]dualtoken convert llm --model unified --base Qwen2.5-3B --dtype bfloat16 --out llm[/]
    """
    from launchers.conversions.llm import extract_llm

    for line in extract_llm(model, output, base, dtype and dtype.value):
        say(line)


@convert.command("llava")
def convert_llava(
    model: Annotated[Path, typer.Option(help="Exported unified model, a folder.")],
    output: NewFolderOption,
    visual_tokenizer: Annotated[
        Path | None,
        typer.Option(help="Export: the visual tokenizer whose codes it reads.", show_default=False),
    ] = None,
    projector: Annotated[
        Path | None,
        typer.Option(
            help="Import: mm_projector.safetensors or .bin, or their folder, to put into the model.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a unified model's embedder as LLaVA's projector, or put one of LLaVA's layout into the model.

    Example: [bold]dualtoken convert llava --model unified --visual-tokenizer tokenizer --out llava[/]
    """
    from launchers.conversions.llava import export_llava, import_projector

    if visual_tokenizer and not projector:
        lines = export_llava(model, visual_tokenizer, output)
    elif projector and not visual_tokenizer:
        lines = import_projector(model, projector, output)
    else:
        raise UserError("expected either --visual-tokenizer FOLDER to export or --projector FILE to import")
    for line in lines:
        say(line)


@convert.command("checkpoint")
def convert_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a step, or of a run: its newest complete checkpoint is taken.")
    ],
    output: NewFolderOption,
    frozen_from: Annotated[
        Path | None,
        typer.Option(
            help="Model folder to take frozen weights from, which a bf16 run holds rounded.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the hashes of all files first.")] = True,
) -> None:
    """Write the model of a training checkpoint as the run itself would export it, without starting it.

    Example: [bold]dualtoken convert checkpoint runs/mine --out model[/]
    """
    from launchers.conversions.checkpoint import export_checkpoint

    for line in export_checkpoint(checkpoint, output, frozen_from, verify):
        say(line)
