"""Commands about data sets: check, show and count codes, import other layouts."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.options import TOKENIZER, TokenizerOption, say

commands = typer.Typer()


DatasetArgument = Annotated[Path, typer.Argument(help="Dual-code data set, a folder.")]


@commands.command(rich_help_panel="Data")
def verify(
    dataset: DatasetArgument,
    visual_tokenizer: Annotated[
        Path | None,
        typer.Option(help="Also check that this visual tokenizer made the codes.", show_default=False),
    ] = None,
) -> None:
    """Check a dual-code data set: hashes, counts, shapes, ranges, and whose codes they are.

    Example: [bold]dualtoken verify runs/quickstart/codes/train[/]
    """
    from launchers.datasets import verify as check

    for line in check(dataset, visual_tokenizer):
        say(line)


@commands.command(rich_help_panel="Data")
def show(
    dataset: DatasetArgument,
    key: Annotated[
        str, typer.Argument(help="Key of the sample: its files' name in the shard up to the first dot.")
    ],
    visual_tokenizer: TokenizerOption = TOKENIZER,
    output: Annotated[Path, typer.Option("--out", "--output", help="Folder for the pictures.")] = Path(
        "shown"
    ),
) -> None:
    """Show one sample of a dual-code data set: its text, and its pictures decoded from the codes.

    Example: [bold]dualtoken show runs/quickstart/codes/train scene-train-00000[/]
    """
    from launchers.datasets import show as show_sample

    for line in show_sample(dataset, key, visual_tokenizer, output):
        say(line)


@commands.command(rich_help_panel="Data")
def stats(dataset: DatasetArgument) -> None:
    """Count what a dual-code data set holds: images and texts, bytes, use of the codes by depth.

    Example: [bold]dualtoken stats runs/quickstart/codes/train[/]
    """
    from launchers.datasets import stats as count

    for line in count(dataset):
        say(line)


imports = typer.Typer(no_args_is_help=True, help="Make image-text shards of data sets in other layouts.")
commands.add_typer(imports, name="import", rich_help_panel="Data")


@imports.command("llava")
def llava(
    source: Annotated[Path, typer.Option("--json", help="LLaVA's json, a list of conversations.")],
    images: Annotated[Path, typer.Option(help="Folder that the pictures' names in it start from.")],
    output: Annotated[Path, typer.Option("--out", "--output", help="Folder for the shards.")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples of each shard.")] = 2000,
) -> None:
    """Make shards of LLaVA's conversations and pictures, for pretokenize.

    Example: [bold]dualtoken import llava --json llava_v1_5_mix665k.json --images pictures --out shards[/]
    """
    from data_pipeline.sources.llava import REJECTED, TURNS_LEFT_OUT, import_llava

    made = import_llava(source, images, output, samples_per_shard)
    say(f"{output}: {made.samples} samples with {made.images} images in {made.shards} shards")
    if made.rejected:
        say(f"{made.rejected} samples left out; the reasons are in {output / REJECTED}")
    if made.turns_left_out:
        say(f"{made.turns_left_out} turns that LLaVA does not learn left out; {output / TURNS_LEFT_OUT}")
