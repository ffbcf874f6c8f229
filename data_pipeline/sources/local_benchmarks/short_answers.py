"""Facts as benchmarks that are answered in a word, each in the files that its authors give out."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.sources.local_benchmarks.facts import CORNERS, Fact, draw_facts
from data_pipeline.sources.local_benchmarks.files import (
    write_json,
    write_json_lines,
    write_picture,
    write_text,
)
from data_pipeline.sources.local_benchmarks.scenes import Drawings, Scene

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # as LLaVA's question files end
VOTES = 10

# Kind of fact -> types of the question, its answer, and the question of yes or no.
VQA_TYPES = {
    "name": ("what is", "other", "is there a"),
    "colour": ("what color is the", "other", "is"),
    "count": ("how many", "number", "is the"),
    "corner": ("where is the", "other", "is the"),
}
MME_CATEGORIES = {
    "name": "existence",
    "count": "count",
    "side": "position",
    "colour": "color",
    "text": "OCR",
    "sum": "numerical_calculation",
    "meaning": "text_translation",
}


def write_vqav2(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """VQAv2: questions, annotations with ten answers, and COCO's names of pictures."""
    questions, annotations = [], []
    number = 0
    for kind, (question_type, answer_type, claim_type) in VQA_TYPES.items():
        for fact in draw_facts(kind, drawings, draw, 10):
            number += 1
            write_picture(folder / "val2014" / _coco_name(number), fact.scene, "JPEG")
            true = number % 2 == 0
            claimed = fact.claimed(fact.answer if true else fact.wrong[0])
            asked = [
                (fact.question, _votes(fact), question_type, answer_type),
                (claimed, ["yes" if true else "no"] * VOTES, claim_type, "yes/no"),
            ]
            for place, (text, answers, type_of_question, type_of_answer) in enumerate(asked):
                ids = {"image_id": number, "question_id": 1000 * number + place}
                questions.append({**ids, "question": text})
                annotations.append(
                    {
                        **ids,
                        "question_type": type_of_question,
                        "answer_type": type_of_answer,
                        "multiple_choice_answer": answers[0],
                        "answers": [
                            {"answer": answer, "answer_confidence": "yes", "answer_id": vote}
                            for vote, answer in enumerate(answers, 1)
                        ],
                    }
                )
    about = {"info": {}, "license": {}, "data_subtype": "val2014", "data_type": "mscoco"}
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**about, "task_type": "Open-Ended", "questions": questions},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**about, "annotations": annotations})
    return len(questions)


def write_textvqa(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """TextVQA as LLaVA has it; no text recognition was run, so its lists of recognised words are empty."""
    rows, data = [], []
    facts = [*draw_facts("text", drawings, draw, 20), *draw_facts("text beside", drawings, draw, 10)]
    for number, fact in enumerate(facts):
        name = f"{number:016x}"
        write_picture(folder / "train_images" / f"{name}.jpg", fact.scene, "JPEG")
        text = f"{fact.question}\nReference OCR token: {SHORT_ANSWER}"
        rows.append({"question_id": name, "image": f"{name}.jpg", "text": text, "category": "default"})
        width, height = fact.scene.image().size
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


def write_pope(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """POPE: three drawings a picture; asked of each, and of as many absent ones, chosen in three ways."""
    scenes = []
    for thing in draw.sample(drawings.things, min(6, len(drawings.things))):
        things = [thing, *drawings.others([thing], draw)[:2]]
        scenes.append(Scene(things, draw.sample(list(CORNERS.values()), len(things))))
    for number, scene in enumerate(scenes, 1):
        write_picture(folder / "val2014" / _coco_name(number), scene, "JPEG")
    often = Counter(thing.key for scene in scenes for thing in scene.things)
    asked = 0
    for category in ("random", "popular", "adversarial"):
        rows: list[dict[str, Any]] = []
        for number, scene in enumerate(scenes, 1):
            absent = drawings.others(scene.things, draw)
            kinds = {thing.kind for thing in scene.things} - {None}
            if category == "popular":
                absent.sort(key=lambda thing: -often[thing.key])
            elif category == "adversarial":  # of the kinds that are there
                absent.sort(key=lambda thing: thing.kind not in kinds)
            for yes, no in zip(scene.things, absent, strict=False):
                for thing, label in ((yes, "yes"), (no, "no")):
                    text = f'Is there a drawing of "{thing.name}" in the image?'
                    row = {"question_id": len(rows) + 1, "image": _coco_name(number), "text": text}
                    rows.append({**row, "label": label})
        write_json_lines(folder / f"coco_pope_{category}.json", rows)
        asked += len(rows)
    return asked


def write_mme(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """MME: a folder for each category, two questions a picture, the answer to one of them is Yes."""
    asked = 0
    for kind, category in MME_CATEGORIES.items():
        for number, fact in enumerate(draw_facts(kind, drawings, draw, 10), 1):
            write_picture(folder / category / f"{number:04d}.jpg", fact.scene, "JPEG")
            lines = [
                f"{fact.claimed(answer)} Please answer yes or no.\t{label}"
                for answer, label in ((fact.answer, "Yes"), (fact.wrong[0], "No"))
            ]
            write_text(folder / category / f"{number:04d}.txt", "\n".join(lines) + "\n")
            asked += len(lines)
    return asked


def _coco_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def _votes(fact: Fact) -> list[str]:
    """Ten answers: the true one, and a name's other languages once each."""
    names = fact.scene.things[0].names.values() if fact.kind == "name" else ()
    others = [name for name in names if name != fact.answer][: VOTES // 2]
    return [fact.answer] * (VOTES - len(others)) + others
