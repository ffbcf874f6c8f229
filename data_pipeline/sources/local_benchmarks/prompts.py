"""Drawings and their names in the files of benchmarks of generation, retrieval and classification."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.sources.local_benchmarks.facts import MOST
from data_pipeline.sources.local_benchmarks.files import (
    write_json,
    write_json_lines,
    write_picture,
    write_text,
)
from data_pipeline.sources.local_benchmarks.scenes import Drawings, Scene, Thing

EACH = 4  # prompts of a tag
NUMBERS = ("one", "two", "three", "four")
CAPTIONS = 5  # of a picture, as in Flickr8K
CLASSES = 20


def write_geneval(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """GenEval: prompts of six tags, with what its detector has to find."""
    rows: list[dict[str, Any]] = []
    coloured = [thing for thing in drawings.things if thing.colour]

    def pairs(pool: list[Thing]) -> list[tuple[Thing, Thing]]:
        chosen = [(one, drawings.others([one], draw)) for one in _some(pool, draw)]
        return [(one, fitting[0]) for one, others in chosen if (fitting := [t for t in others if t in pool])]

    for thing in _some(drawings.things, draw):
        rows.append({"tag": "single_object", "include": [_wanted(thing)], "prompt": _drawing(thing)})
    for one, other in pairs(drawings.things):
        prompt = f"{_drawing(one)} and {_drawing(other)}"
        rows.append({"tag": "two_object", "include": [_wanted(one), _wanted(other)], "prompt": prompt})
    for thing in _some(drawings.things, draw):
        count = draw.randint(2, MOST)
        wanted, too_many = ({"class": thing.name, "count": number} for number in (count, count + 1))
        prompt = f'{NUMBERS[count - 1]} drawings of "{thing.name}"'
        rows.append({"tag": "counting", "include": [wanted], "exclude": [too_many], "prompt": prompt})
    for thing in _some(coloured, draw):
        of_colour = {**_wanted(thing), "color": thing.colour}
        rows.append({"tag": "colors", "include": [of_colour], "prompt": _coloured(thing)})
    for one, other in pairs(drawings.things):
        place = draw.choice(("left of", "right of", "above", "below"))
        include = [_wanted(other), {**_wanted(one), "position": [place, 0]}]
        rows.append(
            {"tag": "position", "include": include, "prompt": f"{_drawing(one)} {place} {_drawing(other)}"}
        )
    for one, other in pairs(coloured):
        include = [{**_wanted(thing), "color": thing.colour} for thing in (one, other)]
        prompt = f"{_coloured(one)} and {_coloured(other)}"
        rows.append({"tag": "color_attr", "include": include, "prompt": prompt})
    write_json_lines(folder / "evaluation_metadata.jsonl", rows)
    return len(rows)


def write_genai_bench(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """GenAI-Bench: prompts by number from 1, and the numbers of each skill's prompts."""
    prompts: list[str] = []
    skills: dict[str, list[int]] = {"basic": [], "advanced": []}

    def add(prompt: str, skill: str, level: str) -> None:
        prompts.append(prompt)
        for name in (skill, level):
            skills.setdefault(name, []).append(len(prompts))

    for thing in _some([thing for thing in drawings.things if thing.colour], draw):
        add(_coloured(thing), "attribute", "basic")
    for thing in _some(drawings.things, draw):
        for other in drawings.others([thing], draw)[:1]:
            add(f"{_drawing(thing)} above {_drawing(other)}", "spatial relation", "basic")
            add(f'{_drawing(thing)}, but none of "{other.name}"', "negation", "advanced")
    for thing in _some(drawings.things, draw):
        number = NUMBERS[draw.randint(2, MOST) - 1]
        add(f'{number} drawings of "{thing.name}"', "counting", "advanced")
    entries = {
        f"{number:05d}": {"id": f"{number:05d}", "prompt": prompt} for number, prompt in enumerate(prompts, 1)
    }
    write_json(folder / "genai_image.json", entries)
    write_json(folder / "genai_skills.json", skills)
    return len(prompts)


def write_mjhq(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """MJHQ-30K: prompts by category and hash, with reference pictures."""
    entries = {}
    for category in ("animals", "food", "people"):
        of_it = [thing for thing in drawings.things if thing.kind == category]
        for thing in draw.sample(of_it, min(8, len(of_it))):
            name = hashlib.sha1(thing.key.encode()).hexdigest()
            entries[name] = {"category": category, "prompt": thing.name}
            write_picture(folder / "mjhq30k_imgs" / category / f"{name}.jpg", Scene([thing]), "JPEG")
    write_json(folder / "meta_data.json", entries)
    return len(entries)


def write_drawing(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """Plain prompts, a name a line."""
    names = [thing.name for thing in draw.sample(drawings.things, min(24, len(drawings.things)))]
    write_text(folder / "prompts.txt", "".join(f"{name}\n" for name in names))
    return len(names)


def write_retrieval(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """Flickr8K with Karpathy's splits: five captions a picture, its names and paraphrases of them."""
    images = []
    for number, thing in enumerate(draw.sample(drawings.things, min(40, len(drawings.things)))):
        names = list(dict.fromkeys(thing.names.values()))
        said = [*names, f"a drawing of {thing.name}", f"{thing.name}, drawn", f"the emoji {thing.name}"]
        said = [*said, f"{thing.name} on white", f"a picture of {thing.name}"][:CAPTIONS]
        filename = f"{number:010d}.jpg"
        write_picture(folder / "Flicker8k_Dataset" / filename, Scene([thing]), "JPEG")
        sentids = [CAPTIONS * number + place for place in range(CAPTIONS)]
        sentences = [
            {"tokens": raw.lower().split(), "raw": raw, "imgid": number, "sentid": sentid}
            for raw, sentid in zip(said, sentids, strict=True)
        ]
        images.append(
            {
                "sentids": sentids,
                "imgid": number,
                "sentences": sentences,
                "split": "test",
                "filename": filename,
            }
        )
    write_json(folder / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    return len(images)


def write_zero_shot(drawings: Drawings, folder: Path, draw: random.Random) -> int:
    """Folders of classes: concepts, those with several drawings first."""
    sizes = Counter(thing.concept for thing in drawings.variants)
    concepts = sorted(sizes)
    draw.shuffle(concepts)
    chosen = set(sorted(concepts, key=lambda concept: -sizes[concept])[:CLASSES])
    shown = [thing for thing in drawings.variants if thing.concept in chosen]
    for thing in shown:
        place = folder / thing.concept.replace(" ", "_").replace("/", "_") / f"{thing.key}.png"
        write_picture(place, Scene([thing]), "PNG")
    return len(shown)


def _some(things: list[Thing], draw: random.Random) -> list[Thing]:
    return draw.sample(things, min(EACH, len(things)))


def _drawing(thing: Thing) -> str:
    return f'a drawing of "{thing.name}"'


def _coloured(thing: Thing) -> str:
    return f'a {thing.colour} drawing of "{thing.name}"'


def _wanted(thing: Thing) -> dict[str, Any]:
    return {"class": thing.name, "count": 1}
