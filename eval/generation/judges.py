"""Aggregating what judges found that run elsewhere: GenEval's detector, GenAI-Bench's VQAScore."""

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

from dualtoken.plain_tensors import read_plain
from eval.benchmark_files import BenchmarkError, field_of, read_json_file, read_json_lines
from eval.generation.findings import Finding, mean
from eval.generation.prompts import GENAI_BENCH, Prompt

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation", "basic")
ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal", "advanced")


def judge_geneval(path: Path) -> Finding:
    """Read the results of GenEval's `evaluate_images.py`: the overall score is the mean of six accuracies.

    Args:
        path: JSONL, a line for each picture: `filename`, `tag`, `correct`, and of use `reason`.

    Returns:
        percents; no overall score where a tag has no picture.

    Raises:
        BenchmarkError: a line does not fit, or names a picture twice; the message names it.
    """
    correct: dict[str, list[bool]] = {tag: [] for tag in GENEVAL_TAGS}
    prompts: dict[str, list[bool]] = {}
    scores: dict[str, float] = {}
    remarks: dict[str, str] = {}
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        tag, right = field_of(row, "tag", str, where), field_of(row, "correct", bool, where)
        if tag not in correct:
            raise BenchmarkError(f"{where}: tag is {tag!r}; expected one of {', '.join(GENEVAL_TAGS)}")
        place = "/".join(PurePosixPath(field_of(row, "filename", str, where)).parts[-3:])
        if place in scores:
            raise BenchmarkError(f"{where}: {place} was judged before; keep one line for each picture")
        correct[tag].append(right)
        prompts.setdefault(place.split("/")[0], []).append(right)
        scores[place] = float(right)
        remarks[place] = f"judge: {row.get('reason') or ('correct' if right else 'not correct')}"
    if not scores:
        raise BenchmarkError(f"{path} has no lines; expected the results of GenEval's evaluate_images.py")
    accuracy = {tag: 100 * sum(found) / len(found) for tag, found in correct.items() if found}
    missing = [tag for tag in GENEVAL_TAGS if tag not in accuracy]
    overall = None if missing else mean(list(accuracy.values()))
    solved = [any(found) for found in prompts.values()]
    return Finding(
        headline="overall",
        value=overall,
        unit="%",
        figures={
            "overall": overall,
            "correct pictures": 100 * sum(scores.values()) / len(scores),
            "prompts with a correct picture": 100 * sum(solved) / len(solved),
        },
        tables={
            "by tag": [
                {"tag": tag, "accuracy": accuracy.get(tag), "pictures": len(found)}
                for tag, found in correct.items()
            ]
        },
        scores=scores,
        remarks=remarks,
        notes=[f"no picture of {', '.join(missing)}, so no mean of all six tags"] if missing else [],
        settings={"judged": str(path), "judged_pictures": len(scores)},
    )


def judge_genai_bench(path: Path, prompts: Sequence[Prompt], skills: Path) -> Finding:
    """Average VQAScores by skill, as GenAI-Bench's `evaluate.py` does.

    Args:
        path: JSON, scores by prompt number (`{"00001": 0.8}`) or a list in the order of the prompts; or the
            `.pt` that `evaluate.py` leaves, a tensor [N, ...] in that order.
        prompts: all of `genai_image.json`.
        skills: `genai_skills.json`, prompt numbers by tag.

    Returns:
        means in [0, 1]; `all` is over the prompts that have a tag, as there.

    Raises:
        BenchmarkError: scores, prompts and skills do not fit together.
    """
    scores = _vqa_scores(path, [prompt.key for prompt in prompts])
    known = {prompt.key for prompt in prompts}
    tags = read_json_file(skills)
    if not isinstance(tags, dict):
        raise BenchmarkError(f"{skills} holds a {type(tags).__name__}; expected prompt numbers by tag")
    by_tag: dict[str, list[str]] = {}
    for tag in tags:
        keys = [f"{number:05d}" for number in field_of(tags, tag, list, str(skills))]
        if strange := [key for key in keys if key not in known]:
            raise BenchmarkError(f"{skills}: tag {tag!r} has prompt {strange[0]}, which the prompts lack")
        by_tag[tag] = [key for key in keys if key in scores]
    by_tag["all"] = sorted({key for keys in by_tag.values() for key in keys})
    means = {tag: mean([scores[key] for key in keys]) for tag, keys in by_tag.items()}
    unscored = len(prompts) - len(scores)
    places = {prompt.key: GENAI_BENCH.place(prompt, 0) for prompt in prompts}
    return Finding(
        headline="VQAScore, advanced",
        value=means.get("advanced"),
        figures={f"VQAScore, {name}": means.get(name) for name in ("basic", "advanced", "all")},
        tables={
            title: [
                {"skill": tag, "VQAScore": means.get(tag), "prompts": len(by_tag.get(tag, ()))}
                for tag in names
            ]
            for title, names in (("basic skills", BASIC), ("advanced skills", ADVANCED))
        },
        scores={places[key]: score for key, score in scores.items()},
        remarks={places[key]: f"VQAScore: {score:.2f}" for key, score in scores.items()},
        notes=[f"{unscored} of {len(prompts)} prompts have no score and are left out"] if unscored else [],
        settings={"judged": str(path), "judged_pictures": len(scores)},
    )


def _vqa_scores(path: Path, keys: Sequence[str]) -> dict[str, float]:
    content = read_plain(path) if path.suffix == ".pt" else read_json_file(path)
    if isinstance(content, torch.Tensor) and content.ndim:
        content = (
            content.reshape(len(content), -1).float().mean(dim=1).tolist() if content.ndim else [content]
        )
    if isinstance(content, list):
        if len(content) != len(keys):
            raise BenchmarkError(f"{path} has {len(content)} scores, and there are {len(keys)} prompts")
        content = dict(zip(keys, content, strict=True))
    if not isinstance(content, dict) or not content:
        raise BenchmarkError(f"{path}: got {content!r:.40}; expected scores by prompt number, or a list")
    known = set(keys)
    for key, score in content.items():
        if key not in known:
            raise BenchmarkError(f"{path}: a score of {key!r}; expected numbers from {keys[0]} to {keys[-1]}")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise BenchmarkError(f"{path}: the score of {key} is {score!r:.40}; expected a number")
    return {key: float(score) for key, score in content.items()}
