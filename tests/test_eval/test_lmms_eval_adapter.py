"""The real lmms-eval, offline, on little tasks of its own kinds: its answers are those of our runner."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import yaml

from data_pipeline.shards.conversations import conversation_parts
from data_pipeline.streams.views import document_of
from eval import lmms_eval_adapter
from eval.lmms_eval_adapter import DualTokenChat, DualTokenSimple
from eval.lmms_eval_requests import picture_file
from eval.understanding.benchmark import Question
from eval.understanding.models import load_answerer
from tests.support.distributed import ROOT
from tests.support.tiny_pope import sharpen
from tests.support.tiny_run import COLOURS, make_tiny_run, picture

needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")

QUESTIONS = 12
TOKENS = 10
OPTIONS = ["red", "green blue", "black"]
SHORT = "\nAnswer the question using a single word or phrase."

FUNCTIONS = '''
"""Functions of the tasks beside this file."""


def messages(doc):
    image = {"type": "image", "url": doc["image"]}
    shown = [image, {"type": "text", "text": "red or "}, image, {"type": "text", "text": doc["question"]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "black"}]}
    asked = [image, {"type": "text", "text": "blue"}]
    return [{"role": "user", "content": shown}, answer, {"role": "user", "content": asked}]


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=0, previous_round_info=None):
    if previous_output is None:
        return doc["question"]
    pictures = [doc["image"]] if round_idx == 1 else None
    seen = [*(previous_round_info or []), round_idx]
    return pictures, f"{previous_output[-1]} blue", round_idx == 3, previous_output, seen


def how_many(doc, results):
    return {"answers": len(results[0])}
'''


def question_of(index):
    return f"Is there {' and '.join(COLOURS[index % 4 :][:2])} in the image?"


def write_tasks(folder):
    """A table of a dozen questions, and tasks that ask them in each way that lmms-eval has."""
    from datasets import Dataset, Image

    folder.mkdir()
    (folder / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    rows = [
        {
            "question_id": str(index),
            "question": question_of(index),
            "answer": "yes" if index % 2 else "no",
            "option": index % 3,
            "image": picture(index),
        }
        for index in range(QUESTIONS)
    ]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "questions.parquet")
    table = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.parquet")}},
    }
    common = {**table, "test_split": "test", "doc_to_visual": "image", "doc_to_text": "question"}
    greedy = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    pope = {
        f"doc_to_{name}": f"!lmms_eval.tasks.pope.utils.pope_doc_to_{name}" for name in ("visual", "text")
    }
    tasks = {
        "tiny_pope": {
            **pope,
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {**greedy, "max_new_tokens": TOKENS},
            "process_results": "!lmms_eval.tasks.pope.utils.pope_process_results",
            "metric_list": [
                metric(f"pope_{name}", f"!lmms_eval.tasks.pope.utils.pope_aggregate_{name}")
                for name in ("accuracy", "yes_ratio")
            ],
            "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": SHORT}},
        },
        "tiny_pictures": {
            "output_type": "generate_until",
            "doc_to_messages": "!functions.messages",
            "doc_to_target": "answer",
            "generation_kwargs": {**greedy, "max_new_tokens": 4, "until": ["English"]},
            "metric_list": [metric("exact_match", "mean")],
        },
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_target": "option",
            "doc_to_choice": OPTIONS,
            "metric_list": [metric("acc", "mean")],
        },
        "tiny_rounds": {
            "output_type": "generate_until_multi_round",
            "doc_to_text": "!functions.rounds",
            "doc_to_target": "answer",
            "generation_kwargs": {**greedy, "max_new_tokens": 5},
            "process_results": "!functions.how_many",
            "metric_list": [metric("answers", "mean")],
        },
    }
    for name, task in tasks.items():
        written = yaml.safe_dump({"task": name, **common, **task, "metadata": [{"version": 0.0}]})
        # YAML's tag for a function, which safe_dump has no way to write.
        (folder / f"{name}.yaml").write_text(written.replace("'!", "!function '"), encoding="utf-8")


def metric(name, aggregation):
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("run"))
    sharpen(run / "mllm" / "export")
    write_tasks(run / "tasks")
    return run


@pytest.fixture(scope="module")
def answerer(run):
    return load_answerer(run / "mllm" / "export", run / "tokenizer" / "export")


@pytest.fixture(scope="module")
def environment(run):
    """Without a network, and with the entry point that the installed package has."""
    entry = run / "installed" / "dualtoken_entry-0.dist-info"
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: dualtoken-entry\nVersion: 0\n", encoding="utf-8"
    )
    point = "[lmms_eval.models]\ndualtoken = eval.lmms_eval_adapter:manifests\n"
    (entry / "entry_points.txt").write_text(point, encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(run / "hub")}
    return {**os.environ, **offline, "PYTHONPATH": f"{ROOT}{os.pathsep}{entry.parent}"}


def model_arguments(run):
    return f"pretrained={run / 'mllm' / 'export'},visual_tokenizer={run / 'tokenizer' / 'export'}"


@pytest.fixture(scope="module")
def found(run, environment):
    """Results and samples of both flavours, by one start of the command: loading it takes longest."""
    flavours = {"chat": "tiny_pope,tiny_pictures", "simple": "tiny_pope,tiny_choice,tiny_rounds"}
    settings = [
        {
            "model": "dualtoken",
            "model_args": model_arguments(run),
            "tasks": tasks,
            "include_path": str(run / "tasks"),
            "batch_size": 5,
            "output_path": str(run / flavour),
            "log_samples": True,
            "force_simple": flavour == "simple",
        }
        for flavour, tasks in flavours.items()
    ]
    (run / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--config",
        str(run / "settings.yaml"),
        "--verbosity",
        "DEBUG",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return {flavour: read_results(run / flavour) for flavour in flavours}


def read_results(folder):
    """Figures by task, and what the model answered by task, in the order of the questions."""
    (results,) = folder.rglob("*_results.json")
    figures = json.loads(results.read_text(encoding="utf-8"))["results"]
    answers = {}
    for path in folder.rglob("*_samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["doc_id"] for row in rows] == list(range(QUESTIONS))
        answers[path.stem.split("_samples_")[1]] = [row["filtered_resps"] for row in rows]
    return figures, answers


def questions(suffix=SHORT):
    return [
        Question(str(i), i, question_of(i) + suffix, picture_file(picture(i)), options=tuple(OPTIONS))
        for i in range(QUESTIONS)
    ]


@needs_lmms_eval
def test_both_flavours_answer_as_our_runner(found, answerer):
    ours = answerer.answer(questions(), TOKENS)
    assert len(set(ours)) > 3 and len({len(answer.split()) for answer in ours}) > 1
    for flavour in ("chat", "simple"):
        figures, answers = found[flavour]
        assert answers["tiny_pope"] == ours
        assert figures["tiny_pope"]["pope_yes_ratio,none"] == 0.5  # of the labels, whatever was answered


@needs_lmms_eval
def test_pictures_between_texts_and_answers_before(found, answerer):
    _, answers = found["chat"]
    expected = []
    for index in range(QUESTIONS):
        turns = [
            {"from": "user", "value": f"<image>\nred or <image>{question_of(index)}"},
            {"from": "assistant", "value": "black"},
            {"from": "user", "value": "<image>\nblue"},
        ]
        (image,) = answerer.look(questions()[index : index + 1])
        parts = conversation_parts(turns, 3, "qwen", answered=False)
        (whole,) = answerer.write([document_of(parts, [image] * 3)], 4)
        expected.append(whole.split("English")[0].strip())
    assert answers["tiny_pictures"] == expected
    assert len(set(expected)) > 1 and min(len(answer.split()) for answer in expected) < 4


@needs_lmms_eval
def test_the_likeliest_option_is_chosen(found, answerer):
    figures, answers = found["simple"]
    ours = answerer.choose(questions(suffix=""))
    losses = [[float(loss) for loss, _ in options] for options in answers["tiny_choice"]]
    assert losses == [pytest.approx([-one for one in row], rel=1e-4, abs=1e-4) for row in ours]
    chosen = [row.index(max(row)) for row in ours]
    right = sum(choice == index % 3 for index, choice in enumerate(chosen))
    assert figures["tiny_choice"]["acc,none"] == pytest.approx(right / QUESTIONS) and right > 0
    compared = answerer.compare(answerer.prompts(questions(suffix="")), [OPTIONS] * QUESTIONS)
    greedy = [[str(option.most_likely) for option in row] for row in compared]
    assert [[flag for _, flag in options] for options in answers["tiny_choice"]] == greedy
    assert {flag for row in greedy for flag in row} == {"True", "False"}


@needs_lmms_eval
def test_a_task_asks_several_rounds(found, answerer):
    figures, answers = found["simple"]
    first = answerer.answer(questions(suffix=""), 5)
    again = [
        Question("", "", f"{said} blue", one.image) for said, one in zip(first, questions(), strict=True)
    ]
    second = answerer.answer(again, 5)
    without = [
        answerer.document([{"from": "user", "value": f"{said} blue"}], [], "a third round") for said in second
    ]
    third = [text.strip() for text in answerer.write(without, 5)]
    expected = [list(said) for said in zip(first, second, third, strict=True)]
    assert answers["tiny_rounds"] == expected
    assert figures["tiny_rounds"]["answers,none"] == 3


@needs_lmms_eval
def test_what_is_not_offered_is_refused(run):
    where = {
        "pretrained": str(run / "mllm" / "export"),
        "visual_tokenizer": str(run / "tokenizer" / "export"),
    }
    for wrong, message in (
        ({"batch_size": "auto"}, "batch_size is 'auto', max_batch_size None; expected a number from 1"),
        ({"max_batch_size": 8}, "batch_size is 1, max_batch_size 8; expected .* automatic batch size is not"),
        ({"visual_tokenizer": None}, "is a unified model: name the visual tokenizer"),
        ({"precision": "fp16"}, "precision is 'fp16', expected fp32 or bf16"),
        ({"chat_template": "plain"}, "template is 'plain', expected one of qwen, vicuna, none"),
        ({"device": "mps"}, "device is 'mps', but models go to .*CUDA_VISIBLE_DEVICES= hides GPUs"),
    ):
        with pytest.raises(ValueError, match=message):
            DualTokenChat(**{**where, **wrong})


@needs_lmms_eval
@pytest.mark.slow  # two processes load lmms-eval
def test_two_processes_share_the_questions(run, environment, answerer):
    script = run / "two.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641"]
    words = [model_arguments(run), str(run / "tasks"), str(run / "two.json")]
    env = {**environment, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*start, str(script), *words], env=env, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    rows = json.loads((run / "two.json").read_text(encoding="utf-8"))
    assert sorted(index for index, _ in rows) == list(range(11))
    ours = answerer.answer(questions(), TOKENS)
    assert all(answer == [ours[index]] for index, answer in rows)


# By the executor of accelerate; the one of torchrun, which the command takes, gathers on GPUs only.
TWO_PROCESSES = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

model, tasks, output = sys.argv[1:]
manager = TaskManager("INFO", include_path=tasks, model_name="dualtoken")
# An odd number of questions: the second process gets one to fill up.
found = simple_evaluate("dualtoken", model, tasks=["tiny_pope"], batch_size=3, limit=11, task_manager=manager)
if found is not None:
    rows = [[row["doc_id"], row["filtered_resps"]] for row in found["samples"]["tiny_pope"]]
    with open(output, "w", encoding="utf-8") as file:
        json.dump(rows, file)
"""


def test_a_metric_that_would_be_inverted_is_refused():
    with pytest.raises(ValueError, match="acc_mutual_info wants log-likelihoods where acc wants losses"):
        DualTokenSimple._conversation(None, SimpleNamespace(args=("", "red")))


def test_without_lmms_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(lmms_eval_adapter, "lmms", None)
    for flavour in (DualTokenChat, DualTokenSimple):
        with pytest.raises(
            ImportError, match=r"lmms-eval is not installed; pip install 'dualtoken\[lmms-eval\]'"
        ):
            flavour("model", "tokenizer")
