"""The `dualtoken` command. What a command needs is imported when it runs, so that help comes at once."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.errors import UserError

RUN = Path("runs/quickstart")
RAISE = "DUALTOKEN_TRACEBACK"

app = typer.Typer(
    name="dualtoken",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain and use vision-language models with dual visual vocabularies.\n\n"
    "Start with [bold]dualtoken quickstart[/]: on a laptop it trains everything small, on sample drawings, "
    "and writes a report in about a quarter of an hour. The other commands then work on its results in "
    "runs/quickstart; options point them elsewhere.",
)

RunOption = Annotated[Path, typer.Option("--run", help="Folder of a quickstart.", show_default=True)]
RanksOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes: by default one for each GPU, or two on the CPU, as far as the batch splits.",
        show_default=False,
    ),
]
SettingsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe to change, such as steps=200."),
]
TokenizerOption = Annotated[
    Path, typer.Option("--visual-tokenizer", help="Exported visual tokenizer, a folder.")
]
ModelOption = Annotated[Path, typer.Option("--model", help="Exported unified model, a folder.")]
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
TOKENIZER = RUN / "tokenizer" / "export"
MODEL = RUN / "mllm" / "export"


class Measure(StrEnum):
    """What `evaluate` can measure."""

    RECONSTRUCTION = "reconstruction"
    RETRIEVAL = "retrieval"
    LIKELIHOOD = "likelihood"
    GENERATION = "generation"
    LAYERS = "layers"


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


class OnBadShard(StrEnum):
    """What becomes of a run where a shard cannot be read."""

    STOP = "stop"
    SKIP = "skip"


def say(line: str) -> None:
    """Print a line for the user, at once also into a pipe."""
    typer.echo(line)
    sys.stdout.flush()


@app.command(rich_help_panel="Start here")
def quickstart(run: RunOption = RUN, ranks: RanksOption = None) -> None:
    """Run the whole chain on sample drawings, from data to report; resumes where it stopped.

    Example: [bold]dualtoken quickstart[/], then open runs/quickstart/report.html
    """
    from launchers.processes import default_ranks
    from launchers.quickstart import RECIPES, run_chain

    run_chain(run, ranks or default_ranks(*RECIPES), say)


@app.command("sample-data", rich_help_panel="Train")
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


@app.command(rich_help_panel="Train")
def train(
    recipe: Annotated[
        str, typer.Argument(help="Recipe by name (a wrong one lists them) or path of a YAML file.")
    ],
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


@app.command(rich_help_panel="Train")
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
    backend: Annotated[DecodingBackend, typer.Option(help="What decodes pictures.")] = DecodingBackend.AUTO,
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
    from launchers.quickstart import learned_shard, pretokenize_arguments

    ranks = ranks or default_ranks()
    arguments = pretokenize_arguments(inputs or [str(learned_shard(RUN))], visual_tokenizer, output)
    arguments += ["--batch-size", str(batch_size), "--backend", backend, "--fit", fit]
    arguments += ["--default-language", default_language, "--chat-template", chat_template]
    arguments += ["--on-bad-shard", on_bad_shard]
    arguments += ["--prefix-keys"] * prefix_keys + ["--images-first"] * images_first
    arguments += ["--generate-images"] * generate_images
    if dry_run:
        words = [*arguments, "--dry-run", "--workers", str(ranks)]
        _run(["python", "-m", "data_pipeline.pretokenize", *words], ranks)
        return
    _run(deepspeed_command("data_pipeline.pretokenize", arguments, ranks), ranks)


@app.command(rich_help_panel="Train")
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


@app.command(rich_help_panel="Use")
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


@app.command(rich_help_panel="Use")
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
    drawn = generate_files(prompts, model, visual_tokenizer, output, guidance_scale, settings, image or [])
    for line in drawn:
        say(line)


@app.command(rich_help_panel="Use")
def caption(
    images: ImagesArgument,
    model: ModelOption = MODEL,
    visual_tokenizer: TokenizerOption = TOKENIZER,
    language: Annotated[str, typer.Option(help="Language to answer in, such as en, de, es.")] = "en",
    max_new_tokens: Annotated[int, typer.Option(help="Longest caption, in tokens.")] = 32,
) -> None:
    """Say in words what is in pictures.

    Example: [bold]dualtoken caption cat.png --language de[/]
    """
    from launchers.use import caption_files

    for line in caption_files(images, model, visual_tokenizer, language, max_new_tokens):
        say(line)


class Template(StrEnum):
    """What stands around the turns of a conversation."""

    QWEN = "qwen"
    VICUNA = "vicuna"
    PLAIN = "plain"
    NONE = "none"


@app.command(rich_help_panel="Use")
def chat(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures for the first message; <image> in it marks their places."),
    ] = None,
    model: ModelOption = MODEL,
    visual_tokenizer: TokenizerOption = TOKENIZER,
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
    )


@app.command("analyze-layers", rich_help_panel="Measure")
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
    from launchers.convert import analyze_layers as analyze

    for line in analyze(backbone, images, count, output):
        say(line)


DatasetArgument = Annotated[Path, typer.Argument(help="Dual-code data set, a folder.")]


@app.command(rich_help_panel="Data")
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


@app.command(rich_help_panel="Data")
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

    Example: [bold]dualtoken show runs/quickstart/codes/train 1F98A[/]
    """
    from launchers.datasets import show as show_sample

    for line in show_sample(dataset, key, visual_tokenizer, output):
        say(line)


