"""Commands that measure: layers, variants, the state of a run, the report."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.options import RUN, RanksOption, RunOption, say

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


@commands.command(rich_help_panel="Measure")
def ablate(
    run: RunOption = RUN,
    output: Annotated[
        Path, typer.Option("--out", "--output", help="Folder for the runs and the table.")
    ] = Path("runs/ablation"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each training.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 3,
    ranks: RanksOption = None,
) -> None:
    """Compare ways to build the tokenizer on a quickstart's data: one codebook or two, which layers.

    Example: [bold]dualtoken ablate --steps 200 --seeds 3[/] (about half an hour on two cores)
    """
    from launchers.ablate import RECIPE
    from launchers.ablate import ablate as run_all
    from launchers.processes import default_ranks

    run_all(run, output, steps, seeds, ranks or default_ranks(RECIPE), say)


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
