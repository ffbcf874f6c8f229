"""Commands that use what was trained: reconstruct, draw, caption, chat, convert."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.convert import convert
from launchers.commands.options import (
    MODEL,
    TOKENIZER,
    GuidanceOption,
    ImagesArgument,
    ModelOption,
    Precision,
    PrecisionOption,
    SeedOption,
    TemperatureOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
    VisionTowerOption,
    say,
)

commands = typer.Typer()


class Template(StrEnum):
    """What stands around the turns of a conversation."""

    QWEN = "qwen"
    VICUNA = "vicuna"
    PLAIN = "plain"
    NONE = "none"


@commands.command(rich_help_panel="Use")
def reconstruct(
    images: ImagesArgument,
    visual_tokenizer: TokenizerOption = TOKENIZER,
    output: Annotated[Path, typer.Option("--out", "--output", help="Folder for the results.")] = Path(
        "reconstructed"
    ),
) -> None:
    """Send pictures through the visual tokenizer and back; writes input and output side by side.

    Example: [bold]dualtoken reconstruct cat.png dog.jpg[/]
    """
    from launchers.use import reconstruct_files

    for line in reconstruct_files(images, visual_tokenizer, output):
        say(line)


@commands.command(rich_help_panel="Use")
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(help="What to draw, one picture for each; <image> marks the place of an --image."),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture to start from, one for each <image> of the prompts.", show_default=False),
    ] = None,
    model: ModelOption = MODEL,
    visual_tokenizer: TokenizerOption = TOKENIZER,
    vision_tower: VisionTowerOption = None,
    precision: PrecisionOption = Precision.FP32,
    output: Annotated[Path, typer.Option("--out", "--output", help="Folder for the pictures.")] = Path(
        "generated"
    ),
    guidance_scale: GuidanceOption = 1.5,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
) -> None:
    """Draw pictures for prompts, or for prompts and pictures.

    Example: [bold]dualtoken generate "purple circle" "alarm clock" --guidance-scale 2[/]
    """
    from launchers.use import generate_files

    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    drawn = generate_files(
        prompts,
        model,
        visual_tokenizer,
        output,
        guidance_scale,
        settings,
        image or [],
        vision_tower,
        precision,
    )
    for line in drawn:
        say(line)


@commands.command(rich_help_panel="Use")
def caption(
    images: ImagesArgument,
    model: ModelOption = MODEL,
    visual_tokenizer: TokenizerOption = TOKENIZER,
    vision_tower: VisionTowerOption = None,
    precision: PrecisionOption = Precision.FP32,
    language: Annotated[str, typer.Option(help="Language to answer in, such as en, de, es.")] = "en",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in tokens.")] = 32,
) -> None:
    """Say in words what is in pictures.

    Example: [bold]dualtoken caption cat.png --language de[/]
    """
    from launchers.use import caption_files

    captions = caption_files(
        images, model, visual_tokenizer, language, max_new_tokens, vision_tower, precision
    )
    for line in captions:
        say(line)


@commands.command(rich_help_panel="Use")
def chat(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures for the first message; <image> in it marks their places."),
    ] = None,
    model: ModelOption = MODEL,
    visual_tokenizer: TokenizerOption = TOKENIZER,
    vision_tower: VisionTowerOption = None,
    precision: PrecisionOption = Precision.FP32,
    chat_template: Annotated[
        Template | None,
        typer.Option(
            help="Format of the conversations that the model was trained on; none reads messages as they "
            "stand. By default qwen, or none for a model that is known to have seen no conversations.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System prompt instead of the template's; empty for none.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option("--out", "--output", help="Folder for the pictures it draws.")
    ] = Path("generated"),
    guidance_scale: GuidanceOption = 1.5,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens of text.")] = 256,
) -> None:
    """Talk with a unified model: it answers by text and pictures. Input may also come through a pipe.

    /image PATH attaches a picture, /draw PROMPT asks for one, /help lists the rest.

    Example: [bold]dualtoken chat cat.png[/]
    """
    from launchers.chat import chat as talk

    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    template = chat_template and chat_template.value
    talk(
        images or [],
        model,
        visual_tokenizer,
        template,
        system,
        output,
        guidance_scale,
        settings,
        seed,
        max_new_tokens,
        vision_tower,
        precision,
    )


commands.add_typer(convert, name="convert", rich_help_panel="Use")
