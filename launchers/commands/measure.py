"""Commands that measure: layers, variants, the state of a run, the report."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.options import RUN, RanksOption, RecipeArgument, RunOption, say

commands = typer.Typer()


@commands.command("analyze-layers", rich_help_panel="Measure")
def analyze_layers(
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    backbone: Annotated[Path, typer.Option(help="SigLIP: a folder, or a name on the hub.")] = RUN
    / "siglip"
    / "export",
    count: Annotated[int, typer.Option(min=1, help="Pictures at most.")] = 1000,
    output: Annotated[
        Path, typer.Option("--out", "--output", help="Folder for layers.json and layers.png.")
    ] = Path("layers"),
) -> None:
    """Compare a SigLIP's layers on pictures; proposes which to read for pixels and which for meaning.

    Example: [bold]dualtoken analyze-layers photos/ --backbone models/siglip[/]
    """
    from launchers.layers import analyze_layers as analyze

    for line in analyze(backbone, images, count, output):
        say(line)


class Of(StrEnum):
    """What `ablate` trains variants of."""

    TOKENIZER = "tokenizer"
    UNIFIED = "unified"


@commands.command(rich_help_panel="Measure")
def ablate(
    of: Annotated[Of, typer.Option(help="What is trained in variants.")] = Of.TOKENIZER,
    run: RunOption = RUN,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--output",
            help="Folder for the runs and the table: by default runs/ablation, or runs/ablation_unified.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps of each training: by default 200, or those of the unified model's recipe.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 3,
    ranks: RanksOption = None,
) -> None:
    """Compare ways to build a model on a quickstart's data, over seeds: do the paper's orderings appear?

    Of the tokenizer: one codebook or two, and at which layers.

    Of the unified model: semantic codes alone, pixel codes alone, or both as what it reads; measured by
    answers, captions and drawn scenes of held-out combinations.

    Started again, it goes on after the runs that are done.

    Example: [bold]dualtoken ablate --of unified --seeds 3[/] (nine trainings as the quickstart's last)
    """
    from launchers.ablate import ablate as run_all
    from launchers.ablate_tokenizer import tokenizer_ablation
    from launchers.ablate_unified import unified_ablation
    from launchers.processes import default_ranks

    if of is Of.UNIFIED:
        ablation, folder = unified_ablation(run, steps), Path("runs/ablation_unified")
    else:
        ablation, folder = tokenizer_ablation(run, steps), Path("runs/ablation")
    run_all(ablation, output or folder, seeds, ranks or default_ranks(ablation.recipe), say)


@commands.command(rich_help_panel="Measure")
def sweep(
    recipe: RecipeArgument,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE...",
            help="Keys of the recipe with the values to compare; one with a single value is set for all.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--out", "--output", help="Folder for the runs, the table and the plot.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each combination.")] = 1,
    ranks: RanksOption = None,
) -> None:
    """Train a recipe once for each value of a key, or combination of several, and compare the losses.

    Commas separate values, but for those in brackets and quotes: optimizer.betas=[0.9,0.95],[0.9,0.99]
    are two lists, and a text with a comma goes in quotes of its own, "data.path='a,b',c".

    Started again, it goes on after the runs that are done; values and seeds may be added. Writes sweep.md,
    sweep.json and sweep.png, with loss spikes marked.

    Example: [bold]dualtoken sweep quickstart_siglip optimizer.lr=5e-4,1e-3,2e-3 steps=200 --output runs/lr[/]
    """
    from launchers.sweep import parse_sweep
    from launchers.sweep import sweep as run_all

    run_all(parse_sweep(recipe, settings), output, seeds, ranks, say)


@commands.command(rich_help_panel="Measure")
def status(run_dir: Annotated[Path, typer.Argument(help="Folder of a training, its run_dir.")]) -> None:
    """Say whether a training lives, where it is and when it may end; exit code 1 if it does not go on.

    Example: [bold]dualtoken status runs/quickstart/tokenizer[/]
    """
    from launchers.status import status as look

    line, is_well = look(run_dir)
    say(line)
    if not is_well:
        raise typer.Exit(1)


@commands.command(rich_help_panel="Measure")
def report(run: RunOption = RUN) -> None:
    """Write report.html and report.json of a run from what has been trained and measured so far.

    Example: [bold]dualtoken report --run runs/mine[/]
    """
    from eval.report import build_report

    say(f"written: {build_report(run)}")
