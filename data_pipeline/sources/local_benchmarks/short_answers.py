"""Facts as benchmarks that are answered in a word, each in the files that its authors give out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.sources.local_benchmarks.files import (
    write_json,
    write_json_lines,
    write_picture,
    write_text,
)
from data_pipeline.sources.local_benchmarks.held_out import HeldOutScenes
from data_pipeline.sources.local_benchmarks.material import Material
from data_pipeline.sources.scenes.parts import Scene
from data_pipeline.sources.scenes.questions import IN_A_WORD, absent_things, is_there

VOTES = 10
VQA_EACH, MME_EACH = 15, 10  # pictures of each kind, with two questions to each
# Pictures by what is held out of them and by shape; about each thing in one POPE asks twice, MME about one.
POPE_SCENES = {("pair", "pair"): 18, ("colour", "single"): 8, ("number", "several"): 8}
MME_EXISTENCE = {("pair", "pair"): 6, ("colour", "single"): 2, ("number", "several"): 2}

# Kind of fact -> type of its answer; types of questions are what they begin with.
VQA_ANSWER_TYPES = {"what": "other", "colour": "other", "count": "number", "where": "other"}
VQA_QUESTION_TYPES = (
    *("what color is the", "what color are the", "what is", "how many", "where is the"),
    *("is there a", "is the", "are the"),
)
MME_CATEGORIES = {
    "count": "count",
    "where": "position",
    "colour": "color",
    "text": "OCR",
    "sum": "numerical_calculation",
    "meaning": "text_translation",
}


def write_vqav2(material: Material, folder: Path, draw: random.Random) -> int:
    """VQAv2: questions, annotations with ten answers, and COCO's names of pictures."""
    questions, annotations = [], []
    number = 0
    for kind, answer_type in VQA_ANSWER_TYPES.items():
        for shown in material.facts(kind, draw, VQA_EACH):
            fact = shown.fact
            number += 1
            write_picture(folder / "val2014" / _coco_name(number), shown.picture, "JPEG")
            true = number % 2 == 0
            claimed = fact.claimed(fact.answer if true else draw.choice(fact.others))
            asked = [(fact.question, fact.answer, answer_type), (claimed, "yes" if true else "no", "yes/no")]
            for place, (text, answer, type_of_answer) in enumerate(asked):
                ids = {"image_id": number, "question_id": 1000 * number + place}
                questions.append({**ids, "question": text})
                annotations.append(
                    {
                        **ids,
                        "question_type": _question_type(text),
                        "answer_type": type_of_answer,
                        "multiple_choice_answer": answer,
                        "answers": [
                            {"answer": answer, "answer_confidence": "yes", "answer_id": vote}
                            for vote in range(1, 1 + VOTES)
                        ],
                    }
                )
    if not questions:
        return 0
    about = {"info": {}, "license": {}, "data_subtype": "val2014", "data_type": "mscoco"}
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**about, "task_type": "Open-Ended", "questions": questions},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**about, "annotations": annotations})
    return len(questions)


def write_textvqa(material: Material, folder: Path, draw: random.Random) -> int:
    """TextVQA as LLaVA has it; no text recognition was run, so its lists of recognised words are empty."""
    rows, data = [], []
    facts = [*material.facts("text", draw, 20), *material.facts("text beside", draw, 10)]
    for number, shown in enumerate(facts):
        fact = shown.fact
        name = f"{number:016x}"
        write_picture(folder / "train_images" / f"{name}.jpg", shown.picture, "JPEG")
        text = f"{fact.question}\nReference OCR token: {IN_A_WORD}"
        rows.append({"question_id": name, "image": f"{name}.jpg", "text": text, "category": "default"})
        width, height = shown.picture.size
        data.append(
            {
                "question": fact.question,
                "image_id": name,
                "image_width": width,
                "image_height": height,
                "answers": [fact.answer.lower()] * VOTES,
                "question_tokens": fact.question.lower().rstrip("?").split(),
                "question_id": number,
                "set_name": "val",
            }
        )
    write_json_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", {**about, "data": data})
    return len(rows)


def write_pope(material: Material, folder: Path, draw: random.Random) -> int:
    """POPE: asked of each thing that is there, and of as many absent ones, chosen in three ways."""
    if material.scenes is None:
        return 0
    scenes = _scenes_to_name(material.scenes, draw, POPE_SCENES)
    for number, scene in enumerate(scenes, 1):
        write_picture(folder / "val2014" / _coco_name(number), material.picture(scene), "JPEG")
    trained = material.scenes.absent
    ranks: dict[str, Callable[[str, str], float]] = {
        "random": lambda present, absent: 0,
        "popular": lambda present, absent: trained.often[absent],
        "adversarial": lambda present, absent: trained.together[present, absent],
    }
    asked = 0
    for category, rank in ranks.items():
        rows: list[dict[str, Any]] = []
        for number, scene in enumerate(scenes, 1):
            absent = list(absent_things(scene))
            draw.shuffle(absent)
            for item in scene.items:
                no = max(absent, key=partial(rank, item.thing))
                absent.remove(no)
                for thing, label in ((item.thing, "yes"), (no, "no")):
                    row = {"question_id": len(rows) + 1, "image": _coco_name(number), "text": is_there(thing)}
                    rows.append({**row, "label": label})
        write_json_lines(folder / f"coco_pope_{category}.json", rows)
        asked += len(rows)
    return asked


def write_mme(material: Material, folder: Path, draw: random.Random) -> int:
    """MME: a folder for each category, two questions a picture, the answer to one of them is Yes."""
    asked = 0
    for category, of_it in _mme_questions(material, draw).items():
        for number, (picture, yes, no) in enumerate(of_it, 1):
            write_picture(folder / category / f"{number:04d}.jpg", picture, "JPEG")
            lines = [
                f"{text} Please answer yes or no.\t{label}\n" for text, label in ((yes, "Yes"), (no, "No"))
            ]
            write_text(folder / category / f"{number:04d}.txt", "".join(lines))
            asked += len(lines)
    return asked


def _mme_questions(material: Material, draw: random.Random) -> dict[str, list[tuple[Image.Image, str, str]]]:
    """By category: pictures, a question to be answered by yes and one to be answered by no."""
    found: dict[str, list[tuple[Image.Image, str, str]]] = {}
    if material.scenes is not None:
        found["existence"] = [
            (
                material.picture(scene),
                is_there(draw.choice(scene.items).thing),
                is_there(draw.choice(absent_things(scene))),
            )
            for scene in _scenes_to_name(material.scenes, draw, MME_EXISTENCE)
        ]
    for kind, category in MME_CATEGORIES.items():
        found[category] = [
            (
                shown.picture,
                shown.fact.claimed(shown.fact.answer),
                shown.fact.claimed(draw.choice(shown.fact.others)),
            )
            for shown in material.facts(kind, draw, MME_EACH)
        ]
    return found


def _scenes_to_name(
    held_out: HeldOutScenes, draw: random.Random, counts: Mapping[tuple[str, str], int]
) -> list[Scene]:
    """Scenes whose things are asked of, so many of each kind of combination and shape."""
    return [scene for about, count in counts.items() for scene in held_out.scenes(*about, draw, count)]


def _coco_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def _question_type(question: str) -> str:
    return next(start for start in VQA_QUESTION_TYPES if question.lower().startswith(start))
