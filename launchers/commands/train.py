"""Commands that make data and train: the quickstart, and each of its steps."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.options import (
    RUN,
    TOKENIZER,
    Precision,
    RanksOption,
    RecipeArgument,
    RunOption,
    SettingsArgument,
    TokenizerOption,
    say,
)

commands = typer.Typer()


class DecodingBackend(StrEnum):
    """What decodes pictures."""

    AUTO = "auto"
    DALI = "dali"
    TORCHVISION = "torchvision"
    PIL = "pil"


class Fit(StrEnum):
    """How a picture is made square."""

    RESIZE = "resize"
    CROP = "crop"


class TurnTemplate(StrEnum):
    """What pretokenize puts around the turns of a conversation."""

    QWEN = "qwen"
    VICUNA = "vicuna"
    PLAIN = "plain"


class Features(StrEnum):
    """What pretokenize keeps of pictures besides codes."""

    NONE = "none"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    PIXELS = "pixels"


class OnBadShard(StrEnum):
    """What becomes of a run where a shard cannot be read."""

    STOP = "stop"
    SKIP = "skip"


@commands.command(rich_help_panel="Start here")
def quickstart(
    run: RunOption = RUN,
    ranks: RanksOption = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of what is held out, of the data and of the trainings.")
    ] = 0,
) -> None:
    """Run the whole chain on sample drawings, from data to report; resumes where it stopped.

    Example: [bold]dualtoken quickstart[/], then open runs/quickstart/report.html
    """
    from launchers.processes import default_ranks
    from launchers.quickstart import RECIPES, run_chain

    run_chain(run, ranks or default_ranks(*RECIPES), say, seed)


@commands.command("sample-data", rich_help_panel="Train")
def sample_data(
    output: Annotated[Path, typer.Argument(help="Folder to make.")] = RUN / "sample_data",
    image_size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    held_out: Annotated[float, typer.Option(help="Share of the concepts kept from training.")] = 0.1,
    languages: Annotated[str, typer.Option(help="Languages of the names, by comma.")] = "en,de,es",
    seed: Annotated[int, typer.Option(help="Of the choice of held-out concepts, and of the order.")] = 0,
) -> None:
    """Make the sample data: OpenMoji drawings with their names, as shards, and a small text tokenizer.

    Example: [bold]dualtoken sample-data data --image-size 96 --languages en,fr[/]
    """
    from data_pipeline.sources.sample_data import make_sample_data

    summary = make_sample_data(
        output, image_size, held_out, seed, [word.strip() for word in languages.split(",")]
    )
    if summary.already_done:
        say(f"already there: {output}")
    for line in summary.lines():
        say(line)


@commands.command(rich_help_panel="Train")
def train(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
    ranks: RanksOption = None,
) -> None:
    """Train with a recipe, under DeepSpeed on this machine; started again, it resumes.

    Example: [bold]dualtoken train quickstart_tokenizer run_dir=runs/mine steps=200[/]
    """
    from launchers.processes import deepspeed_command, default_ranks
    from pretrain.config import load_job_config

    ranks = ranks or default_ranks(recipe, settings=settings or [])
    words = [f"recipe={recipe}", *(settings or [])]
    load_job_config(words, world_size=ranks)  # a mistake is told once, before any process starts
    _run(deepspeed_command("pretrain.train", words, ranks), ranks)


@commands.command(rich_help_panel="Train")
def pretokenize(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image-text shards: folders, tars, patterns, addresses; by default the quickstart's."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--out", "--output", help="Folder for the dual-code shards.")] = RUN
    / "codes"
    / "train",
    visual_tokenizer: TokenizerOption = TOKENIZER,
    ranks: RanksOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell sizes and time from a measured sample; write nothing.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at a time.")] = 64,
    precision: Annotated[
        Precision, typer.Option(help="Of the towers; bf16 is faster on GPUs, and some codes are others.")
    ] = Precision.FP32,
    features: Annotated[
        Features,
        typer.Option(
            help="For models that read continuous features: those of --vision-tower, or the pixels for a "
            "tower in the model."
        ),
    ] = Features.NONE,
    vision_tower: Annotated[
        str | None, typer.Option(help="SigLIP, a folder or a name on the hub.", show_default=False)
    ] = None,
    feature_layer: Annotated[
        int | None,
        typer.Option(
            help="Of the tower, after which features are taken; by default the last but one.",
            show_default=False,
        ),
    ] = None,
    tiles: Annotated[
        str | None,
        typer.Option(
            help="Grids, rows x columns, that pictures are cut into for features: 1x2,2x1,2x2, say.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[DecodingBackend, typer.Option(help="What decodes pictures.")] = DecodingBackend.AUTO,
    decoding_threads: Annotated[int, typer.Option(min=1, help="Threads a rank that decode pictures.")] = 1,
    fit: Annotated[Fit, typer.Option(help="Take the whole picture, or its central square.")] = Fit.RESIZE,
    default_language: Annotated[str, typer.Option(help="Language of captions that do not say it.")] = "en",
    prefix_keys: Annotated[
        bool, typer.Option("--prefix-keys", help="Put the shard's name before keys, where keys repeat.")
    ] = False,
    chat_template: Annotated[
        TurnTemplate,
        typer.Option(help="What stands around the turns of conversations; plain for bare captions."),
    ] = TurnTemplate.QWEN,
    images_first: Annotated[
        bool, typer.Option("--images-first", help="Move the pictures of a turn to its start, as LLaVA does.")
    ] = False,
    generate_images: Annotated[
        bool, typer.Option("--generate-images", help="Learn to draw the pictures of documents too.")
    ] = False,
    on_bad_shard: Annotated[
        OnBadShard, typer.Option(help="Where nothing of a shard can be read: stop, or note it and go on.")
    ] = OnBadShard.STOP,
) -> None:
    """Turn pictures in shards into codes, once, for training the unified model; resumes where it stopped.

    Example: [bold]dualtoken pretokenize data/images --output data/codes[/]
    """
    from launchers.processes import deepspeed_command, default_ranks
    from launchers.quickstart import pretokenize_arguments, scenes_to_learn

    ranks = ranks or default_ranks()
    arguments = pretokenize_arguments(inputs or [str(scenes_to_learn(RUN))], visual_tokenizer, output)
    arguments += ["--batch-size", str(batch_size), "--precision", precision, "--fit", fit]
    arguments += ["--backend", backend, "--decoding-threads", str(decoding_threads)]
    arguments += ["--features", features]
    for option, value in (("vision-tower", vision_tower), ("feature-layer", feature_layer), ("tiles", tiles)):
        arguments += [] if value is None else [f"--{option}", str(value)]
    arguments += ["--default-language", default_language, "--chat-template", chat_template]
    arguments += ["--on-bad-shard", on_bad_shard]
    arguments += ["--prefix-keys"] * prefix_keys + ["--images-first"] * images_first
    arguments += ["--generate-images"] * generate_images
    if dry_run:
        words = [*arguments, "--dry-run", "--workers", str(ranks)]
        _run(["python", "-m", "data_pipeline.pretokenize", *words], ranks)
        return
    _run(deepspeed_command("data_pipeline.pretokenize", arguments, ranks), ranks)


@commands.command(rich_help_panel="Train")
def overfit(
    settings: SettingsArgument = None,
    pairs: Annotated[int, typer.Option(min=1, help="Image-text pairs to learn, drawn at random.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps: by default 120 for one pair, the recipe's own for more.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe of a unified model, by name or path.")] = (
        "quickstart_mllm"
    ),
    codes: Annotated[Path, typer.Option(help="Dual-code data set to take pairs from.")] = RUN
    / "codes"
    / "train",
    visual_tokenizer: TokenizerOption = TOKENIZER,
    text_tokenizer: Annotated[Path, typer.Option(help="Text tokenizer, a folder.")] = RUN
    / "sample_data"
    / "text_tokenizer",
    output: Annotated[
        Path, typer.Option("--out", "--output", help="Folder; one for each number of pairs is made in it.")
    ] = Path("runs/overfit"),
    ranks: RanksOption = None,
    seed: Annotated[int, typer.Option(help="Of the choice of the pairs.")] = 0,
) -> None:
    """Check a training before a big one: learn a few pairs by heart, then ask for their texts and pictures.

    One pair has to come back exactly, text and picture. With more, the drawn pictures have to match their
    prompts better than by chance, ranked by the visual tokenizer's semantic features. Writes overfit.json
    and overfit.html; a training that was stopped goes on, a finished one is not repeated.

    Example: [bold]dualtoken overfit --pairs 64[/]
    """
    from launchers.overfit import overfit as learn_by_heart
    from launchers.processes import default_ranks

    learn_by_heart(
        pairs,
        steps,
        recipe,
        settings or [],
        codes,
        visual_tokenizer,
        text_tokenizer,
        output / f"pairs-{pairs}",
        ranks or default_ranks(recipe, settings=settings or []),
        seed,
        say,
    )


def _run(command: list[str], ranks: int) -> None:
    """Run a command in this terminal; its own messages tell what went wrong."""
    import shlex

    from launchers import processes

    say(f"$ {shlex.join(command)}")
    finished = processes.run(command, ranks)
    if finished.returncode:
        raise typer.Exit(finished.returncode if 0 < finished.returncode < 256 else 1)
