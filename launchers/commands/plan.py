"""The command that plans a training before anything is bought, queued or downloaded."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.options import RecipeArgument, SettingsArgument, say
from launchers.errors import UserError

commands = typer.Typer()


@commands.command(rich_help_panel="Train")
def plan(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their kind (a wrong one lists them).")] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of their peak that the step's FLOPs take.")] = 0.4,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Documents (tokenizer: pictures) to train on; by default the recipe's steps.",
            show_default=False,
        ),
    ] = None,
    visual_tokenizer: Annotated[
        str | None,
        typer.Option(help="Preset or folder; by default the recipe's, else so400m_384.", show_default=False),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(help="Preset or folder; by default the recipe's, else qwen2.5-3b.", show_default=False),
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of a document besides its picture.")] = 64,
    plain_tokens: Annotated[int, typer.Option(min=1, help="Of a document without picture.")] = 512,
    intra: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="GB/s between GPUs of a node, one way; by default NVLink's.", show_default=False
        ),
    ] = None,
    inter: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="GB/s out of a node, one way; by default an adapter a GPU.", show_default=False
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures there.", show_default=False)
    ] = None,
) -> None:
    """Tell what a training takes: parameters, memory, FLOPs, communication, time. Runs and needs nothing.

    The cluster may also be words among the settings: recipe=mllm_joint nodes=8 gpus=8 gpu=h100.

    Example: [bold]dualtoken plan mllm_joint --nodes 8 --gpus 8 --gpu h100[/]
    """
    from launchers.plan import Cluster, make_plan
    from launchers.plan_tables import show_plan, write_json
    from pretrain.planned_models import ModelOptions

    recipe = recipe.removeprefix("recipe=")
    words, settings = split_cluster(settings or [])
    nodes, gpus, gpu = int(words.get("nodes", nodes)), int(words.get("gpus", gpus)), words.get("gpu", gpu)
    cluster = Cluster(
        nodes, gpus, gpu, mfu, None if intra is None else intra * 1e9, None if inter is None else inter * 1e9
    )
    options = ModelOptions(visual_tokenizer, llm)
    made = make_plan(recipe, settings, cluster, options, samples, text_tokens, plain_tokens)
    show_plan(made)
    if json_file is not None:
        write_json(made, json_file)
        say(f"written: {json_file}")


def split_cluster(settings: list[str]) -> tuple[dict[str, str], list[str]]:
    """What words such as nodes=8 say of the cluster, and the other words, which are the recipe's.

    Raises:
        UserError: nodes or gpus are not a number of at least 1.
    """
    words = {}
    rest = []
    for word in settings:
        name, equals, value = word.partition("=")
        if not equals or name not in ("nodes", "gpus", "gpu"):
            rest.append(word)
            continue
        if name != "gpu" and not (value.isdecimal() and int(value) > 0):
            raise UserError(f"{word}: expected a number of at least 1, for example {name}=8")
        words[name] = value
    return words, rest
