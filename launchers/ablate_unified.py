"""The unified model's ablation: what it reads of a picture, one codebook or both (arXiv 2503.14324).

The paper finds for understanding that semantic codes alone are good, that both are better, and that pixel
codes alone are worst; for drawing, that both are better than pixel codes alone. Whatever a model reads here,
it writes both codebooks, and its pictures are decoded from the pixel codes it writes.
"""

import statistics
from pathlib import Path
from typing import Any

from launchers.ablate import Ablation, Ordering
from launchers.errors import UserError
from launchers.variants import Figure, Variant

RECIPE = "quickstart_mllm"
QUESTIONS = {"what": "what", "colour": "colour", "count": "count", "where": "where", "yes/no": "yes_no"}
DRAWN = {"all": "all right", "object": "things", "colour": "colours", "position": "places"}

VARIANTS = (
    Variant("semantic", "semantic codes alone", ("model.heads.visual_input=semantic",)),
    Variant("pixel", "pixel codes alone", ("model.heads.visual_input=pixel",)),
    Variant("both", "both", ("model.heads.visual_input=both",)),
)


def _share(key: str, title: str) -> Figure:
    return Figure(key, f"{title}, %", 100.0, 1, f"chance_{key}")


UNDERSTANDING = (
    *(_share(f"answer_{key}", f"answers: {kind}") for kind, key in QUESTIONS.items()),
    _share("answers", "answers: mean"),
    _share("captions", "captions: all right"),
)
FIGURES = (
    *UNDERSTANDING,
    *(_share(f"drawn_{part}", f"drawn: {title}") for part, title in DRAWN.items()),
)

ORDERINGS = (
    Ordering("semantic", "pixel", "answers", "understanding: semantic above pixel"),
    Ordering("both", "semantic", "answers", "understanding: both above semantic"),
    Ordering("both", "semantic", "drawn_all", "generation: both above semantic"),
    Ordering("both", "pixel", "drawn_all", "generation: both above pixel"),
)


def unified_ablation(run: Path, steps: int | None = None) -> Ablation:
    """The unified model with either codebook or both as its input, on a quickstart's codes and sample data.

    Args:
        run: folder of a quickstart with sample data, visual tokenizer and codes.
        steps: optimizer steps of each training; None for the recipe's.

    Raises:
        UserError: one of these is missing.
    """
    from data_pipeline.shards.code_shards import DatasetManifest
    from eval.inputs import EvaluationPaths
    from launchers.quickstart import relocated_settings
    from pretrain.config import find_recipe, load_recipe

    paths = EvaluationPaths.from_run(run)
    for what, path in (
        ("sample data", paths.sample_data / "summary.json"),
        ("visual tokenizer", paths.visual_tokenizer / "config.json"),
        ("codes", paths.seen_codes / "dataset.json"),
        ("codes", paths.held_out_codes / "dataset.json"),
    ):
        if not path.is_file():
            raise UserError(f"no {what} in {path.parent}: run `dualtoken quickstart` first or give --run")
    budget = int(load_recipe(find_recipe(RECIPE)).steps) if steps is None else steps
    inputs = relocated_settings(RECIPE, run)

    def settings(folder: Path, seed: int) -> list[str]:
        return [
            f"recipe={RECIPE}",
            f"run_dir={folder}",
            *inputs,
            "wandb.mode=disabled",
            f"steps={budget}",
            "validate_every=0",
            "checkpoint_every=0",
            f"seed={seed}",
        ]

    return Ablation(
        recipe=RECIPE,
        variants=VARIANTS,
        figures=FIGURES,
        orderings=ORDERINGS,
        steps=budget,
        settings=settings,
        measure=lambda folder: measure(run, folder),
        chance="by chance (of answers: the commonest)",
        made_from={"codes of the visual tokenizer": DatasetManifest.load(paths.seen_codes).fingerprint},
    )


def measure(run: Path, folder: Path, count: int | None = None) -> dict[str, float]:
    """Figures of the unified model trained in a folder; pictures and `scenes.json` go to its `evaluation`.

    Args:
        run: folder of the quickstart it was trained on.
        folder: of the training.
        count: scenes of each split at most; None for the measure's own number.
    """
    from eval.inputs import EvaluationPaths
    from eval.scenes.measure import run as measure_scenes

    paths = EvaluationPaths.from_run(run, model=folder / "export", output=folder / "evaluation")
    return figures_of(measure_scenes(paths, count))


def figures_of(scenes: dict[str, Any]) -> dict[str, float]:
    """What tables show of a `scenes.json`: shares of held-out scenes, and what guessing gives.

    Of drawing nothing where that was not measured.

    The chance of an answer is the share of the commonest one; that of a caption or picture is how often the
    same ones are right of other scenes. Captions are averaged over languages.
    """
    split = scenes["splits"]["held_out"]
    kinds, drawn, captions = split["answers"]["kinds"], split.get("drawn"), split["captions"].values()
    found = {}
    for prefix, answered, judged in (("", "accuracy", "shares"), ("chance_", "majority", "chance")):
        answers = {key: kinds[kind][answered] for kind, key in QUESTIONS.items()}
        found |= {f"{prefix}answer_{key}": share for key, share in answers.items()}
        found[f"{prefix}answers"] = statistics.mean(answers.values())
        found[f"{prefix}captions"] = statistics.mean(one[judged]["all"] for one in captions)
        if drawn is not None:
            found |= {f"{prefix}drawn_{part}": drawn[judged][part] for part in DRAWN}
    return found
