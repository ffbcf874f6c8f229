"""What a comparison of inputs measures, the quickstart's scenes and benchmarks, and what is claimed of it."""

from pathlib import Path

from eval.results import RESULTS_FILE, read_json
from launchers import processes
from launchers.ablate import Ordering
from launchers.ablate_unified import UNDERSTANDING, figures_of
from launchers.errors import UserError
from launchers.input_codes import codes_folder
from launchers.inputs import SCENES, Asked, Input
from launchers.variants import Figure

CLAIMS = (
    ("dual", "semantic", "both codebooks above semantic codes alone"),
    ("dual", "in-layer", "two codebooks on two layers above one on one layer"),
    ("dual", "continuous", "codes of both codebooks above SigLIP's features"),
    ("dual", "dual-encoder", "codes of both codebooks above codes and features, at half of the positions"),
)


def scores(asked: Asked) -> list[Figure]:
    """Columns of what is measured."""
    from eval.understanding.registry import BENCHMARKS

    found = list(UNDERSTANDING) if SCENES in asked.tasks else []
    for task in asked.tasks:
        if task != SCENES:
            benchmark = BENCHMARKS[task]
            unit = f", {benchmark.unit}" if benchmark.unit else ""
            chance = f"chance_{task}" if benchmark.chance else ""
            found.append(Figure(task, f"{benchmark.title}{unit}", 1.0, 1, chance))
    return found


def headlines(asked: Asked) -> list[Figure]:
    """Of these columns the ones that sum the others up."""
    return [one for one in scores(asked) if one.key in ("answers", "captions", *asked.tasks)]


def claims(asked: Asked) -> list[Ordering]:
    """What the paper claims of these inputs, and what follows for the dual encoder."""
    names = {one.name for one in asked.chosen()}
    return [
        Ordering(above, below, figure.key, f"{figure.title.partition(',')[0]}: {claim}")
        for figure in headlines(asked)
        for above, below, claim in CLAIMS
        if {above, below} <= names
    ]


def measure_scores(asked: Asked, one: Input, folder: Path, output: Path) -> dict[str, float]:
    """Scores of the model trained in a folder; whatever tasks write goes to its `evaluation`.

    Raises:
        UserError: a benchmark's task failed.
    """
    from eval.inputs import EvaluationPaths
    from eval.scenes.measure import run as measure_scenes

    found: dict[str, float] = {}
    evaluation, tokenizer = folder / "evaluation", asked.tokenizers[one.tokenizer]
    if SCENES in asked.tasks and asked.run is not None:
        paths = EvaluationPaths.from_run(
            asked.run,
            siglip=asked.siglip,
            visual_tokenizer=tokenizer,
            model=folder / "export",
            seen_codes=codes_folder(output, one.tokenizer, 0),
            held_out_codes=codes_folder(output, one.tokenizer, "held_out"),
            output=evaluation,
        )
        found |= figures_of(measure_scenes(paths, measured=("answers", "captions")))
    benchmarks = [task for task in asked.tasks if task != SCENES]
    if benchmarks:
        command = ["dualtoken", "evaluate", *benchmarks, "--model", str(folder / "export")]
        command += ["--visual-tokenizer", str(tokenizer), "--siglip", str(asked.siglip)]
        command += ["--data", str(asked.benchmarks), "--output", str(evaluation)]
        if processes.run(command).returncode:
            raise UserError(f"the evaluation of {folder} failed; see above, then start this again")
        content = read_json(evaluation / RESULTS_FILE) or {"tasks": {}}
        for task in benchmarks:
            result = content["tasks"][task]
            found[task] = result["value"]
            if result["chance"] is not None:
                found[f"chance_{task}"] = result["chance"]
    return found