@app.command(rich_help_panel="Data")
def stats(dataset: DatasetArgument) -> None:
    """Count what a dual-code data set holds: images and texts, bytes, use of the codes by depth.

    Example: [bold]dualtoken stats runs/quickstart/codes/train[/]
    """
    from launchers.datasets import stats as count

    for line in count(dataset):
        say(line)


@app.command(rich_help_panel="Measure")
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


imports = typer.Typer(no_args_is_help=True, help="Make image-text shards of data sets in other layouts.")
app.add_typer(imports, name="import", rich_help_panel="Data")


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


convert = typer.Typer(no_args_is_help=True, help="Convert checkpoints from and to other layouts.")
app.add_typer(convert, name="convert", rich_help_panel="Use")


class Layout(StrEnum):
    """Layouts of a visual tokenizer that are not our own."""

    RELEASED = "released"


@convert.command("tokenizer")
def convert_tokenizer(
    output: Annotated[Path, typer.Option("--out", "--output", help="New folder for the result.")],
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
    model: Annotated[
        Path | None, typer.Option(help="With --to: an exported visual tokenizer.", show_default=False)
    ] = None,
) -> None:
    """Convert a visual tokenizer from the layout of the released DualToken checkpoints, or back to it.

    Example: [bold]dualtoken convert tokenizer --from released --config config.json --checkpoint epoch_20.pt
    --out tokenizer[/]
    """
    from launchers.convert import tokenizer_from_released, tokenizer_to_released

    if source and config and checkpoint and not target and not model:
        lines = tokenizer_from_released(config, checkpoint, backbone_config, output)
    elif target and model and not source and not config and not checkpoint:
        lines = tokenizer_to_released(model, output)
    else:
        raise UserError(
            "expected either --from released --config FILE --checkpoint FILE or --to released "
            "--model FOLDER, and --out FOLDER"
        )
    for line in lines:
        say(line)


@app.command(rich_help_panel="Measure")
def evaluate(
    measures: Annotated[list[Measure] | None, typer.Argument(help="What to measure; all by default.")] = None,
    run: RunOption = RUN,
    count: Annotated[
        int | None, typer.Option(min=1, help="Measure on that many samples at most.", show_default=False)
    ] = None,
    siglip: Annotated[Path | None, typer.Option(help="Exported SigLIP instead of the run's.")] = None,
    visual_tokenizer: Annotated[
        Path | None, typer.Option(help="Visual tokenizer instead of the run's.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Unified model instead of the run's.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "--output", help="Folder for results instead of the run's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is chosen at random.")] = 0,
) -> None:
    """Measure the models of a run on held-out and on seen data.

    Example: [bold]dualtoken evaluate reconstruction --run runs/mine[/]
    """
    from eval.inputs import EvaluationPaths
    from launchers.evaluate import evaluate as take_measures

    paths = EvaluationPaths.from_run(
        run, siglip=siglip, visual_tokenizer=visual_tokenizer, model=model, output=output
    )
    take_measures([measure.value for measure in measures or []], paths, count, seed, say)


@app.command(rich_help_panel="Measure")
def report(run: RunOption = RUN) -> None:
    """Write report.html and report.json of a run from what has been trained and measured so far.

    Example: [bold]dualtoken report --run runs/mine[/]
    """
    from eval.report import build_report

    say(f"written: {build_report(run)}")


def _run(command: list[str], ranks: int) -> None:
    """Run a command in this terminal; its own messages tell what went wrong."""
    import shlex

    from launchers import processes

    say(f"$ {shlex.join(command)}")
    finished = processes.run(command, ranks)
    if finished.returncode:
        raise typer.Exit(finished.returncode if 0 < finished.returncode < 256 else 1)


def main() -> None:
    """Run the command; mistakes are one line on standard error and exit code 2.

    With DUALTOKEN_TRACEBACK=1 in the environment errors keep their traceback.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of defaults in its own configs
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _fail("stopped; started again, the same command goes on where it was", 130)
    except typer.Abort:
        _fail("stopped", 130)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:  # the command line itself is wrong
            if not usage():
                sys.exit(2)  # no command given: the help has been shown
            _fail(f"{_one_line(usage())} (see: dualtoken --help)", 2)
        # ValueError is what every part of the project raises for mistakes of its user.
        if os.environ.get(RAISE) or not isinstance(error, UserError | ValueError | OSError | ImportError):
            raise
        _fail(_one_line(str(error)), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
