"""SEED-Bench, MMBench, AI2D: letters, scores and submissions equal those of the public scorers."""

import base64
import io
import json
import shutil

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eval.understanding.ai2d import AI2D
from eval.understanding.benchmark import BenchmarkError
from eval.understanding.letters import (
    first_letter,
    infer_letter,
    letter_by_words,
    lmms_letter,
    science_qa_letter,
)
from eval.understanding.mmbench import MMBENCH
from eval.understanding.seed import SEED
from tests.support.benchmark_data import BENCHMARK_DATA

MCQ, SEED_DATA = BENCHMARK_DATA / "mcq", BENCHMARK_DATA / "seed"
LETTER_CASES = json.loads((MCQ / "letter_extraction.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", LETTER_CASES, ids=lambda case: repr(case["prediction"])[:30])
def test_letters_equal_the_references(case):
    text, options = case["prediction"], case["choices"]
    known = case["vlmevalkit_can_infer"]
    assert infer_letter(text, options) == (None if known == "Z" else known)  # Z: no option, so wrong
    assert lmms_letter(text, options) == case["lmms_mmbench_can_infer"]
    assert letter_by_words(text, options) == case["lmms_mmbench_can_infer_text"]
    assert (science_qa_letter(text) or "FAILED") == case["llava_scienceqa_parse"]
    if "lmms_seed_pred" in case:
        assert first_letter(text) == case["lmms_seed_pred"]


PETS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is **B**, as its ears are longer than those of others", "B"),
        ("the Answer  IS c, as far as I can see it in this picture", "C"),
        ("I think the answer is a dog", "A"),  # the first letter of a word, too: the script's rule
        ("rabbit Z", None),  # Z, where no option's letter is: none
        ("B or Z", "B"),
        ("Failed to obtain answer via API: cat", "C"),  # no letter, words all the same
        ("Cannot determine the answer, dog", None),
    ],
)
def test_letters_by_vlmevalkits_script(text, letter):
    assert infer_letter(text, PETS) == letter


def test_lmms_reads_marks_after_an_article():
    assert lmms_letter("A dog (B) is seen", PETS) == "B"
    assert lmms_letter("A dog is seen", PETS) == "D"


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=4))
def test_letters_are_offered_ones_or_none(text, words):
    options = dict(zip("ABCD", words))
    assert infer_letter(text, options) in {None, *options}
    assert lmms_letter(text, options) in {None, *"ABCDE"}


def predictions(path, text="text"):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {str(row["question_id"]): row[text] for row in rows}


def test_seed_equals_the_references():
    questions = SEED.read(SEED_DATA, False)
    answers = predictions(SEED_DATA / "answers.jsonl")
    expected = json.loads((SEED_DATA / "expected.json").read_text(encoding="utf-8"))["expected"]
    found = SEED.score(questions, answers)
    llava, lmms = expected["llava_convert_seed_stdout"], expected["lmms_eval"]
    assert round(found.value, 2) == llava["image accuracy"]
    for name, known in (("video", "video accuracy"), ("total", "Total accuracy")):
        assert round(found.figures[f"{name} accuracy"], 2) == llava[known]
    for name, known in (("image", "seed_image"), ("video", "seed_video"), ("total", "seed_all")):
        assert found.figures[f"{name} accuracy, first letter (lmms-eval)"] == pytest.approx(100 * lmms[known])
    by_type = {row["type"]: row for row in found.tables["By type"]}
    for name in by_type:
        assert round(by_type[name]["accuracy"], 2) == llava[name]
    known = expected["lmms_eval_rule_per_type"]
    types = json.loads((SEED_DATA / "SEED-Bench.json").read_text(encoding="utf-8"))["question_type"]
    for name, number in types.items():
        assert by_type[name]["accuracy, first letter"] == pytest.approx(100 * known[str(number)])


def test_seed_upload_equals_the_reference(tmp_path):
    questions = SEED.read(SEED_DATA, False)
    (path,) = SEED.submit(questions, predictions(SEED_DATA / "answers.jsonl"), tmp_path)
    assert predictions(path, "prediction") == predictions(SEED_DATA / "upload.jsonl", "prediction")


