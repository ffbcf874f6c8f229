"""The inputs' ablation: recipes with nothing changed but what the model reads of a picture.

The paper (arXiv 2503.14324, section 4) puts its tokens into LLaVA-1.5's framework and compares them with
SigLIP's continuous features. Beside these two stand one codebook alone, a codebook of a tokenizer that reads
one layer, and a dual encoder: codes of pixels with SigLIP's features behind them, twice the positions. All
inputs learn from the same documents in the same order; what they cost stands beside what they score.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.results import read_json
from launchers.ablate import Ablation, ablate
from launchers.bars import plot_bars
from launchers.errors import UserError
from launchers.input_codes import codes_folder, make_codes, with_tokenizers
from launchers.input_scores import claims, headlines, measure_scores, scores
from launchers.inputs import Asked, Input, check, code_entries, common_words, recipe_of
from launchers.variants import Figure, Variant, train_all

COSTS = (
    Figure("positions", "positions a picture", 1.0, 0),
    Figure("tokens", "tokens a document", 1.0, 1),
    Figure("parameters", "parameters, M", 1e-6, 2),
    Figure("tower_parameters", "of what sees, M", 1e-6, 2),
    Figure("flops", "GFLOPs a document", 1e-9, 2),
    Figure("tower_flops", "GFLOPs to see a picture", 1e-9, 3),
    Figure("documents_per_second", "documents/s", 1.0, 1),
    Figure("tokens_per_second", "tokens/s", 1.0, 0),
)
PICTURED = ("positions", "tokens", "flops", "documents_per_second")
PLOT = "ablation.png"


def compare_inputs(
    asked: Asked, output: Path, seeds: int, ranks: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Make what is missing, train every input with every seed, write the table and the bars.

    Whatever is done is not repeated: tokenizers and codes lie in `output`, trainings as `ablate` leaves them,
    those of recipes before the last one in folders of the recipes' names.

    Args:
        asked: what is compared, on what.
        output: folder for everything that is made.
        seeds: trainings of each input.
        ranks: processes of a job.
        say: called with each line for the user.

    Returns:
        the rows of the table.

    Raises:
        UserError: something is missing or failed, or inputs did not learn from the same documents.
    """
    check(asked)
    asked = with_tokenizers(asked, output, ranks, say)
    make_codes(asked, output, ranks, say)
    stages = [stage(asked, place, output) for place in range(len(asked.recipes))]
    for place, before in enumerate(stages[:-1]):
        say(f"recipe {place + 1} of {len(stages)}: {before.recipe}")
        train_all(before, output / before.recipe, seeds, ranks, say)
    rows = ablate(stages[-1], output, seeds, ranks, say)
    require_same_documents(asked, stages[-1].kind, output, seeds)
    pictured = [*headlines(asked), *(one for one in COSTS if one.key in PICTURED)]
    plot_bars([row for row in rows if row["name"] != "chance"], pictured, output / PLOT)
    say(f"written: {output / PLOT}")
    return rows


def stage(asked: Asked, place: int, output: Path) -> Ablation:
    """The trainings of one recipe; only those of the last are measured."""
    from data_pipeline.shards.code_shards import DatasetManifest

    config, recipe = recipe_of(asked, place), asked.recipes[place]
    common = common_words(asked, place)
    is_last = place + 1 == len(asked.recipes)
    chosen = asked.chosen()

    def settings(folder: Path, seed: int) -> list[str]:
        words = [*common, f"run_dir={folder}", f"seed={seed}"]
        if place:
            before = output / asked.recipes[place - 1] / folder.name / "export"
            words += [f"model.init_from={before}", f"model.text_tokenizer={before}"]
        return words

    def variant(one: Input) -> Variant:
        codes = codes_folder(output, one.tokenizer, place)
        words = [f"model.visual_tokenizer={asked.tokenizers[one.tokenizer]}"]
        words += [f"data.blend.{entry}.path={codes}" for entry in code_entries(config)]
        if place == 0:
            words.append(f"model.heads.visual_input={one.visual_input}")
        if one.reads_features:
            words += [f"model.vision_tower={asked.siglip}"] if place == 0 else []
            words.append(f"frozen={json.dumps([*config.frozen, 'vision_tower.*'])}")
        made_from = {"codes": DatasetManifest.load(codes).fingerprint}
        return Variant(one.name, one.meaning, tuple(words), made_from=made_from)

    by_name = {one.name: one for one in chosen}

    def measure(folder: Path) -> dict[str, float]:
        from launchers.input_costs import measure_costs

        if not is_last:
            return {}
        one = by_name[folder.name.rpartition("-seed")[0]]
        return {**measure_costs(folder), **measure_scores(asked, one, folder, output)}

    return Ablation(
        recipe=recipe,
        variants=[variant(one) for one in chosen],
        figures=[*scores(asked), *COSTS],
        orderings=claims(asked),
        steps=config.steps,
        settings=settings,
        measure=measure,
        chance="by chance (of answers: the commonest)",
    )


def require_same_documents(asked: Asked, kind: str, output: Path, seeds: int) -> None:
    """Raise UserError unless all inputs of a seed began with the same documents in the same order."""
    for seed in range(seeds):
        digests = {}
        for one in asked.chosen():
            figures = read_json(output / f"{one.name}-seed{seed}" / f"{kind}.json") or {}
            digests[one.name] = figures["documents_digest"]
        if len(set(digests.values())) > 1:
            raise UserError(
                f"the inputs of seed {seed} did not learn from the same documents: set "
                "data.documents_per_pack, and data.context_length so high that none is split or left out "
                f"({', '.join(f'{name} {digest:.0f}' for name, digest in digests.items())})"
            )
