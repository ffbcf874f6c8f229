"""Captions and pictures of held-out scenes for generation and retrieval, and drawings by class."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.sources.local_benchmarks.files import (
    write_json,
    write_json_lines,
    write_picture,
    write_text,
)
from data_pipeline.sources.local_benchmarks.held_out import HeldOutScenes, in_turns
from data_pipeline.sources.local_benchmarks.material import Material
from data_pipeline.sources.scenes.captions import captions
from data_pipeline.sources.scenes.parts import Scene

GENEVAL_EACH, GENAI_EACH, MJHQ_EACH, DRAWING_EACH, RETRIEVAL_EACH = 6, 8, 16, 8, 16
CAPTIONS = 5  # of a picture, as in Flickr8K
CLASSES = 20
# What is held out of a scene, by name -> (kind of combination, shape).
_OF_KIND = {"colour": ("colour", "single"), "number": ("number", "several"), "pair": ("pair", "pair")}
_BESIDE = {"side by side": "left of", "one above the other": "above"}  # the first of a pair, of the second


def write_geneval(material: Material, folder: Path, draw: random.Random) -> int:
    """GenEval: prompts of six tags, with what its detector has to find; all of held-out combinations."""
    if material.scenes is None:
        return 0
    alone = material.scenes.scenes("colour", "single", draw, 2 * GENEVAL_EACH)
    paired = material.scenes.scenes("pair", "pair", draw, 2 * GENEVAL_EACH)
    scenes = {
        "single_object": alone[::2],
        "two_object": paired[::2],
        "counting": material.scenes.scenes("number", "several", draw, GENEVAL_EACH),
        "colors": alone[1::2],
        "position": paired[1::2],
        "color_attr": material.scenes.scenes("colour", "pair", draw, GENEVAL_EACH),
    }
    rows: list[dict[str, Any]] = []
    for tag, of_it in scenes.items():
        for scene in of_it:
            include = [{"class": item.thing, "count": scene.number} for item in scene.items]
            row: dict[str, Any] = {"tag": tag, "include": include}
            if tag == "counting":
                row["exclude"] = [{**include[0], "count": scene.number + 1}]
            elif tag in ("colors", "color_attr"):
                row["include"] = [
                    {**wanted, "color": item.colour}
                    for wanted, item in zip(include, scene.items, strict=True)
                ]
            elif tag == "position":
                one, other = include
                row["include"] = [other, {**one, "position": [_BESIDE[scene.layout], 0]}]
            rows.append({**row, "prompt": _prompt(scene, draw)})
    write_json_lines(folder / "evaluation_metadata.jsonl", rows)
    return len(rows)


def write_genai_bench(material: Material, folder: Path, draw: random.Random) -> int:
    """GenAI-Bench: prompts by number from 1, and the numbers of each skill's prompts."""
    if material.scenes is None:
        return 0
    prompts: list[str] = []
    skills: dict[str, list[int]] = {"basic": [], "advanced": []}
    for kind, skill, level in (
        ("colour", "attribute", "basic"),
        ("pair", "spatial relation", "basic"),
        ("number", "counting", "advanced"),
    ):
        for scene in material.scenes.scenes(*_OF_KIND[kind], draw, GENAI_EACH):
            prompts.append(_prompt(scene, draw))
            for name in (skill, level):
                skills.setdefault(name, []).append(len(prompts))
    entries = {
        f"{number:05d}": {"id": f"{number:05d}", "prompt": prompt} for number, prompt in enumerate(prompts, 1)
    }
    write_json(folder / "genai_image.json", entries)
    write_json(folder / "genai_skills.json", skills)
    return len(prompts)


def write_mjhq(material: Material, folder: Path, draw: random.Random) -> int:
    """MJHQ-30K: prompts by category, here what is held out, and hash, with reference pictures."""
    if material.scenes is None:
        return 0
    entries = {}
    for category, about in _OF_KIND.items():
        for scene in material.scenes.scenes(*about, draw, MJHQ_EACH):
            prompt = _prompt(scene, draw)
            name = hashlib.sha1(prompt.encode()).hexdigest()
            entries[name] = {"category": category, "prompt": prompt}
            picture = material.picture(scene)
            write_picture(folder / "mjhq30k_imgs" / category / f"{name}.jpg", picture, "JPEG")
    write_json(folder / "meta_data.json", entries)
    return len(entries)


def write_drawing(material: Material, folder: Path, draw: random.Random) -> int:
    """Plain prompts, a caption a line."""
    if material.scenes is None:
        return 0
    prompts = [_prompt(scene, draw) for scene in _of_all_kinds(material.scenes, draw, DRAWING_EACH)]
    write_text(folder / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))
    return len(prompts)


def write_retrieval(material: Material, folder: Path, draw: random.Random) -> int:
    """Flickr8K with Karpathy's splits: five captions a picture, the languages in turns.

    Of one language alone there are fewer: two of several things, four of all else.
    """
    if material.scenes is None:
        return 0
    images = []
    written = 0
    for number, scene in enumerate(_of_all_kinds(material.scenes, draw, RETRIEVAL_EACH)):
        said = []
        for language in material.scenes.languages:
            paraphrases = captions(scene, language)
            said.append(draw.sample(paraphrases, len(paraphrases)))
        filename = f"{number:010d}.jpg"
        write_picture(folder / "Flicker8k_Dataset" / filename, material.picture(scene), "JPEG")
        sentences = [
            {"tokens": raw.lower().split(), "raw": raw, "imgid": number, "sentid": sentid}
            for sentid, raw in enumerate(in_turns(said)[:CAPTIONS], written)
        ]
        written += len(sentences)
        images.append(
            {
                "sentids": [sentence["sentid"] for sentence in sentences],
                "imgid": number,
                "sentences": sentences,
                "split": "test",
                "filename": filename,
            }
        )
    write_json(folder / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    return len(images)


def write_zero_shot(material: Material, folder: Path, draw: random.Random) -> int:
    """Folders of classes: concepts of drawings, those with several drawings first."""
    variants = material.drawings.variants
    sizes = Counter(thing.concept for thing in variants)
    concepts = sorted(sizes)
    draw.shuffle(concepts)
    chosen = set(sorted(concepts, key=lambda concept: -sizes[concept])[:CLASSES])
    shown = [thing for thing in variants if thing.concept in chosen]
    for thing in shown:
        place = folder / thing.concept.replace(" ", "_").replace("/", "_") / f"{thing.key}.png"
        write_picture(place, thing.image, "PNG")
    return len(shown)


def _of_all_kinds(held_out: HeldOutScenes, draw: random.Random, each: int) -> list[Scene]:
    return [scene for about in _OF_KIND.values() for scene in held_out.scenes(*about, draw, each)]


def _prompt(scene: Scene, draw: random.Random) -> str:
    return draw.choice(captions(scene, "en"))
