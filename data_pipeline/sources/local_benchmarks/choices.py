"""Facts as benchmarks with options or free answers, each in the files that its authors give out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from data_pipeline.sources.local_benchmarks.files import (
    in_base64,
    write_json,
    write_json_lines,
    write_picture,
    write_table,
)
from data_pipeline.sources.local_benchmarks.material import Material
from data_pipeline.sources.scenes.questions import LETTERS

# Kind of fact -> how the benchmarks call it.
SEED_TYPES = {
    "what": ("Instance Identity", 2),
    "colour": ("Instance Attributes", 3),
    "place": ("Instance Location", 4),
    "count": ("Instances Counting", 5),
    "side": ("Spatial Relation", 6),
    "text": ("Text Understanding", 9),
}
SEED_NAMES = (
    *("Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location"),
    *("Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning"),
    *("Text Understanding", "Action Recognition", "Action Prediction", "Procedure Understanding"),
)
MMBENCH_CATEGORIES = {
    "what": ("image_topic", "coarse_perception"),
    "colour": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "text": ("ocr", "finegrained_perception (instance-level)"),
    "side": ("spatial_relationship", "finegrained_perception (cross-instance)"),
}
MMBENCH_ROTATION = 1_000_000  # between the rows of a question
SEED_EACH, MMBENCH_EACH, MMVET_EACH, AI2D_QUESTIONS = 10, 8, 4, 30  # questions, of each kind
MMVET_CAPABILITIES = {
    "what": ["rec"],
    "colour": ["rec"],
    "count": ["rec"],
    "where": ["rec", "spat"],
    "text": ["ocr"],
    "sum": ["ocr", "math"],
    "meaning": ["ocr", "know"],
}


def write_seed(material: Material, folder: Path, draw: random.Random) -> int:
    """SEED-Bench, image part: one file of questions, pictures without an extension."""
    questions: list[dict[str, Any]] = []
    for kind, (_, type_id) in SEED_TYPES.items():
        for shown in material.facts(kind, draw, SEED_EACH):
            options, place = shown.fact.options(draw)
            number = str(len(questions) + 1)
            write_picture(folder / "SEED-Bench-image" / f"{number}_1", shown.picture, "JPEG")
            questions.append(
                {
                    "answer": LETTERS[place],
                    **{
                        f"choice_{letter.lower()}": text
                        for letter, text in zip(LETTERS, options, strict=True)
                    },
                    "data_id": f"{number}_1",
                    "data_type": "image",
                    "question": shown.fact.question,
                    "question_id": number,
                    "question_type_id": type_id,
                }
            )
    types = {name: number for number, name in enumerate(SEED_NAMES, 1)}
    write_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})
    return len(questions)


def write_mmbench(material: Material, folder: Path, draw: random.Random) -> int:
    """MMBench dev: a table with pictures in base64, each question once for each rotation of its options."""
    rows: list[dict[str, Any]] = []
    asked = 0
    for kind, (category, above) in MMBENCH_CATEGORIES.items():
        for shown in material.facts(kind, draw, MMBENCH_EACH):
            options, place = shown.fact.options(draw)
            image = in_base64(shown.picture)
            for turn in range(len(options)):
                turned = options[turn:] + options[:turn]
                rows.append(
                    {
                        "index": asked + turn * MMBENCH_ROTATION,
                        "question": shown.fact.question,
                        "hint": "",
                        **dict(zip(LETTERS, turned, strict=True)),
                        "answer": LETTERS[(place - turn) % len(options)],
                        "category": category,
                        "image": image,
                        "source": "openmoji",
                        "l2-category": above,
                        "comment": "",
                        "split": "dev",
                    }
                )
            asked += 1
    write_table(folder / "mmbench_dev_local.tsv", sorted(rows, key=lambda row: row["index"]))
    return asked


def write_mmvet(material: Material, folder: Path, draw: random.Random) -> int:
    """MM-Vet: questions with capabilities, and LLaVA's file of the same; grades come from elsewhere."""
    entries: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for kind, capability in MMVET_CAPABILITIES.items():
        for shown in material.facts(kind, draw, MMVET_EACH):
            number = len(rows)
            name = f"v1_{number}"
            write_picture(folder / "images" / f"{name}.png", shown.picture, "PNG")
            entries[name] = {
                "imagename": f"{name}.png",
                "question": shown.fact.question,
                "answer": shown.fact.answer,
                "capability": capability,
                "imagesource": "OpenMoji",
            }
            row = {
                "image": f"{name}.png",
                "text": shown.fact.question,
                "category": "conv",
                "question_id": number,
            }
            rows.append(row)
    write_json(folder / "mm-vet.json", entries)
    write_json_lines(folder / "llava-mm-vet.jsonl", rows)
    return len(rows)


def write_ai2d(material: Material, folder: Path, draw: random.Random) -> int:
    """AI2D as VLMEvalKit's table: which label stands at what."""
    rows: list[dict[str, Any]] = []
    for number, shown in enumerate(material.facts("label", draw, AI2D_QUESTIONS)):
        options, place = shown.fact.options(draw)
        rows.append(
            {
                "index": number,
                "image": in_base64(shown.picture),
                "question": shown.fact.question,
                **dict(zip(LETTERS, options, strict=True)),
                "answer": LETTERS[place],
                "category": "labels",
            }
        )
    write_table(folder / "AI2D_TEST.tsv", rows)
    return len(rows)
