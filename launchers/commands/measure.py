"""Commands that measure: layers, variants, the state of a run, the report."""

import shlex
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
    INPUTS = "inputs"


ABLATIONS = {
    Of.TOKENIZER: Path("runs/ablation"),
    Of.UNIFIED: Path("runs/ablation_unified"),
    Of.INPUTS: Path("runs/ablation_inputs"),
}
OF_INPUTS = "Of inputs"


@commands.command(rich_help_panel="Measure")
def ablate(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Of inputs: settings of the recipes to change, those of the model for the first.",
        ),
    ] = None,
    of: Annotated[Of, typer.Option(help="What is trained in variants.")] = Of.TOKENIZER,
    run: RunOption = RUN,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--output",
            help="Folder for the runs and the table: by default runs/ablation, runs/ablation_unified or "
            "runs/ablation_inputs.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps of each training: by default 200, or those of the unified model's recipes.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 3,
    ranks: RanksOption = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="One to compare, several times for several: semantic, dual, in-layer, continuous, "
            "dual-encoder; by default all.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="Recipe of a unified model, several times for one after the other; by default "
            "quickstart_inputs.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Image-text shards, for each --recipe; by default the quickstart's scenes.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    visual_tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Visual tokenizer instead of the run's.", show_default=False, rich_help_panel=OF_INPUTS
        ),
    ] = None,
    siglip: Annotated[
        Path | None,
        typer.Option(
            help="The SigLIP that it was built on, instead of the run's.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    in_layer_tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Visual tokenizer with one codebook on one layer; by default trained on the run's drawings.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    vq: Annotated[
        Path | None,
        typer.Option(
            help="Visual tokenizer of the dual encoder; by default the pixel codes of the other one.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="What is measured, several times for several: benchmarks of `dualtoken evaluate`, or, by "
            "default, scenes.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    benchmarks: Annotated[
        Path | None,
        typer.Option(
            help="Folder above the benchmarks' files, a folder a task by its name; by default the run's "
            "small local ones.",
            show_default=False,
            rich_help_panel=OF_INPUTS,
        ),
    ] = None,
    pretokenize: Annotated[
        str,
        typer.Option(
            metavar="OPTIONS",
            help="Further options of pretokenize, in quotes, such as '--chat-template vicuna'.",
            rich_help_panel=OF_INPUTS,
        ),
    ] = "",
) -> None:
    """Compare ways to build a model on a quickstart's data, over seeds: do the paper's orderings appear?

    Of the tokenizer: one codebook or two, and at which layers.

    Of the unified model: semantic codes alone, pixel codes alone, or both as what it reads; measured by
    answers, captions and drawn scenes of held-out combinations.

    Of inputs: a recipe with nothing changed but what a picture is to the language model: semantic codes, both
    codebooks', those of one codebook on one layer, SigLIP's features, or codes and then features; with what
    each costs. Recipes, data and benchmarks of any size (docs/unitoken.md).

    Started again, it goes on after the runs that are done.

    Example: [bold]dualtoken ablate --of unified --seeds 3[/] (nine trainings as the quickstart's last)
    """
    from launchers.ablate import ablate as run_all
    from launchers.ablate_tokenizer import tokenizer_ablation
    from launchers.ablate_unified import unified_ablation
    from launchers.errors import UserError
    from launchers.processes import default_ranks

    tokenizers = {"dual": visual_tokenizer, "in-layer": in_layer_tokenizer, "vq": vq}
    given = {
        "inputs": inputs, "recipes": recipe, "data": data, "siglip": siglip, "tasks": task,
        "benchmarks": benchmarks, "settings": settings, "pretokenize": shlex.split(pretokenize),
        "tokenizers": {name: folder for name, folder in tokenizers.items() if folder},
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value}
    if of is Of.INPUTS:
        from launchers.ablate_inputs import compare_inputs
        from launchers.inputs import of_quickstart

        asked = of_quickstart(run, steps=steps, **given)
        ranks = ranks or default_ranks(*asked.recipes, settings=asked.settings)
        compare_inputs(asked, output or ABLATIONS[of], seeds, ranks, say)
        return
    if given:
        raise UserError(f"--of {of.value} has no use for {', '.join(given)}: these are for --of inputs")
    ablation = unified_ablation(run, steps) if of is Of.UNIFIED else tokenizer_ablation(run, steps)
    run_all(ablation, output or ABLATIONS[of], seeds, ranks or default_ranks(ablation.recipe), say)


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