def test_seed_ids_are_those_that_llavas_script_looks_up():
    questions = SEED.read(SEED_DATA, False)
    rows = (SEED_DATA / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [question.question_id for question in questions] == [
        json.loads(row)["question_id"] for row in rows
    ]


def test_seed_of_llavas_file_is_submitted_not_scored(tmp_path):
    known = SEED.read(SEED_DATA, False)
    rows = [
        {
            "question_id": q.question_id,
            "image": f"SEED-Bench-{'video-image' if q.optional else 'image'}/{q.key}",
            "text": q.prompt,
            "category": q.category,
        }
        for q in known
    ]
    path = tmp_path / "llava-seed-bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = SEED.read(tmp_path, False)
    assert [(q.key, q.question_id, q.prompt, q.category, q.optional) for q in found] == [
        (q.key, q.question_id, q.prompt, q.category, q.optional) for q in known
    ]
    answers = predictions(SEED_DATA / "answers.jsonl")
    scores = SEED.score(found, answers)
    assert scores.value is None and "put SEED-Bench.json beside it" in scores.notes[0]
    (upload,) = SEED.submit(found, answers, tmp_path)
    assert predictions(upload, "prediction") == predictions(SEED_DATA / "upload.jsonl", "prediction")
    with pytest.raises(BenchmarkError, match="line 1: no picture SEED-Bench-image/100007 in"):
        SEED.read(tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:1] * 2), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="line 2: question_id 100007 is that of line 1"):
        SEED.read(tmp_path, False)
    shutil.copy(SEED_DATA / "SEED-Bench.json", tmp_path)
    assert SEED.score(SEED.read(tmp_path, False), answers).value == 73.75


def test_seed_videos_are_never_asked_and_change_nothing(tmp_path):
    shutil.copy(SEED_DATA / "SEED-Bench.json", tmp_path)
    content = json.loads((tmp_path / "SEED-Bench.json").read_text(encoding="utf-8"))
    (tmp_path / "SEED-Bench-image").mkdir()
    for row in content["questions"]:
        if row["question_type_id"] < 10:
            (tmp_path / "SEED-Bench-image" / row["data_id"]).write_bytes(b"")
    questions = SEED.read(tmp_path)
    asked = [question for question in questions if not question.optional]
    assert len(questions) == 105 and len(asked) == 80 and all(q.image.is_file() for q in asked)
    assert {question.image for question in questions if question.optional} == {None}
    first = asked[0]
    assert first.prompt == (
        "Question 100007?\nA. a100007\nB. b100007\nC. c100007\nD. d100007\n"
        "Answer with the option's letter from the given choices directly."
    )
    answers = predictions(SEED_DATA / "answers.jsonl")
    of_images = {question.key: answers[question.key] for question in asked}
    found = SEED.score(SEED.read(SEED_DATA, False), of_images)
    assert round(found.value, 2) == 73.75 and "video accuracy" not in found.figures
    assert found.value == SEED.score(asked, of_images).value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "question 1: answer is 'E'; expected one of A, B, C, D"),
        ({"question_id": "100014"}, "question 2: question_id 100014 is that of question 1"),
        ({"question_type_id": 99}, "question 1: question_type_id 99"),
        ({"question": 5}, "question 1: field 'question' is 5; expected str"),
    ],
)
def test_seed_names_what_is_wrong(tmp_path, change, message):
    content = json.loads((SEED_DATA / "SEED-Bench.json").read_text(encoding="utf-8"))
    content["questions"][0] |= change
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=message):
        SEED.read(tmp_path, False)
    with pytest.raises(BenchmarkError, match="question 1: no picture 100007_1 in"):
        SEED.read(SEED_DATA)


def test_mmbench_equals_the_references():
    questions = MMBENCH.read(MCQ)
    answers = predictions(MCQ / "mmbench_mini_pred_letters.jsonl")
    expected = json.loads((MCQ / "mmbench_expected.json").read_text(encoding="utf-8"))["expected"]["letters"]
    found = MMBENCH.score(questions, answers)
    assert found.value == pytest.approx(100 * expected["vlmevalkit_exact_matching_circular"]["overall"])
    lmms = expected["lmms_eval_static"]
    assert found.figures["circular accuracy, lmms-eval's letters"] == pytest.approx(100 * lmms["overall"])
    for name, known in (("first", "circ0"), ("all", "all_rows")):
        value = found.figures[f"vanilla accuracy ({name} rotations)"]
        assert value == pytest.approx(100 * expected[f"vlmevalkit_vanilla_{known}"])
    for title, column, known in (
        ("By category", "category", "category"),
        ("By l2-category", "l2-category", "l2"),
    ):
        rows = {row[column]: row["circular accuracy"] for row in found.tables[title]}
        assert rows == pytest.approx({name: 100 * value for name, value in lmms[known].items()})
    hits: dict[str, float] = {}
    for question in questions:
        hits[question.group] = min(hits.get(question.group, 1.0), found.per_question[question.key])
    assert hits == expected["vlmevalkit_exact_matching_circular"]["hit_by_index"]


def test_mmbench_upload_equals_the_reference(tmp_path):
    questions = MMBENCH.read(MCQ, False)
    (path,) = MMBENCH.submit(questions, predictions(MCQ / "mmbench_mini_pred_letters.jsonl"), tmp_path)
    found, known = (
        list(openpyxl.load_workbook(one).active.iter_rows(values_only=True))
        for one in (path, MCQ / "mmbench_mini_upload_letters.xlsx")
    )
    assert found == known


