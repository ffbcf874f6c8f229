"""VQAv2, TextVQA, POPE, MME: normal forms, scores and submissions equal those of the public scripts."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.understanding import mme, pope
from eval.understanding.answers import answer_row, read_answers
from eval.understanding.benchmark import BenchmarkError
from eval.understanding.mme import MME
from eval.understanding.pope import POPE
from eval.understanding.task import draw_questions, result_of
from eval.understanding.textvqa import TEXTVQA
from eval.understanding.vqa_normalisation import (
    CONTRACTIONS,
    as_submitted,
    mean_agreement,
    normalised,
    vqa_accuracy,
)
from eval.understanding.vqav2 import VQAV2
from tests.support.benchmark_data import BENCHMARK_DATA
from tests.support.tiny_pope import write_pope


def load(*names):
    return json.loads(BENCHMARK_DATA.joinpath(*names).read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", load("vqa_normalisation.json")["cases"], ids=lambda case: case["input"][:24])
def test_normal_forms_equal_the_references(case):
    assert normalised(case["input"]) == case["official_vqaEval"]
    assert as_submitted(case["input"]) == case["llava_m4c_EvalAIAnswerProcessor"]


@pytest.mark.parametrize(
    "case", load("vqa_scores.json")["cases"], ids=lambda case: f"{case['id']}-{case['note']}"
)
def test_vqa_scores_equal_the_references(case):
    text, people = case["prediction"], case["gt_answers"]
    assert vqa_accuracy(text, people) == pytest.approx(case["official_score"])
    assert as_submitted(text) == case["llava_submission_answer"]
    assert vqa_accuracy(as_submitted(text), people) == pytest.approx(
        case["official_score_on_llava_submission"]
    )
    agreement = mean_agreement(as_submitted(text), [as_submitted(one) for one in people])
    assert agreement == pytest.approx(case["textvqa_m4c_score"])


def test_contractions():
    assert len(CONTRACTIONS) == 114 and not {"", "'"} & set(CONTRACTIONS)
    assert CONTRACTIONS["couldn'tve"] == CONTRACTIONS["couldnt've"] == "couldn't've"


@given(st.text(max_size=40), st.lists(st.text(max_size=12), min_size=10, max_size=10))
def test_vqa_accuracy_is_a_share_and_order_does_not_matter(text, people):
    found = vqa_accuracy(text, people)
    assert 0 <= found <= 1
    assert vqa_accuracy(text, people[::-1]) == pytest.approx(found)


def test_vqav2_equals_the_official_script():
    folder = BENCHMARK_DATA / "vqav2_mini"
    questions = VQAV2.read(folder, False)
    answers = read_answers(folder / "v2_OpenEnded_mscoco_val2014_results.json", VQAV2, questions)
    found, expected = VQAV2.score(questions, answers), load("vqav2_mini", "expected.json")
    known = expected["accuracy"]
    assert found.value == known["overall"]
    for title, name, rows in (
        ("By question type", "question type", known["perQuestionType"]),
        ("By answer type", "answer type", known["perAnswerType"]),
    ):
        assert {row[name]: row["accuracy"] for row in found.tables[title]} == rows
    assert {key: round(100 * score, 2) for key, score in found.per_question.items()} == expected["evalQA"]
    assert VQAV2.score(questions[::-1], answers).figures == found.figures


def test_vqav2_submission_equals_the_reference(tmp_path):
    folder = BENCHMARK_DATA / "vqav2_submission"
    questions = VQAV2.read(folder, False)
    with pytest.raises(BenchmarkError, match=r"merge.jsonl, line 14: no JSON"):
        read_answers(folder / "merge.jsonl", VQAV2, questions)
    answers = read_answers(folder / "merge.jsonl", VQAV2, questions, allow_missing=True)
    (path,) = VQAV2.submit(questions, answers, tmp_path)
    assert json.loads(path.read_text(encoding="utf-8")) == load("vqav2_submission", "upload.json")
    found = VQAV2.score(questions, answers)
    assert found.value is None and "send the submission" in found.notes[0]


def test_vqav2_asks_the_part_and_submits_the_whole(tmp_path):
    whole = "llava_vqav2_mscoco_test2015.jsonl"
    lines = (BENCHMARK_DATA / "vqav2_submission" / whole).read_text(encoding="utf-8").splitlines()
    (tmp_path / whole).write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    (tmp_path / "test2015").mkdir()
    for line in lines[:2]:
        (tmp_path / "test2015" / json.loads(line)["image"]).write_bytes(b"")
    questions = VQAV2.read(tmp_path)
    assert [question.optional for question in questions] == [False] * 2 + [True] * (len(lines) - 2)
    assert len(read_answers(write_rows(tmp_path, questions[:2]), VQAV2, questions)) == 2


def test_vqav2_scores_llavas_questions_with_annotations_beside(tmp_path):
    folder = BENCHMARK_DATA / "vqav2_mini"
    questions = VQAV2.read(folder, False)
    shutil.copy(folder / "v2_mscoco_val2014_annotations.json", tmp_path)
    rows = [{"question_id": q.question_id, "image": "a.jpg", "text": q.prompt} for q in questions]
    path = tmp_path / "llava_vqav2_mscoco_val2014.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers = read_answers(folder / "v2_OpenEnded_mscoco_val2014_results.json", VQAV2, questions)
    found = VQAV2.score(VQAV2.read(tmp_path, False), answers)
    assert found.value == VQAV2.score(questions, answers).value


def write_rows(folder, questions, text="Yes"):
    path = folder / "answers.jsonl"
    rows = [answer_row(question, text, "m") for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_textvqa_by_hand(tmp_path):
    rows = [
        {
            "question_id": "p1",
            "image": "p1.jpg",
            "text": "What is written?\nReference OCR token: STOP\nAnswer.",
        },
        {"question_id": "p1", "image": "p1.jpg", "text": "Which number?\nAnswer."},
    ]
    truths = [
        {"image_id": "p1", "question": "what is written?", "answers": ["stop"] * 9 + ["go"]},
        {"image_id": "p1", "question": "Which number?", "answers": ["2", "two", "two", *["3"] * 7]},
    ]
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": truths}), encoding="utf-8")
    questions = TEXTVQA.read(tmp_path, False)
    texts = dict(zip((question.key for question in questions), ("STOP.", "two")))
    # three of ten said 2: nine leave-one-out sets of ten have three or two others
    assert TEXTVQA.score(questions, texts).value == pytest.approx(100 * (1 + (7 + 3 * 2 / 3) / 10) / 2)
    path = write_rows(tmp_path, questions, "go")
    assert len(read_answers(path, TEXTVQA, questions)) == 2
    with pytest.raises(BenchmarkError, match="line 1: no picture p1.jpg and 1 more in"):
        TEXTVQA.read(tmp_path)


@pytest.mark.parametrize(
    "case", load("pope", "text_to_yesno.json")["cases"], ids=lambda case: case["text"][:24]
)
def test_pope_reads_answers_as_the_script(case):
    assert pope.parse(case["text"]) == case["answer"]


@pytest.mark.parametrize("name", ["short", "sentences", "perfect"])
def test_pope_equals_the_script(name):
    questions = POPE.read(BENCHMARK_DATA / "pope" / "coco", False)
    answers = read_answers(BENCHMARK_DATA / "pope" / f"pred_{name}.jsonl", POPE, questions)
    found, expected = POPE.score(questions, answers), load("pope", "expected.json")["expected"][name]
    assert found.value == pytest.approx(100 * expected["mean_f1"])
    for row in found.tables["By category"]:
        known = expected["per_category"][row["category"]]
        assert row["questions"] == known["samples"]
        for column, key in (
            ("F1", "f1"),
            ("yes ratio", "yes_ratio"),
            *((k, k) for k in ("accuracy", "precision", "recall")),
        ):
            assert row[column] == pytest.approx(100 * known[key])


def test_pope_prompts_and_ids_are_those_of_llava():
    lines = (BENCHMARK_DATA / "pope" / "llava_pope_test.jsonl").read_text(encoding="utf-8").splitlines()
    known = {(row["question_id"], row["text"], row["category"]) for row in map(json.loads, lines)}
    questions = POPE.read(BENCHMARK_DATA / "pope" / "coco", False)
    assert {(q.question_id, q.prompt, q.category) for q in questions} == known


def test_pope_where_nobody_says_yes():
    questions = POPE.read(BENCHMARK_DATA / "pope" / "coco", False)
    found = POPE.score(questions, dict.fromkeys((q.key for q in questions), "No"))
    assert found.value == 0 and found.figures["precision, all together"] == 0
    assert found.figures["yes ratio, all together"] == 0 and found.figures["accuracy, all together"] == 50


@pytest.mark.parametrize(
    "case", load("mme", "expected.json")["text_to_label"], ids=lambda case: case["text"][:24]
)
def test_mme_reads_answers_as_the_script(case):
    assert mme.parse(case["text"]) == case["official"]


def test_mme_equals_the_script():
    questions = MME.read(BENCHMARK_DATA / "mme" / "clean", False)
    expected = load("mme", "expected.json")["expected"]["clean"]["official_calculation_py"]
    for path in (BENCHMARK_DATA / "mme" / "clean.jsonl", BENCHMARK_DATA / "mme" / "clean"):
        found = MME.score(questions, read_answers(path, MME, questions))
        assert found.value == pytest.approx(expected["perception"])
        assert found.figures["cognition"] == pytest.approx(expected["cognition"])
        for row in found.tables["By category"]:
            known = expected["per_category"][row["category"]]
            assert row["score"] == pytest.approx(known["score"])
            assert row["accuracy"] == pytest.approx(100 * known["acc"])
            assert row["both right"] == pytest.approx(100 * known["acc_plus"])
            assert row["neither"] == known["other_num"]
            assert {name: row[name] for name in ("TP", "FN", "TN", "FP")} == {
                name: known[name] for name in ("TP", "FN", "TN", "FP")
            }


def test_mme_submission_goes_round(tmp_path):
    questions = MME.read(BENCHMARK_DATA / "mme" / "clean", False)
    answers = read_answers(BENCHMARK_DATA / "mme" / "clean.jsonl", MME, questions)
    MME.submit(questions, {**answers, questions[0].key: "No\tthing\nhere"}, tmp_path)
    again = read_answers(tmp_path / "results", MME, questions)
    assert again == {**answers, questions[0].key: "No thing here"}
    first, second = (tmp_path / "results" / "OCR.txt").read_text(encoding="utf-8").splitlines()[:2]
    assert first.split("\t")[0] == second.split("\t")[0] and first.split("\t")[1].endswith(
        "Please answer yes or no."
    )


def write_mme(
    folder,
    category="existence",
    lines=("Is it red? Please answer yes or no.\tYes", "Is it blue? Please answer yes or no.\tNo"),
):
    place = folder / category
    for part in ("images", "questions_answers_YN"):
        (place / part).mkdir(parents=True)
    (place / "images" / "0001.png").write_bytes(b"")
    (place / "questions_answers_YN" / "0001.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_mme_reads_the_release(tmp_path):
    questions = MME.read(write_mme(tmp_path))
    assert [(q.question_id, q.prompt, q.truth) for q in questions] == [
        ("existence/0001.png", "Is it red?\nAnswer the question using a single word or phrase.", "Yes"),
        ("existence/0001.png", "Is it blue?\nAnswer the question using a single word or phrase.", "No"),
    ]
    found = MME.score(questions, {questions[0].key: "Yes", questions[1].key: "Yes"})
    assert found.value == 50 and found.per_question[questions[1].key] == 0
    assert "no questions of count" in found.notes[0] and MME.chance(questions) == 75
    assert len(read_answers(write_rows(tmp_path, questions), MME, questions)) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("Is it red?\tYes",), r"0001.txt: answers are \['Yes'\]; expected two questions"),
        (("Is it red? Yes", "b\tNo"), "0001.txt, line 1: 1 fields; expected 2 between tabs"),
        (("a\tyes", "b\tNo"), r"answers are \['yes', 'No'\]"),
    ],
)
def test_mme_names_file_and_line(tmp_path, lines, message):
    with pytest.raises(BenchmarkError, match=message):
        MME.read(write_mme(tmp_path, lines=lines))
    (tmp_path / "existence" / "images" / "0001.png").unlink()
    with pytest.raises(BenchmarkError, match=r"0001.txt: no picture 0001.jpg or .png in"):
        MME.read(tmp_path)
    with pytest.raises(
        BenchmarkError, match="has no folder existence or count or position, ...; expected MME"
    ):
        MME.read(tmp_path / "existence")


@pytest.fixture
def asked(tmp_path):
    return POPE.read(write_pope(tmp_path / "pope"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"lacks answers to 1 of 12 questions, such as \d+; --allow-missing"),
        (lambda rows: [*rows, rows[0]], r"line 13: question \d+ was answered before, at .*line 1"),
        (lambda rows: [*rows, {"question_id": 99, "text": ""}], "line 13: no question 99 in pope"),
        (lambda rows: [{"question_id": 1}, *rows[1:]], "line 1: no field 'text'"),
        (
            lambda rows: [{"question_id": 1, "text": None}, *rows[1:]],
            "line 1: field 'text' is None; expected str",
        ),
        (lambda rows: [["a"], *rows], "line 1: got .* expected a JSON object"),
    ],
)
def test_answer_files_that_do_not_fit(tmp_path, asked, change, message):
    rows = change([answer_row(question, "Yes", "m") for question in asked])
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=message):
        read_answers(path, POPE, asked)


def test_answer_files_that_are_none(tmp_path, asked):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(BenchmarkError, match="no file .*answers.jsonl"):
        read_answers(path, POPE, asked)
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(BenchmarkError, match="is no text file"):
        read_answers(path, POPE, asked)
    path.write_text('{"question_id": 1, "text": "Yes"\n', encoding="utf-8")
    with pytest.raises(BenchmarkError, match="line 1: no JSON"):
        read_answers(path, POPE, asked)


def test_ids_may_be_numbers_or_text_and_empty_answers_count(tmp_path, asked):
    rows = [answer_row(question, "", "m") for question in asked]
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "".join(json.dumps(row | {"question_id": str(row["question_id"])}) + "\n" for row in rows[::-1]),
        encoding="utf-8",
    )
    answers = read_answers(path, POPE, asked)
    assert set(answers.values()) == {""}
    assert POPE.score(asked, answers).figures["yes ratio, all together"] == 100  # as by the script


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "maybe"}, "line 1: label is 'maybe'; expected yes or no"),
        ({"question_id": "1"}, "line 1: field 'question_id' is '1'; expected int"),
        ({"image": "../secret.jpg"}, "line 1: no picture ../secret.jpg in"),
    ],
)
def test_pope_names_file_and_line(tmp_path, row, message):
    folder = write_pope(tmp_path / "pope")
    path = folder / "coco_pope_random.json"
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | row), *rest]), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=message):
        POPE.read(folder)


def test_pope_lacks_a_file_or_pictures(tmp_path):
    folder = write_pope(tmp_path / "pope")
    shutil.rmtree(folder / "val2014")
    with pytest.raises(
        BenchmarkError, match=r"line 1: no picture COCO_val2014_000000000000.jpg and 11 more in"
    ):
        POPE.read(folder)
    (folder / "coco_pope_popular.json").unlink()
    with pytest.raises(BenchmarkError, match=r"has 0 files \*pope_popular.json"):
        POPE.read(folder, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: q["questions"][0].pop("image_id"), "question 1: no field 'image_id'"),
        (lambda q, a: q["questions"].append(q["questions"][0]), r"question_id \d+ was there before"),
        (lambda q, a: a["annotations"].pop(), r"question_id \d+ has no annotation"),
        (lambda q, a: a["annotations"][0]["answers"].pop(), "annotation 1: 9 answers; expected 10"),
        (lambda q, a: q.pop("questions"), "no field 'questions'"),
    ],
)
def test_vqav2_names_what_is_wrong(tmp_path, change, message):
    names = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
    contents = [load("vqav2_mini", name) for name in names]
    change(*contents)
    for name, content in zip(names, contents):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=message):
        VQAV2.read(tmp_path, False)
    with pytest.raises(BenchmarkError, match="no picture COCO_val2014_000000009000.jpg and"):
        VQAV2.read(BENCHMARK_DATA / "vqav2_mini")


def test_pope_counts_what_is_missing_as_wrong(asked):
    """An empty answer is yes, as by the script, and may be right; no answer is not."""
    assert POPE.score(asked, dict.fromkeys((q.key for q in asked), "")).figures["mean F1"] > 50
    found = POPE.score(asked, {})
    assert found.value == found.figures["accuracy, all together"] == 0
    assert set(found.per_question.values()) == {0}
    answers = {q.key: q.truth for q in asked[1:]}
    assert POPE.score(asked, answers).figures["accuracy, all together"] == pytest.approx(100 * 11 / 12)


def test_mme_ids_and_pictures_are_told_by_category_and_stem(tmp_path):
    """LLaVA's answers bear `existence/images/0001.png`, its files of results `0001.txt`."""
    questions = MME.read(write_mme(tmp_path))
    rows = [
        {**answer_row(question, "Yes", "m"), "question_id": "existence/images/0001.png"}
        for question in questions
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert list(read_answers(path, MME, questions).values()) == ["Yes", "Yes"]
    (results,) = MME.submit(questions, {q.key: "Yes" for q in questions}, tmp_path)
    text = results.read_text(encoding="utf-8")
    results.write_text(text.replace("0001.png", "0001.txt"), encoding="utf-8")
    assert list(read_answers(results.parent, MME, questions).values()) == ["Yes", "Yes"]


def test_mme_scores_what_it_submits(tmp_path):
    questions = MME.read(write_mme(tmp_path))
    answers = {questions[0].key: "\n \tYes", questions[1].key: " \n  No"}
    MME.submit(questions, answers, tmp_path)
    again = read_answers(tmp_path / "results", MME, questions)
    assert MME.score(questions, answers) == MME.score(questions, again)
    assert MME.score(questions, answers).value == 200


def test_textvqa_takes_a_question_that_two_people_asked(tmp_path):
    row = {"question_id": "p1", "image": "p1.jpg", "text": "What is written?\nAnswer."}
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text(2 * (json.dumps(row) + "\n"), encoding="utf-8")
    truth = {"image_id": "p1", "question": "What is written?", "answers": ["stop"] * 10}
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [truth] * 2}), encoding="utf-8")
    questions = TEXTVQA.read(tmp_path, False)
    assert len({question.key for question in questions}) == 2
    path = write_rows(tmp_path, questions, "stop")
    assert TEXTVQA.score(questions, read_answers(path, TEXTVQA, questions)).value == 100
    write_rows(tmp_path, [*questions, questions[0]])
    with pytest.raises(BenchmarkError, match="line 3: question p1 was answered before, at .*line 1"):
        read_answers(path, TEXTVQA, questions)


