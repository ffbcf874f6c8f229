"""MM-Vet: the export for the judge, and a judge's grades averaged as by its script."""

import csv
import json
import shutil

import pytest

from eval.understanding.benchmark import BenchmarkError
from eval.understanding.mmvet import MMVET, aggregate_grades
from tests.support.benchmark_data import BENCHMARK_DATA

DATA = BENCHMARK_DATA / "mmvet"
GRADES = DATA / "model_gpt-4-grade-2runs.json"


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return {frozenset(k.split("_")): v for k, v in next(csv.DictReader(file)).items() if k}


@pytest.mark.parametrize(
    ("title", "file"),
    [
        ("By capability", "model_gpt-4-cap-score-2runs.csv"),
        ("By combination of capabilities", "model_gpt-4-cap-int-score-2runs.csv"),
    ],
)
def test_grades_average_as_by_the_script(title, file):
    found = aggregate_grades(GRADES, MMVET.read(DATA, False))
    known = table(DATA / file)
    (column, *_) = found.tables[title][0]
    rows = {frozenset(row[column].split("_")): row["score"] for row in found.tables[title]}
    assert rows == {name: float(known[name]) for name in rows} and len(rows) == len(known) - 3
    assert found.value == found.figures["total"] == float(known[frozenset({"total"})])
    assert found.figures["std over runs"] == float(known[frozenset({"std"})])
    assert f"np.float64({found.figures['run 1']})" in known[frozenset({"runs"})]


def test_export_equals_the_reference(tmp_path):
    lines = (DATA / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {f"v1_{row['question_id']}": row["text"] for row in map(json.loads, lines)}
    (path,) = MMVET.submit(MMVET.read(DATA, False), answers, tmp_path)
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(
        (DATA / "model.json").read_text(encoding="utf-8")
    )
    ungraded = MMVET.score(MMVET.read(DATA, False), answers)
    assert ungraded.value is None and "--grades" in ungraded.notes[0]


def test_llavas_file_gives_the_same_questions(tmp_path):
    questions = MMVET.read(DATA, False)
    rows = [
        {"image": f"{q.key}.png", "text": q.prompt, "category": "conv", "question_id": q.question_id}
        for q in questions
    ]
    path = tmp_path / "llava-mm-vet.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = MMVET.read(tmp_path, False)
    assert [(q.key, q.question_id, q.prompt) for q in found] == [
        (q.key, q.question_id, q.prompt) for q in questions
    ]
    with pytest.raises(BenchmarkError, match=r"mm-vet.json has to be in the data folder"):
        aggregate_grades(GRADES, found)
    with pytest.raises(BenchmarkError, match="line 1: no picture v1_0.png in"):
        MMVET.read(tmp_path)


def test_pictures_lie_beside_the_questions(tmp_path):
    folder = tmp_path / "unpacked" / "mm-vet"
    (folder / "images").mkdir(parents=True)
    shutil.copy(DATA / "mm-vet.json", folder)
    for question in MMVET.read(DATA, False):
        (folder / "images" / f"{question.key}.png").write_bytes(b"")
    assert all(question.image.parent == folder / "images" for question in MMVET.read(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v1_0": None}, "lacks grades of 1 questions, such as v1_0"),
        ({"v1_0": {"score": [0.5, 1.5]}}, "entry 'v1_0': a score of 1.5; expected a number from 0 to 1"),
        ({"v1_1": {"score": [0.5]}}, "entry 'v1_1': 1 scores; expected one for each run"),
        ({"v9_9": {"score": [0, 0]}}, "a grade of v9_9, which is no question"),
        ({"v1_3": {"content": []}}, "entry 'v1_3': no field 'score'"),
    ],
)
def test_grades_that_do_not_fit(tmp_path, change, message):
    content = json.loads(GRADES.read_text(encoding="utf-8")) | change
    path = shutil.copy(GRADES, tmp_path)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({key: row for key, row in content.items() if row is not None}, file)
    with pytest.raises(BenchmarkError, match=message):
        aggregate_grades(tmp_path / GRADES.name, MMVET.read(DATA, False))
