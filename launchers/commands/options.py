"""Options that several commands have, and how commands speak."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

RUN = Path("runs/quickstart")
TOKENIZER = RUN / "tokenizer" / "export"
MODEL = RUN / "mllm" / "export"


class Precision(StrEnum):
    """How exactly a model computes."""

    FP32 = "fp32"
    BF16 = "bf16"


RunOption = Annotated[Path, typer.Option("--run", help="Folder of a quickstart.", show_default=True)]
RanksOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes: by default one for each GPU, or two on the CPU, as far as the batch splits.",
        show_default=False,
    ),
]
RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe by name (a wrong one lists them) or path of a YAML file.")
]
SettingsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe to change, such as steps=200."),
]
TokenizerOption = Annotated[
    Path, typer.Option("--visual-tokenizer", help="Exported visual tokenizer, a folder.")
]
ModelOption = Annotated[Path, typer.Option("--model", help="Exported unified model, a folder.")]
VisionTowerOption = Annotated[
    str | None,
    typer.Option(
        help="SigLIP of a unified model that was trained on stored features, a folder or a name on the hub; "
        "a model with its tower inside needs none.",
        show_default=False,
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(help="Of the unified model; bf16 takes half of the memory, and is faster on GPUs."),
]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Picture files: PNG, JPEG, WebP, ...")]
GuidanceOption = Annotated[
    float, typer.Option(help="How closely pictures follow the prompt: 1 as trained, more for closer.")
]
TemperatureOption = Annotated[
    float, typer.Option(help="0 takes the likeliest every time, 1 draws by the model's probabilities.")
]
TopKOption = Annotated[
    int, typer.Option(help="Draw among that many of the likeliest; 0 for all. Needs --temperature.")
]
TopPOption = Annotated[
    float,
    typer.Option(help="Draw among the likeliest that make up this share; 1 for all. Needs --temperature."),
]
SeedOption = Annotated[int, typer.Option(help="Of the draws, with --temperature above 0.")]


def say(line: str) -> None:
    """Print a line for the user, at once also into a pipe."""
    typer.echo(line)
    sys.stdout.flush()
