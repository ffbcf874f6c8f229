"""`dualtoken evaluate`: its tasks and options."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.commands.options import RUN, Precision, PrecisionOption, RunOption, VisionTowerOption, say

commands = typer.Typer()


class Task(StrEnum):
    """What `evaluate` can measure."""

    SCENES = "scenes"
    LIKELIHOOD = "likelihood"
    RECONSTRUCTION = "reconstruction"
    RETRIEVAL = "retrieval"
    LAYERS = "layers"
    ZERO_SHOT = "zero_shot"
    VQAV2 = "vqav2"
    TEXTVQA = "textvqa"
    POPE = "pope"
    MME = "mme"
    SEED = "seed"
    MMBENCH = "mmbench"
    MMVET = "mmvet"
    AI2D = "ai2d"
    GENEVAL = "geneval"
    GENAI_BENCH = "genai_bench"
    MJHQ = "mjhq"
    DRAWING = "drawing"
    FRECHET = "frechet"
    CLIP_SCORE = "clip_score"


class Template(StrEnum):
    """What stands around a question."""

    QWEN = "qwen"
    VICUNA = "vicuna"
    NONE = "none"


class By(StrEnum):
    """What counts as an answer."""

    TEXT = "text"
    LIKELIHOOD = "likelihood"


class Cut(StrEnum):
    """How a picture is made square."""

    CENTER_CROP = "center_crop"
    SQUARE = "square"


class Saved(StrEnum):
    """How pictures become 8-bit files for a Fréchet distance."""

    PNG = "png"
    REFERENCE = "reference"


ASKING, TOKENIZER_PANEL, DRAWING = "Understanding", "Visual tokenizer", "Generation"


@commands.command(rich_help_panel="Measure")
def evaluate(
    tasks: Annotated[
        list[Task] | None,
        typer.Argument(
            metavar="TASK",
            help="Understanding: vqav2, textvqa, pope, mme, seed, mmbench, mmvet, ai2d. Visual tokenizer: "
            "reconstruction, zero_shot, retrieval. Generation: geneval, genai_bench, mjhq, drawing, frechet, "
            "clip_score. Of a run: scenes, likelihood, reconstruction, retrieval, layers. Without one, "
            "everything that a quickstart leaves behind.",
        ),
    ] = None,
    run: RunOption = RUN,
    model: Annotated[
        str | None,
        typer.Option(
            help="Unified model instead of the run's: a folder; for questions also any model that "
            "transformers loads for pictures with text.",
            show_default=False,
        ),
    ] = None,
    visual_tokenizer: Annotated[
        Path | None, typer.Option(help="Visual tokenizer instead of the run's.", show_default=False)
    ] = None,
    siglip: Annotated[
        Path | None, typer.Option(help="SigLIP instead of the run's.", show_default=False)
    ] = None,
    vision_tower: VisionTowerOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Files of the task, as its authors give them out; of several tasks the folder above, a "
            "folder a task by its name. By default the run's small local ones.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--output",
            help="Folder for results: by default the run's evaluation/, or ./evaluation/ where models, data "
            "or answers are named.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Draw that many items at most.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is chosen at random.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions or pictures at a time.")] = 16,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine that share the tasks: by default one for each GPU, or one.",
            show_default=False,
        ),
    ] = None,
    precision: PrecisionOption = Precision.FP32,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Score these answers (LLaVA's JSONL, any model's) instead of asking a model.",
            show_default=False,
            rich_help_panel=ASKING,
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing", help="With --answers: questions without one are wrong.", rich_help_panel=ASKING
        ),
    ] = False,
    by: Annotated[
        By,
        typer.Option(
            help="What counts: the text that the model writes, or the likeliest of the options.",
            rich_help_panel=ASKING,
        ),
    ] = By.TEXT,
    template: Annotated[
        Template | None,
        typer.Option(
            "--chat-template",
            help="Of a unified model; by default as it was trained, as far as that is known.",
            show_default=False,
            rich_help_panel=ASKING,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer, in tokens; by default the benchmark's.",
            show_default=False,
            rich_help_panel=ASKING,
        ),
    ] = None,
    grades: Annotated[
        Path | None,
        typer.Option(help="For mmvet: average a judge's grades.", show_default=False, rich_help_panel=ASKING),
    ] = None,
    fit: Annotated[
        Cut,
        typer.Option(
            help="How pictures of --data become square: the papers' centre crop, or resized as in training.",
            rich_help_panel=TOKENIZER_PANEL,
        ),
    ] = Cut.CENTER_CROP,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="FID's Inception weights, pt_inception-2015-12-05-6726825d.pth; brings rFID and FID.",
            show_default=False,
            rich_help_panel=TOKENIZER_PANEL,
        ),
    ] = None,
    saved_as: Annotated[
        Saved,
        typer.Option(
            help="Pictures for rFID: rounded, as PNG; or cut off and JPEG, as the released code has them.",
            rich_help_panel=TOKENIZER_PANEL,
        ),
    ] = Saved.PNG,
    lpips: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Measure LPIPS (VGG) by these trunk weights: a file, torchvision (downloads) or stlpips.",
            show_default=False,
            rich_help_panel=TOKENIZER_PANEL,
        ),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="For zero_shot: imagenet, or a file with a name a line; by default the folders' names.",
            show_default=False,
            rich_help_panel=TOKENIZER_PANEL,
        ),
    ] = None,
    language: Annotated[
        str, typer.Option(help="For retrieval: captions in this language.", rich_help_panel=TOKENIZER_PANEL)
    ] = "en",
    per_prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures of each prompt; by default as the benchmark wants.",
            show_default=False,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    guidance_scale: Annotated[
        float,
        typer.Option(help="How closely pictures follow the prompt; 1 as trained.", rich_help_panel=DRAWING),
    ] = 3.0,
    temperature: Annotated[
        float, typer.Option(help="Of the draws; 0 takes the likeliest codes.", rich_help_panel=DRAWING)
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw among that many codes; 0 for all.", rich_help_panel=DRAWING)
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest of this share.", rich_help_panel=DRAWING)
    ] = 1.0,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Score the pictures of this folder instead of drawing.",
            show_default=False,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures to compare with: Fréchet distance by --inception, else by SigLIP.",
            show_default=False,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    judged: Annotated[
        Path | None,
        typer.Option(
            help="What the judge of geneval or genai_bench found.",
            show_default=False,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a CLIP, or of a SigLIP: brings CLIP scores.",
            show_default=False,
            rich_help_panel=DRAWING,
        ),
    ] = None,
) -> None:
    """Measure a visual tokenizer or a model, or score answers and pictures of any other (docs/evaluation.md).

    Killed, the same command goes on.

    Example: [bold]dualtoken evaluate pope mme --model models/mine --data /data/benchmarks[/]
    """
    from dualtoken.perceptual import PerceptualConfig
    from eval.generation.drawing import DrawingSettings
    from eval.inputs import EvaluationPaths
    from eval.tasks import Evaluation
    from launchers.evaluate import run_command

    named = any(one is not None for one in (model, visual_tokenizer, siglip, data, answers, grades, pictures))
    paths = EvaluationPaths.from_run(
        run,
        siglip=siglip,
        visual_tokenizer=visual_tokenizer,
        model=model,
        vision_tower=vision_tower,
        output=output or (Path("evaluation") if named else None),
    )
    asked = Evaluation(
        paths,
        say,
        data=data,
        count=count,
        seed=seed,
        batch_size=batch_size,
        answers=answers,
        allow_missing=allow_missing,
        grades=grades,
        by=by.value,
        max_new_tokens=max_new_tokens,
        template=template and template.value,
        precision=precision.value,
        fit=fit.value,
        lpips=PerceptualConfig("vgg", lpips) if lpips else None,
        inception=inception,
        saved=saved_as.value,
        class_names=class_names,
        language=language,
        drawing=DrawingSettings(per_prompt, guidance_scale, temperature, top_k, top_p, seed),
        pictures=pictures,
        reference=reference,
        judged=judged,
        clip=clip,
    )
    run_command([task.value for task in tasks or []], asked, ranks)