def test_mmbench_upload_keeps_answers_as_text(tmp_path):
    questions = MMBENCH.read(MCQ, False)[:1]
    (path,) = MMBENCH.submit(questions, {"1": "=1\x07+1"}, tmp_path)  # a control character: none in xlsx
    cell = openpyxl.load_workbook(path).active["G2"]
    assert (cell.value, cell.data_type) == ("=1+1", "s")


def test_mmbench_prompts_are_those_of_llava():
    known = json.loads((BENCHMARK_DATA / "prompts" / "llava_prompts.json").read_text(encoding="utf-8"))[
        "model_vqa_mmbench(mmbench_mini.tsv)"
    ]
    questions = {question.question_id: question for question in MMBENCH.read(MCQ, False)}
    for case in known:
        question = questions[case["answer_row"]["question_id"]]
        assert case["prompt"].endswith(f"USER: <image>\n{question.prompt} ASSISTANT:")
        assert question.recorded_prompt == case["answer_row"]["prompt"]
        assert question.extra == {name: case["answer_row"][name] for name in question.extra}


@given(st.randoms(use_true_random=False))
def test_circular_is_never_above_vanilla_and_order_does_not_matter(draw):
    questions = MMBENCH.read(MCQ, False)
    answers = {question.key: draw.choice("ABCD") for question in questions}
    found = MMBENCH.score(questions, answers)
    assert found.value <= found.figures["vanilla accuracy (first rotations)"]
    draw.shuffle(questions)
    assert MMBENCH.score(questions, answers).figures == found.figures


def png():
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_table(
    path, *rows, columns=("index", "question", "A", "B", "C", "D", "answer", "category", "image")
):
    lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_ai2d_by_hand(tmp_path):
    write_table(
        tmp_path / "AI2D_TEST.tsv",
        (0, "What eats grass?", "owl", "rabbit", "fox", "nan", "B", "food web", png()),
        (1, "What eats foxes?", "owl", "rabbit", "nothing", "grass", "C", "food web", "0"),
        (2, "Which is a leaf?", "x", "y", "", "", "A", "parts", png()),
        (3, "What eats owls?", "fox", "none", "grass", "rabbit", "B", "parts", "2"),
    )
    questions = AI2D.read(tmp_path)
    assert ["".join(question.options) for question in questions] == ["ABC", "ABCD", "AB", "ABCD"]
    assert questions[1].image == questions[0].image  # a reference to row 0
    found = AI2D.score(questions, {"0": "The answer is B.", "1": "grass", "2": "A", "3": "None"})
    assert found.value == 75
    assert [row["accuracy"] for row in found.tables["By category"]] == [50.0, 100.0]
    assert AI2D.chance(questions) == pytest.approx(100 * (1 / 3 + 1 / 4 + 1 / 2 + 1 / 4) / 4)
    assert found.figures["accuracy, letters as LLaVA's for ScienceQA"] == 50
    assert AI2D.score(questions, {}).value == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x", "q", "a", "b", "", "", "A", "c", "0"), "line 3: index is 'x'; expected a number"),
        ((0, "q", "a", "b", "", "", "A", "c", "0"), "line 3: index 0 is that of line 2"),
        ((1, "q", "a", "", "c", "", "A", "c", "0"), "line 3: 1 options; expected two or more"),
        ((1, "q", "a", "b", "", "", "C", "c", "0"), "line 3: answer is 'C'; expected one of A, B"),
        ((1, "q", "a", "b", "", "", "", "c", "0"), "index 1 has no answer"),
        ((1, "q", "a", "b", "", "", "A", "c", "7"), "line 3: image is '7', and no row of that index"),
        ((1, "q", "a", "b", "", "", "A", "c", "no picture"), "line 3: image is 'no picture'"),
        ((1, "q", "a"), "line 3: the row does not have 9 fields"),
    ],
)
def test_tables_name_the_line(tmp_path, row, message):
    write_table(tmp_path / "AI2D_TEST.tsv", (0, "q", "a", "b", "", "", "A", "c", png()), row)
    with pytest.raises(BenchmarkError, match=message):
        AI2D.read(tmp_path)


def test_a_table_without_a_column(tmp_path):
    write_table(tmp_path / "mmbench_dev.tsv", (0, "q"), columns=("index", "question"))
    with pytest.raises(BenchmarkError, match="has no column 'A'; its head is"):
        MMBENCH.read(tmp_path)
    with pytest.raises(BenchmarkError, match="no folder .*; expected the folder with MMBench's table"):
        MMBENCH.read(tmp_path / "nowhere")


def test_a_split_without_answers_is_submitted_not_scored(tmp_path):
    write_table(tmp_path / "mmbench_test.tsv", (1, "q", "a", "b", "", "", "", "c", png()))
    found = MMBENCH.score(MMBENCH.read(tmp_path), {"1": "A"})
    assert found.value is None and "send the submission to MMBench's server" in found.notes[0]