def write_vqav2_split(folder, split, numbers):
    rows = [{"question_id": number, "image_id": 7, "question": "How many?"} for number in numbers]
    content = {"data_subtype": split, "questions": rows}
    path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def test_vqav2_official_test_files_are_a_part_and_the_whole(tmp_path):
    write_vqav2_split(tmp_path, "test-dev2015", [70, 71])
    write_vqav2_split(tmp_path, "test2015", [70, 71, 72])
    (tmp_path / "test2015").mkdir()
    (tmp_path / "test2015" / "COCO_test2015_000000000007.jpg").write_bytes(b"")
    questions = VQAV2.read(tmp_path)
    assert [(q.question_id, q.optional) for q in questions] == [(70, False), (71, False), (72, True)]
    (path,) = VQAV2.submit(questions, {"70": "Two.", "71": "a dog"}, tmp_path / "out")
    assert [row["answer"] for row in json.loads(path.read_text(encoding="utf-8"))] == ["2", "dog", ""]
    write_vqav2_split(tmp_path, "val2014", [1])
    with pytest.raises(BenchmarkError, match=r"has 3 files \*OpenEnded_mscoco_\*_questions.json .* keep one"):
        VQAV2.read(tmp_path)


def test_only_questions_that_are_asked_are_drawn(tmp_path):
    write_vqav2_split(tmp_path, "test-dev2015", range(5))
    write_vqav2_split(tmp_path, "test2015", range(100))
    questions = VQAV2.read(tmp_path, False)
    assert len(draw_questions(questions, 4, seed=0)) == 4
    assert not any(question.optional for question in draw_questions(questions, 50, seed=0))
    assert len(draw_questions(questions, None, seed=0)) == 100
    notes = result_of(VQAV2, questions, {"0": "Yes"}, tmp_path / "out", {}).notes
    assert "4 of 5 questions have no answer and count as wrong" in notes
