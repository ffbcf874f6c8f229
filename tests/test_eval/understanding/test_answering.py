"""Asking a little POPE: ranks, batches and kills do not change a byte; other settings are refused."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.ranks import place_among_ranks
from eval.understanding.answer_parts import Answer, PartWriter, identity, read_parts
from eval.understanding.answering import answer_questions, answering_settings, collect_answers
from eval.understanding.answers import read_answers
from eval.understanding.benchmark import BenchmarkError
from eval.understanding.models import load_answerer
from eval.understanding.registry import BENCHMARKS
from tests.support.distributed import ROOT, run_module
from tests.support.tiny_pope import sharpen, write_pope
from tests.support.tiny_run import make_tiny_run

POPE = BENCHMARKS["pope"]
TOKENS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("run"))
    sharpen(run / "mllm" / "export")
    write_pope(run / "pope")
    return run


@pytest.fixture(scope="module")
def answerer(run):
    return load_answerer(run / "mllm" / "export", run / "tokenizer" / "export")


@pytest.fixture(scope="module")
def questions(run):
    return POPE.read(run / "pope")


@pytest.fixture(scope="module")
def expected(answerer, questions, tmp_path_factory):
    """The answers of one rank in batches of four."""
    output = tmp_path_factory.mktemp("one")
    path = answer_questions(POPE, questions, answerer, output, batch_size=4, max_new_tokens=TOKENS)
    assert path == output / "answers.jsonl"
    answers = read_answers(path, POPE, questions)
    assert len(set(answers.values())) > 6 and len({len(text.split()) for text in answers.values()}) > 2
    return path.read_bytes()


class Counting:
    """An answerer that notes what it is asked."""

    def __init__(self, answerer):
        self.answerer, self.asked = answerer, []
        self.name, self.settings, self.fingerprint = answerer.name, answerer.settings, answerer.fingerprint

    def answer(self, questions, max_new_tokens):
        self.asked.append([question.key for question in questions])
        return self.answerer.answer(questions, max_new_tokens)


def ask(questions, answerer, output, **settings):
    return answer_questions(POPE, questions, answerer, output, **{"max_new_tokens": TOKENS, **settings})


def test_ranks_and_batches_change_nothing(questions, answerer, expected, tmp_path):
    counting = Counting(answerer)
    for rank in (4, 0, 2, 1, 3):  # slices of 3, 3, 3, 3 and 0
        assert not (tmp_path / "answers.jsonl").exists()
        with pytest.raises(BenchmarkError, match=r"lacks \d+ of 12 answers \(question .*start the same comm"):
            collect_answers(questions, tmp_path)
        path = ask(questions, counting, tmp_path, rank=rank, world_size=5, batch_size=1)
        assert (path is None) == (rank != 3)
    assert path.read_bytes() == expected
    keys = [question.key for question in questions]
    assert counting.asked == [[key] for rank in (0, 2, 1, 3) for key in keys[3 * rank : 3 * rank + 3]]
    path.unlink()
    video = dataclasses.replace(questions[0], key="video", image=None, optional=True)  # as in SEED-Bench
    assert collect_answers([video, *questions], tmp_path).read_bytes() == expected
    assert ask([video, *questions], counting, tmp_path).read_bytes() == expected and len(counting.asked) == 12


def words_of(run, output):
    """Words of `dualtoken`."""
    words = ["evaluate", "pope", "--data", run / "pope", "--model", run / "mllm" / "export"]
    words += ["--visual-tokenizer", run / "tokenizer" / "export", "--siglip", run / "siglip", "--out", output]
    return [*map(str, words), "--max-new-tokens", str(TOKENS)]


def test_a_killed_run_goes_on_on_two_ranks(run, questions, expected, tmp_path):
    folder = tmp_path / "pope"
    words = [str(folder), *words_of(run, tmp_path)]
    said = run_module("tests.support.killed_answers", words, world_size=1).check().output
    done = (folder / "before.jsonl").read_bytes().count(b"\n")
    assert 2 <= done < len(questions) / 2
    assert (folder / "answers.jsonl").read_bytes() == expected
    assert f"rank 0: pope: {done} of 6 answers are there" in said
    assert f"rank 0: pope: {6 - done} answers in " in said and "rank 1: pope: 6 answers in " in said
    assert re.search(rf"rank [01]: pope: {POPE.headline} \d", said)  # of whoever was last
    chance = re.escape(f"{POPE.chance(questions):.2f} %")
    assert re.search(rf"pope +{POPE.headline} +[\d.]+ % +{chance} +12", said)  # the table
    result = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["tasks"]["pope"]
    assert result["value"] == pytest.approx(
        POPE.score(questions, read_answers(folder / "answers.jsonl", POPE, questions)).value
    )
    assert set(result["models"]) == {"model", "visual_tokenizer"} and result["settings"]["template"]


@pytest.mark.slow  # the launcher and two ranks load DeepSpeed or transformers
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_launchers_start_it(launcher, run, expected, tmp_path):
    start = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--module"],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "29617", "-m"],
    }[launcher]
    start[0] = str(Path(sys.executable).parent / start[0])
    command = [*start, "launchers.cli", *words_of(run, tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rank 0: pope: 6 answers in " in done.stdout and "rank 1: pope: 6 answers in " in done.stdout
    assert (tmp_path / "pope" / "answers.jsonl").read_bytes() == expected


def test_what_was_torn_is_asked_again_and_nothing_else(questions, answerer, expected, tmp_path):
    ask(questions, answerer, tmp_path)
    part = tmp_path / "answers" / "part-00000.jsonl"
    whole = part.read_bytes()
    lines = whole.splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
    counting = Counting(answerer)
    said = []
    path = ask(questions, counting, tmp_path, progress=said.append)
    assert path.read_bytes() == expected and part.read_bytes() == whole
    assert counting.asked == [[question.key for question in questions[-2:]]]
    assert said[0] == "10 of 12 answers are there" and said[-1].startswith("2 answers in ")
    part.write_bytes(b'{"key": 1}\n' + whole)
    with pytest.raises(BenchmarkError, match="part-00000.jsonl, line 1: no answer .*delete the line"):
        ask(questions, answerer, tmp_path)


def test_answers_by_other_settings_are_refused(run, questions, answerer, expected, tmp_path):
    ask(questions, answerer, tmp_path)
    models = {"model": run / "mllm" / "export", "visual_tokenizer": run / "tokenizer" / "export"}
    for other, message in (
        ({"max_new_tokens": TOKENS + 1}, "max_new_tokens 10, not 11"),
        ({"by": "likelihood"}, "by text, not likelihood"),
        ({"answerer": load_answerer(**models, template="vicuna")}, "template qwen, not vicuna"),
        ({"answerer": load_answerer(**models, precision="bf16")}, "precision fp32, not bf16"),
    ):
        given = {"questions": questions, "answerer": answerer, "output": tmp_path, **other}
        with pytest.raises(BenchmarkError, match=f"holds answers with {message}; name another output folder"):
            ask(**given)
    other_versions = Counting(answerer)
    other_versions.settings = {**answerer.settings, "versions": {"torch": "9"}}
    assert ask(questions, other_versions, tmp_path).read_bytes() == expected and not other_versions.asked


def test_a_look_at_some_questions_is_kept_for_all_of_them(questions, answerer, expected, tmp_path):
    counting = Counting(answerer)
    some = ask([questions[index] for index in (7, 2)], counting, tmp_path)
    assert len(some.read_bytes().splitlines()) == 2
    reworded = dataclasses.replace(questions[7], prompt="red")  # the authors have changed their file
    ask([reworded], counting, tmp_path)
    assert ask(questions, counting, tmp_path, batch_size=5).read_bytes() == expected
    assert counting.asked[:2] == [[questions[7].key, questions[2].key], [questions[7].key]]
    assert sum(map(len, counting.asked)) == len(questions) + 1
    assert answering_settings(tmp_path)["fingerprint"] == answerer.fingerprint


def test_one_process_writes_a_part(questions, answerer, tmp_path):
    answer = Answer("gr\u00fcn\nund\u2028rot", {"log_likelihoods": {"Yes": -0.5}})
    with PartWriter(tmp_path / "answers", 0) as part:
        part.write(questions[0], answer)
        with pytest.raises(BenchmarkError, match="another process writes .*part-00000.jsonl; wait for"):
            ask(questions, answerer, tmp_path)
    assert read_parts(tmp_path / "answers") == {identity(questions[0]): answer}


def test_by_likelihood_the_likeliest_option_is_the_answer(questions, answerer, tmp_path):
    path = ask(questions, answerer, tmp_path / "4", by="likelihood", batch_size=4)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    likelihoods = answerer.choose(questions)
    for question, row, found in zip(questions, rows, likelihoods, strict=True):
        kept = row["metadata"]["log_likelihoods"]
        assert list(kept) == list(question.options) and row["text"] == max(kept, key=kept.get)
        assert list(kept.values()) == pytest.approx(found, abs=1e-3)
    answers = read_answers(path, POPE, questions)
    assert len(POPE.score(questions, answers).per_question) == len(questions)
    one = ask(questions, answerer, tmp_path / "1", by="likelihood", batch_size=1)
    assert read_answers(one, POPE, questions) == answers
    open_question = dataclasses.replace(questions[3], options=())
    with pytest.raises(BenchmarkError, match=r"pope: question \S+ has 0 options, .*; ask by text"):
        ask([*questions[:3], open_question], answerer, tmp_path / "0", by="likelihood")


def test_ranks_and_batches_have_to_be_possible(tmp_path):
    with pytest.raises(BenchmarkError, match="rank 2 of 2, batch size 4, 10 new tokens; expected"):
        ask([], None, tmp_path, rank=2, world_size=2, batch_size=4)


def test_the_place_among_ranks():
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert place_among_ranks({}) == (0, 1, 0)
    assert place_among_ranks(step) == (5, 8, 1)
    assert place_among_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1, 0)  # the batch script
    assert place_among_ranks({"RANK": "3", "WORLD_SIZE": "6", "LOCAL_RANK": "2", **step}) == (3, 6, 2)
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_PROCID": "0"}
    assert place_among_ranks(array) == (2, 4, 0)
