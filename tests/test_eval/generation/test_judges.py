"""Judges' files, aggregated by hand."""

import json

import pytest
import torch

from eval.benchmark_files import BenchmarkError
from eval.generation.judges import GENEVAL_TAGS, judge_genai_bench, judge_geneval
from eval.generation.prompts import Prompt


def geneval_rows():
    """Two prompts of each tag, two pictures of each; more pictures of counting, which weighs no more."""
    rows = []
    for index, tag in enumerate([*GENEVAL_TAGS, *GENEVAL_TAGS]):
        for sample in range(4 if tag == "counting" else 2):
            right = tag == "colors" or (tag == "counting" and index < 6 and sample == 0)
            name = f"/images/{index:05d}/samples/{sample:04d}.png"
            rows.append(
                {
                    "filename": name,
                    "tag": tag,
                    "prompt": "p",
                    "correct": right,
                    "reason": "" if right else "no",
                }
            )
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_geneval_is_the_mean_of_six_accuracies(tmp_path):
    found = judge_geneval(write_lines(tmp_path / "results.jsonl", geneval_rows()))
    assert found.value == pytest.approx((100 + 100 / 8) / 6) and found.unit == "%"
    assert found.figures["correct pictures"] == pytest.approx(100 * 5 / 28)
    assert found.figures["prompts with a correct picture"] == pytest.approx(100 * 3 / 12)
    (rows,) = found.tables.values()
    assert [row["tag"] for row in rows] == list(GENEVAL_TAGS)
    assert rows[2] == {"tag": "counting", "accuracy": 12.5, "pictures": 8}
    assert found.scores["00003/samples/0001.png"] == 1 and found.scores["00002/samples/0001.png"] == 0
    assert found.remarks["00002/samples/0001.png"] == "judge: no"
    assert found.remarks["00003/samples/0001.png"] == "judge: correct"
    assert found.notes == []


def test_no_overall_score_of_five_tags(tmp_path):
    rows = [row for row in geneval_rows() if row["tag"] != "position"]
    found = judge_geneval(write_lines(tmp_path / "results.jsonl", rows))
    assert found.value is None and found.notes == ["no picture of position, so no mean of all six tags"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tag": "colour"}, "r.jsonl, line 29: tag is 'colour'; expected one of single_object, "),
        ({"correct": "yes"}, "line 29: field 'correct' is 'yes'; expected bool"),
        ({"filename": "x/00000/samples/0000.png"}, "line 29: 00000/samples/0000.png was judged before"),
    ],
)
def test_wrong_lines_of_geneval_are_named(tmp_path, row, message):
    rows = geneval_rows()
    rows.append({"filename": "00099/samples/0000.png", "tag": "colors", "correct": True, **row})
    with pytest.raises(BenchmarkError, match=message):
        judge_geneval(write_lines(tmp_path / "r.jsonl", rows))


def test_geneval_without_lines(tmp_path):
    with pytest.raises(BenchmarkError, match="e.jsonl has no lines; expected the results of GenEval's"):
        judge_geneval(write_lines(tmp_path / "e.jsonl", []))


PROMPTS = [Prompt(f"{index:05d}", f"prompt {index}") for index in range(1, 6)]
SCORES = [0.9, 0.5, 0.2, 0.4, 1.0]


@pytest.fixture
def skills(tmp_path):
    """Number 5 has no tag; number 2 has several."""
    path = tmp_path / "genai_skills.json"
    tags = {"attribute": [1, 2], "basic": [1, 2], "counting": [2, 3, 4], "advanced": [3, 4], "negation": []}
    path.write_text(json.dumps(tags), encoding="utf-8")
    return path


def test_vqa_scores_by_skill(tmp_path, skills):
    path = tmp_path / "scores.json"
    forms = [SCORES, dict(zip((one.key for one in PROMPTS), SCORES, strict=True))]
    for content in forms:
        path.write_text(json.dumps(content), encoding="utf-8")
        found = judge_genai_bench(path, PROMPTS, skills)
        assert found.value == pytest.approx(0.3) and found.headline == "VQAScore, advanced"
        assert found.figures["VQAScore, basic"] == pytest.approx(0.7)
        assert found.figures["VQAScore, all"] == pytest.approx((0.9 + 0.5 + 0.2 + 0.4) / 4)
        assert found.tables["advanced skills"][0] == {
            "skill": "counting", "VQAScore": pytest.approx(1.1 / 3), "prompts": 3,
        }  # fmt: skip
        assert found.tables["advanced skills"][3] == {"skill": "negation", "VQAScore": None, "prompts": 0}
        assert found.scores["00005.jpg"] == 1.0 and found.notes == []


def test_vqa_scores_as_the_script_leaves_them(tmp_path, skills):
    torch.save(torch.tensor(SCORES).view(5, 1, 1), tmp_path / "clip-flant5-xxl_5_prompts.pt")
    found = judge_genai_bench(tmp_path / "clip-flant5-xxl_5_prompts.pt", PROMPTS, skills)
    assert found.value == pytest.approx(0.3)


def test_prompts_without_a_score_are_told(tmp_path, skills):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"00002": 0.5, "00003": 0.2}), encoding="utf-8")
    found = judge_genai_bench(path, PROMPTS, skills)
    assert found.value == pytest.approx(0.2) and found.figures["VQAScore, all"] == pytest.approx(0.35)
    assert found.notes == ["3 of 5 prompts have no score and are left out"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0.1, 0.2], "scores.json has 2 scores, and there are 5 prompts"),
        ({"00009": 0.1}, "a score of '00009'; expected numbers from 00001 to 00005"),
        ({"00001": None}, "the score of 00001 is None; expected a number"),
        ({"00001": float("nan")}, "the score of 00001 is nan; expected a number"),
        ({}, r"scores.json: got \{\}; expected scores by prompt number"),
    ],
)
def test_scores_that_do_not_fit_are_named(tmp_path, skills, content, message):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=message):
        judge_genai_bench(path, PROMPTS, skills)


def test_skills_of_other_prompts_are_named(tmp_path, skills):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES[:4]), encoding="utf-8")
    skills.write_text(json.dumps({"basic": [1, 5]}), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="genai_skills.json: tag 'basic' has prompt 00005, which the pr"):
        judge_genai_bench(tmp_path / "scores.json", PROMPTS[:4], skills)
